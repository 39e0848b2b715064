"""The connection to one MLflow, and its errors as foldin's. With its neighbours the only file that imports it."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlflow
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from registry.files import shown
from registry.logins import without_logins
from registry.records import FoldinError, Refusal

MERGE_KEY = "foldin.merge_key"
NAME_LIMIT = 250  # characters of a run's name; PostgreSQL takes no more
TAG_LIMIT = 400  # characters; documents go into artifacts, short facts into tags

NO_DENIAL = (
    "MLflow did not do what was asked",
    "check that it runs and that tracking_uri in foldin.toml is right, then try again",
)
DENIALS = {
    401: (
        "MLflow does not know the account, or its password is another (401)",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or a file of them",
    ),
    403: (
        "the account may not do that in MLflow (403)",
        "have it granted, as docs/access.md says, or use the account that may",
    ),
}

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


class Link:
    """One MLflow as its client, with typed errors."""

    def __init__(self, tracking_uri: str, artifact_root: str) -> None:
        """Talk to one MLflow; new experiments put their artifacts below `artifact_root`, "" leaves it to the server."""
        self.uri = tracking_uri
        self._artifact_root = artifact_root
        mlflow.set_tracking_uri(tracking_uri)  # the registry resolves models:/m-… by the global one
        with self.reached():
            self.client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Turn whatever MLflow raises into one typed error, E_MLFLOW."""
        try:
            yield
        except (MlflowException, OSError, BotoCoreError, ClientError) as error:
            what, remedy = DENIALS.get(denied(error), NO_DENIAL)
            raise FoldinError(
                Refusal(
                    code="E_MLFLOW",
                    what=what,
                    where=f"MLflow at {without_logins(self.uri)}",
                    found=shown(without_logins(str(error).strip().partition("\n")[0])),
                    remedy=remedy,
                )
            ) from error

    def experiment(self, name: str) -> str:
        """The id of foldin's experiment for a registered model, found or created."""
        with self.reached():
            found = self.client.get_experiment_by_name(f"foldin/{name}")
            if found is not None:
                return str(found.experiment_id)
            try:
                location = self._artifact_root or None
                return str(self.client.create_experiment(f"foldin/{name}", artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return str(self.client.get_experiment_by_name(f"foldin/{name}").experiment_id)


def missing(error: MlflowException) -> bool:
    """Whether what was asked for is not there."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def denied(error: Exception) -> int:
    """The status, 401 or 403, with which a server refused an account; 0 for any other error.

    MLflow's own answers carry a code; what its proxy for files answers comes as text, after several tries.
    """
    status = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}.get(getattr(error, "error_code", ""), 0)
    told = re.search(r"\b(401|403) Client Error\b|failed with error code (401|403)\b", str(error))
    return status or (int(told[1] or told[2]) if told else 0)


def unreachable(error: MlflowException) -> bool:
    """Whether the server, or the account, is the trouble, not what was asked for."""
    text = str(error)
    return bool(denied(error)) or "API request to" in text or "Max retries" in text or "timed out" in text


def quoted(name: str) -> str:
    """A name inside the quotes of a filter."""
    return name.replace("'", "''")


def short(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that every database takes."""
    return {key: value[:TAG_LIMIT] for key, value in tags.items()}
