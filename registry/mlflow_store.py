"""What people and clients see: the registry as foldin reads it and shows it in MLflow."""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException

from registry.manifests import SIGNATURE
from registry.mlflow_archives import Archives
from registry.mlflow_files import Files
from registry.mlflow_link import MERGE_KEY, Link, missing, quoted, short
from registry.mlflow_models import begun, ensure, expert_of, found_or_made
from registry.mlflow_runs import Runs
from registry.records import ExpertVersion, FoldinError, Refusal
from registry.serving import STATE

CHAMPION = "champion"
CANDIDATE = "candidate"  # the version that waits for a person; users do not load it


class MlflowStore:
    """The registry as foldin uses it: watched models in, versions of a line out."""

    def __init__(self, tracking_uri: str, artifact_root: str, cache: Path) -> None:
        """Talk to one MLflow; new experiments put their artifacts below `artifact_root`; downloads go to `cache`."""
        self._link = Link(tracking_uri, artifact_root)
        self._client, self._reached = self._link.client, self._link.reached
        self.files = Files(self._link, cache)
        self.runs = Runs(self._link)
        self.archives = Archives(self._link, self.files, self.runs)

    # experts

    def newer(self, model: str, after: int) -> Iterator[ExpertVersion]:
        """The versions of a registered model past a number, in version order; none when the model does not exist."""
        token: str | None = None
        while True:
            with self._reached():
                page = self._client.search_model_versions(
                    f"name = '{quoted(model)}' and version_number > {after}",
                    max_results=100,
                    order_by=["version_number ASC"],
                    page_token=token,
                )
                found = [expert_of(self._link, version) for version in page]
            yield from found
            token = page.token
            if not token:
                return

    def expert(self, model: str, version: int) -> ExpertVersion | None:
        """One version of a registered model as it is now; None when it was deleted."""
        with self._reached():
            try:
                return expert_of(self._link, self._client.get_model_version(model, str(version)))
            except MlflowException as error:
                if missing(error):
                    return None
                raise

    def fetch(self, expert: ExpertVersion) -> Path:
        """The local folder of an expert's artifacts; downloaded afresh when they are not on this machine.

        Raises:
            FoldinError: E_SOURCE when there is nothing at the source.
        """
        return self.files.expert(expert.model, expert.version)

    # a line's versions

    def exists(self, line: str) -> bool:
        """Whether there is a registered model of a name. Asked otherwise, a server with logins says 403 when not."""
        with self._reached():
            return bool(self._client.search_registered_models(f"name = '{quoted(line)}'", max_results=1))

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
            for key, value in short(tags).items():
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

    def folder(self, line: str, version: int, *, fresh: bool = False) -> Path:
        """The local folder with one version's artifacts; verify it against its manifest before use.

        What was brought here before is brought again when it must be `fresh`: as it is stored now.

        Raises:
            FoldinError: E_SOURCE when there is nothing at the source.
        """
        return self.files.version(line, version, fresh=fresh)

    def aliased(self, line: str) -> set[int]:
        """The versions of a line that any alias names; users may load them."""
        with self._reached():
            return {int(version) for version in self._client.get_registered_model(line).aliases.values()}

    def retire(self, line: str, version: int) -> None:
        """Remove the files behind a version; it stays registered, and says so."""
        self.label(line, version, {STATE: "retired"})
        self.files.remove(line, version)

    def unlabel(self, line: str, version: int) -> None:
        """Say of a version no more that files of it are missing."""
        with self._reached():
            self._client.delete_model_version_tag(line, str(version), STATE)

    def versions(self, line: str) -> list[int]:
        """The numbers of a line's registered versions, ascending."""
        return [version.version for version in self.newer(line, 0)]

    def registered(self, line: str, merge_key: str) -> int | None:
        """The version that carries a merge key; None when there is none."""
        with self._reached():
            found = self._client.search_model_versions(
                f"name = '{quoted(line)}' and tags.`{MERGE_KEY}` = '{merge_key}'"
            )
        return min((int(version.version) for version in found), default=None)

    def published(self, line: str, merge_key: str) -> bool:
        """Whether something is finished under a merge key, registered or not yet."""
        with self._reached():
            return any(str(model.status) == "READY" for model in begun(self._link, line, merge_key))

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
        labels = short({MERGE_KEY: merge_key, "foldin.line": line, **tags})
        with self._reached():
            model = found_or_made(self._link, line, merge_key, run_id, labels)
            if str(model.status) != "READY":
                self.files.upload(model, folder)
                self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
                self._client.finalize_logged_model(model.model_id, "READY")
            labels = {
                key: model.tags.get(key, value) for key, value in labels.items()
            }  # an earlier run's, if it got here
            now = int(time.time() * 1000)
            measured = [Metric(key, value, now, 0, model_id=model.model_id) for key, value in metrics.items()]
            self._client.log_batch(run_id, metrics=measured)
            ensure(self._link, line)
            version = self._client.create_model_version(
                line, f"models:/{model.model_id}", run_id, labels, description=description, model_id=model.model_id
            )
        return int(version.version)

    def register_expert(self, model: str, folder: Path, extra: Iterable[Path], tags: Mapping[str, str]) -> int:
        """Register a folder, and single files beside it, as the next version of a watched model; returns its number."""
        experiment = self._link.experiment(model)
        with self._reached():
            ensure(self._link, model)
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
        return self.files.single(line, version, SIGNATURE, folder)

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
                if missing(error) or error.error_code == "INVALID_PARAMETER_VALUE":
                    return None
                raise
