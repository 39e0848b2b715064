"""The files behind registered versions: where they lie, brought here when they are elsewhere, uploaded whole."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlparse

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from registry.far import is_mirror, look_again, mirror, note_far, store
from registry.files import shown, sweep
from registry.manifests import MANIFEST, verify_manifest
from registry.mlflow_link import Link, missing, unreachable
from registry.records import DAY, FoldinError, Refusal


class Files:
    """Artifacts as local folders."""

    def __init__(self, link: Link, cache: Path) -> None:
        """Downloads go to `cache`."""
        self._link, self._cache = link, cache

    def expert(self, model: str, version: int) -> Path:
        """The local folder of an expert's artifacts; downloaded afresh when they are not on this machine.

        Raises:
            FoldinError: E_SOURCE when there is nothing at the source.
        """
        return self._behind(model, version, self._cache / "experts" / model / str(version))

    def version(self, line: str, version: int, *, fresh: bool = False) -> Path:
        """The local folder with one version's artifacts, downloaded once, or `fresh` again. Raises as `expert`."""
        known = self._cache / "versions" / line / str(version)
        whole = known.is_dir() and not is_mirror(known)
        return known if whole and not fresh else self._behind(line, version, known, ours=True)

    @contextmanager
    def brought(self, uri: str, where: str, name: str) -> Iterator[Path]:
        """The local folder behind an artifact URI while the block runs; what was downloaded for it then goes."""
        with self.scratch() as scratch:
            with self._link.reached():
                folder = self._local(uri, where, scratch / name)
            yield folder

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder while the block runs; what a process that was killed in there left goes a day later."""
        root = self._cache / "brought"
        root.mkdir(parents=True, exist_ok=True)
        sweep(root, age=DAY)
        with TemporaryDirectory(dir=root, prefix=".", suffix=".tmp") as folder:
            yield Path(folder)

    def look_again(self, folder: Path) -> None:
        """Read whatever is far of a version's folder whole, as `far.look_again`."""
        with self._link.reached():
            look_again(folder, self._cache / "seen")

    def single(self, line: str, version: int, name: str, folder: Path) -> Path | None:
        """One file of a version as it is stored now, downloaded into a folder; None when there is none."""
        with self._link.reached():
            artifacts = get_artifact_repository(self._uri(line, version))
            if all(each.path != name for each in artifacts.list_artifacts(name.rpartition("/")[0] or None)):
                return None
            return Path(artifacts.download_artifacts(name, str(folder)))

    def there(self, line: str, version: int) -> bool:
        """Whether anything lies behind a version."""
        with self._link.reached():
            return bool(get_artifact_repository(self._uri(line, version)).list_artifacts())

    def names(self, line: str, version: int) -> set[str]:
        """What lies directly behind a version, by its listing: files and folders."""
        with self._link.reached():
            return {each.path for each in get_artifact_repository(self._uri(line, version)).list_artifacts()}

    def sizes(self, line: str, version: int) -> dict[str, int]:
        """Path -> bytes of what lies behind a version, by its listing; {} when there is nothing."""
        with self._link.reached():
            artifacts = get_artifact_repository(self._uri(line, version))
            folders, found = [""], dict[str, int]()
            while folders:
                for each in artifacts.list_artifacts(folders.pop() or None):
                    folders += [each.path] if each.is_dir else []
                    found |= {} if each.is_dir else {each.path: each.file_size or 0}
            return found

    def remove(self, line: str, version: int) -> None:
        """Remove what lies behind a version, and what was brought here of it."""
        with self._link.reached():
            get_artifact_repository(self._uri(line, version)).delete_artifacts()
        self.forget(line, version)

    def drop(self, line: str, version: int, names: Iterable[str]) -> None:
        """Remove some of the files behind a version, and what was brought here of it; what is gone already is well."""
        with self._link.reached():
            uri = self._uri(line, version)
            for name in names:
                if uri.startswith("s3://"):
                    store().remove(f"{uri}/{name}")
                else:
                    get_artifact_repository(uri).delete_artifacts(name)
        self.forget(line, version)

    def put(self, line: str, version: int, folder: Path, names: Iterable[str]) -> None:
        """Upload some of a version's files to where they were."""
        with self._link.reached():
            source = self._link.client.get_model_version(line, str(version)).source
            model = self._link.client.get_logged_model(source.removeprefix("models:/"))
            for name in names:
                self._send(model, folder / name, name)
        self.forget(line, version)

    def forget(self, line: str, version: int) -> None:
        """Remove what was brought here of a version; it is brought again when somebody asks."""
        known = self._cache / "versions" / line / str(version)
        shutil.rmtree(known, ignore_errors=True)
        note_far(known, {})

    def upload(self, model: LoggedModel, folder: Path) -> None:
        """Every file, the manifest last: a version without one was never finished. Then all of it is read back."""
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in sorted(files, key=lambda name: name == MANIFEST):
            self._send(model, folder / name, name)
        stored = self._local(model.artifact_location, model.model_id, self._cache / "read-back" / model.model_id)
        wrong = verify_manifest(stored)
        if stored.is_relative_to(self._cache):
            shutil.rmtree(stored)
            note_far(stored, {})
        if wrong:
            raise FoldinError(replace(wrong[0], code="E_MLFLOW", what="what was uploaded did not arrive whole"))

    def _send(self, model: LoggedModel, path: Path, name: str) -> None:
        """One file to its place; of the manifest nothing that is there already is replaced."""
        if model.artifact_location.startswith("s3://"):
            uri = f"{model.artifact_location}/{name}"
            store().create(uri, path.read_bytes()) if name == MANIFEST else store().upload(path, uri)
            return
        within = name.rpartition("/")[0] or None
        self._link.client.log_model_artifact(model.model_id, str(path), within)

    def _uri(self, model: str, version: int) -> str:
        """Where a version's files are. MLflow's own way to ask reads every version of the registered model first."""
        client = self._link.client
        source = client.get_model_version(model, str(version)).source
        try:
            if source.startswith("models:/m-"):
                return str(client.get_logged_model(source.removeprefix("models:/")).artifact_location)
        except MlflowException as error:
            if not missing(error):
                raise
        return str(client.get_model_version_download_uri(model, str(version)))

    def _behind(self, model: str, version: int, target: Path, *, ours: bool = False) -> Path:
        """The local folder of a version's artifacts: E_SOURCE when they are gone, E_MLFLOW when nobody can be asked."""
        with self._link.reached():
            try:
                uri = self._uri(model, version)
                get_artifact_repository(uri)  # raises for a scheme that nobody serves
                return self._local(uri, f"{model} v{version}", target, ours=ours)
            except MlflowException as error:
                if unreachable(error):
                    raise
                raise FoldinError(_nothing_there(f"{model} v{version}", shown(str(error)))) from error

    def _local(self, uri: str, where: str, target: Path, *, ours: bool = False) -> Path:
        """The folder behind an artifact URI: itself when it is on this machine, else a whole download at `target`."""
        parsed = urlparse(uri)
        if parsed.scheme in {"", "file"}:
            folder = Path(unquote(parsed.path))
            if not folder.is_dir():
                raise FoldinError(_nothing_there(where, uri))
            return folder
        target.parent.mkdir(parents=True, exist_ok=True)
        if parsed.scheme == "s3":
            mirror(uri, target, self._cache / "seen", ours=ours)
            if not any(target.iterdir()):
                raise FoldinError(_nothing_there(where, uri))
            return target
        with TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as scratch:
            get_artifact_repository(uri).download_artifacts("", scratch)
            if not any(Path(scratch).iterdir()):
                raise FoldinError(_nothing_there(where, uri))
            shutil.rmtree(target, ignore_errors=True)
            Path(scratch).rename(target)
        return target


def _nothing_there(where: str, found: str) -> Refusal:
    what = "there are no artifacts at the version's source"
    remedy = "restore them; an expert's can be uploaded and registered as a new version, a line can be rolled back"
    return Refusal("E_SOURCE", what, where, found=found, remedy=remedy)
