"""Runs in MLflow: the one that shows a merge, the tries of its search, and the history of a line."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.entities import LoggedModelInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from registry.files import write_atomic
from registry.mlflow_link import MERGE_KEY, NAME_LIMIT, TAG_LIMIT, Link, missing, quoted, short
from registry.records import FoldinError, Refusal

PARENT = "mlflow.parentRunId"
HISTORY = "foldin.history"  # tag: the file that counts, and its SHA-256
HISTORY_OF = "foldin.history_of"


class Runs:
    """What foldin shows in MLflow's runs."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def run_for(self, line: str, merge_key: str, name: str, tags: Mapping[str, str]) -> str:
        """The id of the run that shows one merge, found or created."""
        run = self._found_or_made(line, MERGE_KEY, merge_key, name, {"foldin.line": line, **tags})
        return str(run.info.run_id)

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
        client = self._link.client
        with self._link.reached():
            client.log_batch(
                run_id,
                metrics=[Metric(key, value, 0, 0) for key, value in metrics.items()],
                params=[Param(key, str(value)[:TAG_LIMIT]) for key, value in params.items()],
                tags=[RunTag(key, value) for key, value in short(tags).items()],
            )
            for path, folder in artifacts:
                client.log_artifact(run_id, str(path), folder or None)
            models = [LoggedModelInput(model_id) for model_id in inputs if model_id]
            if models:
                client.log_inputs(run_id, models=models)
            client.set_terminated(run_id, "FINISHED")

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
        client = self._link.client
        with self._link.reached():
            experiment = client.get_run(parent).info.experiment_id
            query = f"tags.`{PARENT}` = '{parent}' and attributes.run_name = '{quoted(name)}'"
            found = client.search_runs([experiment], query, max_results=1)
            run = found[0] if found else client.create_run(experiment, run_name=name, tags={PARENT: parent})
        measured = {key: value for key, value in metrics.items() if not math.isnan(value)}
        self.show(run.info.run_id, params=params, metrics=measured, tags=tags, artifacts=[])

    def artifact(self, run_id: str, name: str, folder: Path) -> Path:
        """One of a run's files, where it lies on this machine, or brought into a folder."""
        with self._link.reached():
            return Path(self._link.client.download_artifacts(run_id, name, str(folder)))

    def artifact_uri(self, run_id: str) -> str | None:
        """Where a run's files lie, also of one that was deleted and can be restored; None when there is no such run."""
        with self._link.reached():
            try:
                return str(self._link.client.get_run(run_id).info.artifact_uri)
            except MlflowException as error:
                if missing(error):
                    return None
                raise

    def keep_history(self, line: str, content: bytes) -> None:
        """Keep a line's history beside its merges; whoever dies in here leaves the last one whole.

        Each has a file named by its digest, and a tag says which one counts; the one before is removed last.
        """
        run, digest = self.history_run(line), hashlib.sha256(content).hexdigest()
        before, _, known = run.data.tags.get(HISTORY, "").partition(" ")
        if known == digest:
            return
        name = f"history-{digest[:16]}.json.gz"
        with self._link.reached(), TemporaryDirectory() as scratch:
            write_atomic(Path(scratch) / name, content)
            self._link.client.log_artifact(run.info.run_id, str(Path(scratch) / name))
            self._link.client.set_tag(run.info.run_id, HISTORY, f"{name} {digest}")
            if before:
                get_artifact_repository(run.info.artifact_uri).delete_artifacts(before)

    def history_sha256(self, line: str) -> str:
        """The digest of what `keep_history` kept last; "" when nothing was kept."""
        return str(self.history_run(line).data.tags.get(HISTORY, "").partition(" ")[2])

    def history(self, line: str) -> bytes:
        """What `keep_history` kept last.

        Raises:
            FoldinError: E_HISTORY when nothing was kept, or it is not what was kept.
        """
        run = self.history_run(line)
        name, _, digest = run.data.tags.get(HISTORY, "").partition(" ")
        where = f"history of line {line} in MLflow"
        with self._link.reached():
            there = {each.path for each in self._link.client.list_artifacts(run.info.run_id)}
        if not digest or name not in there:
            remedy = "restore the ledger from a backup"
            raise FoldinError(Refusal("E_HISTORY", "MLflow keeps no history of the line", where, remedy=remedy))
        with self._link.reached(), TemporaryDirectory() as scratch:
            content = Path(self._link.client.download_artifacts(run.info.run_id, name, scratch)).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            what, remedy = "the history is not the one that was kept", "restore the ledger from a backup"
            raise FoldinError(Refusal("E_HISTORY", what, where, name, "", digest[:12], found[:12], remedy))
        return content

    def history_run(self, line: str) -> Run:
        """The run that keeps what is of the whole line, found or created."""
        return self._found_or_made(line, HISTORY_OF, line, f"{line}: history", {})

    def _found_or_made(self, line: str, tag: str, value: str, name: str, tags: Mapping[str, str]) -> Run:
        """The oldest run of a tag: whoever gives one of their own the same takes nothing away."""
        experiment, client = self._link.experiment(line), self._link.client
        with self._link.reached():
            wanted, oldest = f"tags.`{tag}` = '{value}'", ["attributes.start_time ASC"]
            found = client.search_runs([experiment], wanted, max_results=1, order_by=oldest)
            named = {"run_name": name[:NAME_LIMIT], "tags": short({tag: value, **tags})}
            return found[0] if found else client.create_run(experiment, **named)
