"""MLflow's models: what is behind a registered version, and what was begun under a merge key."""

from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from registry.mlflow_link import MERGE_KEY, Link, missing
from registry.records import ExpertVersion


def expert_of(link: Link, version: ModelVersion) -> ExpertVersion:
    """A version of a registered model as foldin sees it."""
    model_id = version.source.removeprefix("models:/") if version.source.startswith("models:/m-") else ""
    return ExpertVersion(
        model=version.name,
        version=int(version.version),
        tags=dict(version.tags),
        model_id=model_id,
        status=_status(link, model_id) if model_id else str(version.status),
        created=version.creation_timestamp / 1000,
    )


def _status(link: Link, model_id: str) -> str:
    try:
        return str(link.client.get_logged_model(model_id).status)
    except MlflowException as error:
        if missing(error):
            return "DELETED"
        raise


def ensure(link: Link, name: str) -> None:
    """See that there is a registered model of a name."""
    try:
        link.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def begun(link: Link, line: str, merge_key: str) -> list[LoggedModel]:
    """Whatever was begun under a merge key, finished or not."""
    query = f"tags.`{MERGE_KEY}` = '{merge_key}'"
    return list(link.client.search_logged_models([link.experiment(line)], filter_string=query))


def found_or_made(link: Link, line: str, merge_key: str, run_id: str, tags: dict[str, str]) -> LoggedModel:
    """The finished model of a merge key; a new one where there is none."""
    found = begun(link, line, merge_key)
    ready = [model for model in found if str(model.status) == "READY"]
    if ready:
        return ready[0]
    for left in found:  # by a run that died, perhaps on another machine and with other bytes
        link.client.delete_logged_model(left.model_id)
    return link.client.create_logged_model(
        link.experiment(line), name=line, source_run_id=run_id, tags=tags, model_type="merged"
    )
