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
from registry.records import FoldinError, Refusal

MERGE_KEY = "foldin.merge_key"
TAG_LIMIT = 400  # characters; documents go into artifacts, short facts into tags

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
            raise FoldinError(
                Refusal(
                    code="E_MLFLOW",
                    what="MLflow did not do what was asked",
                    where=f"MLflow at {_without_password(self.uri)}",
                    found=shown(_without_password(str(error).strip().partition("\n")[0])),
                    remedy="check that it runs and that tracking_uri in foldin.toml is right, then try again",
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


def unreachable(error: MlflowException) -> bool:
    """Whether the server is the trouble, not what was asked of it."""
    text = str(error)
    return "API request to" in text or "Max retries" in text or "timed out" in text


def quoted(name: str) -> str:
    """A name inside the quotes of a filter."""
    return name.replace("'", "''")


def short(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that every database takes."""
    return {key: value[:TAG_LIMIT] for key, value in tags.items()}


def _without_password(text: str) -> str:
    """A text without the passwords of the URLs in it."""
    return re.sub(r"(://[^/\s@:]*:)[^\s@]+@", r"\1***@", text)
