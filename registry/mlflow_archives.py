"""Archived experts in MLflow: beside the history of their line, each under the digest of its manifest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from registry.files import verify_manifest
from registry.mlflow_files import Files
from registry.mlflow_link import Link
from registry.mlflow_runs import Runs
from registry.records import FoldinError

FOLDER = "archives"  # of the run that keeps a line's history


class Archives:
    """Folders that are kept whole, and brought back."""

    def __init__(self, link: Link, files: Files, runs: Runs) -> None:
        self._link, self._files, self._runs = link, files, runs

    def keep(self, line: str, folder: Path, manifest_sha256: str) -> None:
        """Upload a folder and read it back. Until somebody writes its name down, nobody asks for it.

        Raises:
            FoldinError: E_MLFLOW when it did not arrive whole.
        """
        run = self._runs.history_run(line).info.run_id
        with self._link.reached():
            self._link.client.log_artifacts(run, str(folder), f"{FOLDER}/{manifest_sha256}")
        with self.opened(line, manifest_sha256) as stored:
            wrong = verify_manifest(stored)
        if wrong:
            raise FoldinError(replace(wrong[0], code="E_MLFLOW", what="what was uploaded did not arrive whole"))

    @contextmanager
    def opened(self, line: str, manifest_sha256: str) -> Iterator[Path]:
        """The local folder of an archive while the block runs; to be verified before use.

        Raises:
            FoldinError: E_SOURCE when there is nothing.
        """
        uri = f"{self._runs.history_run(line).info.artifact_uri}/{FOLDER}/{manifest_sha256}"
        with self._files.brought(uri, f"archive {manifest_sha256[:12]} of line {line}", manifest_sha256) as folder:
            yield folder
