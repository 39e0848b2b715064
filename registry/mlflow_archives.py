"""Archived experts in MLflow: beside the history of their line, each under the digest of its manifest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from registry.files import Place, sha256_file
from registry.manifests import MANIFEST, verify_manifest
from registry.mlflow_files import Files
from registry.mlflow_link import Link
from registry.mlflow_runs import Runs
from registry.records import FoldinError, Refusal

FOLDER = "archives"  # of the run that keeps a line's history


class Archives:
    """Folders that are kept whole, and brought back."""

    def __init__(self, link: Link, files: Files, runs: Runs) -> None:
        self._link, self._files, self._runs = link, files, runs

    def keep(self, line: str, folder: Path, manifest_sha256: str) -> str:
        """Upload a folder and read it back; the id of the run that has it. What is there of that name is replaced.

        Until somebody writes its name down, nobody asks for it.

        Raises:
            FoldinError: E_MLFLOW when it did not arrive whole.
        """
        run = str(self._runs.history_run(line).info.run_id)
        with self._link.reached():
            self._link.client.log_artifacts(run, str(folder), f"{FOLDER}/{manifest_sha256}")
        with self.opened(line, manifest_sha256, run) as stored:
            wrong = verify_manifest(stored) or _other_manifest(stored, manifest_sha256)
        if wrong:
            raise FoldinError(replace(wrong[0], code="E_MLFLOW", what="what was uploaded did not arrive whole"))
        return run

    @contextmanager
    def opened(self, line: str, manifest_sha256: str, run: str = "") -> Iterator[Path]:
        """The local folder of an archive while the block runs; to be verified before use.

        Args:
            line: its name.
            manifest_sha256: names the archive.
            run: the id of the run that has it; "" for the one that keeps the line's history.

        Raises:
            FoldinError: E_SOURCE when there is nothing.
        """
        where = f"archive {manifest_sha256[:12]} of line {line}"
        home = self._runs.artifact_uri(run) if run else self._runs.history_run(line).info.artifact_uri
        if home is None:
            what, remedy = "the run that had the archive is gone", "restore the run in MLflow from a backup"
            raise FoldinError(Refusal("E_SOURCE", what, where, found=f"no run {run}", remedy=remedy))
        with self._files.brought(f"{home}/{FOLDER}/{manifest_sha256}", where, manifest_sha256) as folder:
            yield folder


def _other_manifest(folder: Path, manifest_sha256: str) -> list[Refusal]:
    """What is wrong with a folder's manifest, which lists every file but itself."""
    found = sha256_file(folder / MANIFEST)
    if found == manifest_sha256:
        return []
    place = Place(str(folder), MANIFEST, "run it again")
    return [place.refuse("E_DIGEST", "the manifest is another one", manifest_sha256[:12], found[:12]).refusal]
