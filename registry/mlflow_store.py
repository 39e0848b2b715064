"""What people and clients see: everything foldin reads from MLflow or shows there. The only file that imports it."""

import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlparse

import mlflow
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from registry.files import MANIFEST, SIGNATURE, shown, verify_manifest
from registry.records import ExpertVersion, FoldinError, Refusal

CHAMPION = "champion"
CANDIDATE = "candidate"  # the version that waits for a person; users do not load it
MERGE_KEY = "foldin.merge_key"
PARENT = "mlflow.parentRunId"
TAG_LIMIT = 400  # characters; documents go into artifacts, short facts into tags

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


class MlflowStore:
    """The registry as foldin uses it: watched models in, versions of a line out."""

    def __init__(self, tracking_uri: str, artifact_root: str, cache: Path) -> None:
        """Talk to one MLflow; new experiments put their artifacts below `artifact_root`; downloads go to `cache`."""
        self._uri = tracking_uri
        self._artifact_root = artifact_root
        self._cache = cache
        mlflow.set_tracking_uri(tracking_uri)  # the registry resolves models:/m-… by the global one
        with self._reached():
            self._client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)

    # experts

    def newer(self, model: str, after: int) -> Iterator[ExpertVersion]:
        """The versions of a registered model past a number, in version order; none when the model does not exist."""
        token: str | None = None
        while True:
            with self._reached():
                page = self._client.search_model_versions(
                    f"name = '{_quoted(model)}' and version_number > {after}",
                    max_results=100,
                    order_by=["version_number ASC"],
                    page_token=token,
                )
                found = [self._expert(version) for version in page]
            yield from found
            token = page.token
            if not token:
                return

    def expert(self, model: str, version: int) -> ExpertVersion | None:
        """One version of a registered model as it is now; None when it was deleted."""
        with self._reached():
            try:
                return self._expert(self._client.get_model_version(model, str(version)))
            except MlflowException as error:
                if _missing(error):
                    return None
                raise

    def fetch(self, expert: ExpertVersion) -> Path:
        """The local folder of an expert's artifacts; downloaded afresh when they are not on this machine.

        Raises:
            FoldinError: E_SOURCE when there is nothing at the source.
        """
        return self._artifacts(
            expert.model, expert.version, self._cache / "experts" / expert.model / str(expert.version)
        )

    # a line's versions

    def champion(self, line: str) -> int | None:
        """The version the alias stands on; None when it stands nowhere."""
        return self._alias(line, CHAMPION)

    def candidate(self, line: str) -> int | None:
        """The version that is shown as waiting for a person; None when none is."""
        return self._alias(line, CANDIDATE)

    def point_candidate(self, line: str, version: int | None) -> None:
        """Show a version, or with None no version, as the one that waits."""
        with self._reached():
            if version is None:
                self._client.delete_registered_model_alias(line, CANDIDATE)
            else:
                self._client.set_registered_model_alias(line, CANDIDATE, str(version))

    def label(self, line: str, version: int, tags: Mapping[str, str]) -> None:
        """Set tags on a registered version."""
        with self._reached():
            for key, value in _short(tags).items():
                self._client.set_model_version_tag(line, str(version), key, value)

    def point_champion(self, line: str, version: int) -> None:
        """Move the alias and see that it moved.

        Raises:
            FoldinError: E_ALIAS when it stands elsewhere afterwards.
        """
        with self._reached():
            self._client.set_registered_model_alias(line, CHAMPION, str(version))
        found = self.champion(line)
        if found != version:
            raise FoldinError(
                Refusal(
                    code="E_ALIAS",
                    what="the alias does not stand where it was just put",
                    where=f"model {line}, alias {CHAMPION}",
                    expected=f"version {version}",
                    found=f"version {found}",
                    remedy="run the watch again; it compares the alias with the ledger",
                )
            )

    def folder(self, line: str, version: int) -> Path:
        """The local folder with one version's artifacts; verify it against its manifest before use.

        Raises:
            FoldinError: E_SOURCE when there is nothing at the source.
        """
        known = self._cache / "versions" / line / str(version)
        return known if known.is_dir() else self._artifacts(line, version, known)

    def versions(self, line: str) -> list[int]:
        """The numbers of a line's registered versions, ascending."""
        return [version.version for version in self.newer(line, 0)]

    def registered(self, line: str, merge_key: str) -> int | None:
        """The version that carries a merge key; None when there is none."""
        with self._reached():
            found = self._client.search_model_versions(
                f"name = '{_quoted(line)}' and tags.`{MERGE_KEY}` = '{merge_key}'"
            )
        return min((int(version.version) for version in found), default=None)

    def run_for(self, line: str, merge_key: str, name: str, tags: Mapping[str, str]) -> str:
        """The id of the run that shows one merge, found or created."""
        experiment = self._experiment(line)
        with self._reached():
            runs = self._client.search_runs([experiment], f"tags.`{MERGE_KEY}` = '{merge_key}'", max_results=1)
            if runs:
                return str(runs[0].info.run_id)
            labels = _short({MERGE_KEY: merge_key, "foldin.line": line, **tags})
            return str(self._client.create_run(experiment, run_name=name, tags=labels).info.run_id)

    def show(
        self,
        run_id: str,
        *,
        params: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        artifacts: Iterable[tuple[Path, str]],
        inputs: Iterable[str] = (),
    ) -> None:
        """Put a merge's facts on its run and end it; `artifacts` are (file, folder), `inputs` ids of LoggedModels."""
        batch = [Metric(key, value, 0, 0) for key, value in metrics.items()]
        with self._reached():
            self._client.log_batch(
                run_id,
                metrics=batch,
                params=[Param(key, str(value)[:TAG_LIMIT]) for key, value in params.items()],
                tags=[RunTag(key, value) for key, value in _short(tags).items()],
            )
            for path, folder in artifacts:
                self._client.log_artifact(run_id, str(path), folder or None)
            models = [LoggedModelInput(model_id) for model_id in inputs if model_id]
            if models:
                self._client.log_inputs(run_id, models=models)
            self._client.set_terminated(run_id, "FINISHED")

    def published(self, line: str, merge_key: str) -> bool:
        """Whether something is finished under a merge key, registered or not yet."""
        with self._reached():
            return any(str(model.status) == "READY" for model in self._logged_models(line, merge_key))

    def show_child(
        self,
        parent: str,  # id of a run
        name: str,
        *,
        params: Mapping[str, object],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Put facts on a child of a run, found by its name or created, and end it."""
        with self._reached():
            experiment = self._client.get_run(parent).info.experiment_id
            query = f"tags.`{PARENT}` = '{parent}' and attributes.run_name = '{_quoted(name)}'"
            found = self._client.search_runs([experiment], query, max_results=1)
            run = found[0] if found else self._client.create_run(experiment, run_name=name, tags={PARENT: parent})
        measured = {key: value for key, value in metrics.items() if not math.isnan(value)}
        self.show(run.info.run_id, params=params, metrics=measured, tags=tags, artifacts=[])

    def publish(
        self,
        line: str,
        merge_key: str,
        run_id: str,
        folder: Path,
        *,
        description: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> int:
        """Register a finished folder as the line's next version, manifest last; find what an earlier try left.

        A LoggedModel is READY only once its manifest is up, and only a READY one is registered.
        """
        registered = self.registered(line, merge_key)
        if registered is not None:
            return registered
        labels = _short({MERGE_KEY: merge_key, "foldin.line": line, **tags})
        with self._reached():
            model = self._logged_model(line, merge_key, run_id, labels)
            if str(model.status) != "READY":
                self._upload(model, folder)
                self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
                self._client.finalize_logged_model(model.model_id, "READY")
            labels = {
                key: model.tags.get(key, value) for key, value in labels.items()
            }  # an earlier run's, if it got here
            now = int(time.time() * 1000)
            measured = [Metric(key, value, now, 0, model_id=model.model_id) for key, value in metrics.items()]
            self._client.log_batch(run_id, metrics=measured)
            self._ensure_model(line)
            version = self._client.create_model_version(
                line, f"models:/{model.model_id}", run_id, labels, description=description, model_id=model.model_id
            )
        return int(version.version)

    def register_expert(self, model: str, folder: Path, extra: Iterable[Path], tags: Mapping[str, str]) -> int:
        """Register a folder, and single files beside it, as the next version of a watched model; returns its number."""
        experiment = self._experiment(model)
        with self._reached():
            self._ensure_model(model)
            made = self._client.create_logged_model(experiment, name=model, tags=dict(tags), model_type="expert")
            self._client.log_model_artifacts(made.model_id, str(folder))
            for path in extra:
                self._client.log_model_artifact(made.model_id, str(path))
            self._client.finalize_logged_model(made.model_id, "READY")
            version = self._client.create_model_version(
                model, f"models:/{made.model_id}", tags=dict(tags), model_id=made.model_id
            )
        return int(version.version)

    def signature(self, line: str, version: int, folder: Path) -> Path | None:
        """A version's signature as it is stored now, downloaded into a folder; None when there is none."""
        with self._reached():
            artifacts = get_artifact_repository(self._client.get_model_version_download_uri(line, str(version)))
            if all(each.path != SIGNATURE for each in artifacts.list_artifacts()):
                return None
            return Path(artifacts.download_artifacts(SIGNATURE, str(folder)))

    def attach(self, line: str, version: int, path: Path) -> None:
        """Put one file beside those of a version; an older one of the same name is replaced."""
        model_id = self.model_id(line, version)
        with self._reached():
            self._client.log_model_artifact(model_id, str(path))

    def model_id(self, line: str, version: int) -> str:
        """The id of the LoggedModel behind a version; "" when there is none."""
        found = self.expert(line, version)
        return found.model_id if found else ""

    # the machinery

    def _alias(self, line: str, name: str) -> int | None:
        with self._reached():
            try:
                return int(self._client.get_model_version_by_alias(line, name).version)
            except MlflowException as error:
                if _missing(error) or error.error_code == "INVALID_PARAMETER_VALUE":
                    return None
                raise

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn whatever MLflow raises into one typed error."""
        try:
            yield
        except (MlflowException, OSError, BotoCoreError, ClientError) as error:
            raise FoldinError(
                Refusal(
                    code="E_MLFLOW",
                    what="MLflow did not do what was asked",
                    where=f"MLflow at {_without_password(self._uri)}",
                    found=shown(str(error).strip().partition("\n")[0]),
                    remedy="check that it runs and that tracking_uri in foldin.toml is right, then try again",
                )
            ) from error

    def _expert(self, version: ModelVersion) -> ExpertVersion:
        model_id = version.source.removeprefix("models:/") if version.source.startswith("models:/m-") else ""
        status = self._model_status(model_id) if model_id else str(version.status)
        return ExpertVersion(
            model=version.name,
            version=int(version.version),
            tags=dict(version.tags),
            model_id=model_id,
            status=status,
            created=version.creation_timestamp / 1000,
        )

    def _model_status(self, model_id: str) -> str:
        try:
            return str(self._client.get_logged_model(model_id).status)
        except MlflowException as error:
            if _missing(error):
                return "DELETED"
            raise

    def _artifacts(self, model: str, version: int, target: Path) -> Path:
        """The local folder of a version's artifacts: E_SOURCE when they are gone, E_MLFLOW when nobody can be asked."""
        with self._reached():
            try:
                uri = self._client.get_model_version_download_uri(model, str(version))
                get_artifact_repository(uri)  # raises for a scheme that nobody serves
                return self._local(uri, f"{model} v{version}", target)
            except MlflowException as error:
                if _unreachable(error):
                    raise
                raise FoldinError(_nothing_there(f"{model} v{version}", shown(str(error)))) from error

    def _local(self, uri: str, where: str, target: Path) -> Path:
        """The folder behind an artifact URI: itself when it is on this machine, else a whole download at `target`."""
        parsed = urlparse(uri)
        if parsed.scheme in {"", "file"}:
            folder = Path(unquote(parsed.path))
            if not folder.is_dir():
                raise FoldinError(_nothing_there(where, uri))
            return folder
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as scratch:
            get_artifact_repository(uri).download_artifacts("", scratch)
            shutil.rmtree(target, ignore_errors=True)
            Path(scratch).rename(target)
        return target

    def _experiment(self, name: str) -> str:
        with self._reached():
            found = self._client.get_experiment_by_name(f"foldin/{name}")
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(
                    self._client.create_experiment(f"foldin/{name}", artifact_location=self._artifact_root or None)
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return str(self._client.get_experiment_by_name(f"foldin/{name}").experiment_id)

    def _ensure_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _logged_models(self, line: str, merge_key: str) -> list[LoggedModel]:
        """Whatever was begun under a merge key."""
        query = f"tags.`{MERGE_KEY}` = '{merge_key}'"
        return list(self._client.search_logged_models([self._experiment(line)], filter_string=query))

    def _logged_model(self, line: str, merge_key: str, run_id: str, tags: dict[str, str]) -> LoggedModel:
        found = self._logged_models(line, merge_key)
        ready = [model for model in found if str(model.status) == "READY"]
        if ready:
            return ready[0]
        for left in found:  # by a run that died, perhaps on another machine and with other bytes
            self._client.delete_logged_model(left.model_id)
        return self._client.create_logged_model(
            self._experiment(line), name=line, source_run_id=run_id, tags=tags, model_type="merged"
        )

    def _upload(self, model: LoggedModel, folder: Path) -> None:
        """Every file, the manifest last: a version without one was never finished. Then all of it is read back."""
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.as_posix() == MANIFEST):
            parent = path.parent.as_posix()
            self._client.log_model_artifact(model.model_id, str(folder / path), None if parent == "." else parent)
        stored = self._local(model.artifact_location, model.model_id, self._cache / "read-back" / model.model_id)
        wrong = verify_manifest(stored)
        if stored.is_relative_to(self._cache):
            shutil.rmtree(stored)
        if wrong:
            raise FoldinError(replace(wrong[0], code="E_MLFLOW", what="what was uploaded did not arrive whole"))


def _missing(error: MlflowException) -> bool:
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def _unreachable(error: MlflowException) -> bool:
    """Whether the server is the trouble, not what was asked of it."""
    text = str(error)
    return "API request to" in text or "Max retries" in text or "timed out" in text


def _nothing_there(where: str, found: str) -> Refusal:
    what, remedy = "there are no artifacts at the version's source", "upload them and register a new version"
    return Refusal("E_SOURCE", what, where, found=found, remedy=remedy)


def _quoted(name: str) -> str:
    return name.replace("'", "''")


def _short(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: value[:TAG_LIMIT] for key, value in tags.items()}


def _without_password(uri: str) -> str:
    parsed = urlparse(uri)
    return uri.replace(f":{parsed.password}@", ":***@") if parsed.password else uri
