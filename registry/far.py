"""Weights that stay in an S3-compatible store: a local folder with everything else, and a list of what is far.

The list lies beside the folder, `downloads/versions/demo/3` and `downloads/versions/demo/3.far.json`, and is believed
only below folders of foldin's own (`trust`), where nothing that comes from a stranger can be put. A far file is known
by its etag, which every request names, and by SHA-256: of the whole, and of each tensor, taken in one pass when the
file is first seen. So it is read whole once, and after that by tensors (`registry.ranged`); no copy of it is made here.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from registry.files import CHUNK, Place, open_regular, read_json, shown, walk, write_json
from registry.records import FoldinError
from registry.stored import Object

if TYPE_CHECKING:
    from registry.headers import Span
    from registry.objects import Objects

SUFFIX = ".far.json"
TENSORS = "foldin/tensors.json"  # of a version: file -> its SHA-256, and tensor -> digest
SMALL = 2**20  # bytes; what is smaller is brought here, weights or not
NOTHING_HERE: Mapping[str, Object] = MappingProxyType({})
_trusted: set[Path] = set()


class Far(NamedTuple):
    """One file of a checkpoint that is not here."""

    uri: str
    size: int  # bytes
    etag: str
    sha256: str  # of the whole file
    tensors: Mapping[str, str]  # name in the file -> `tensor_sha256`

    @property
    def stored(self) -> Object:
        """What to ask the store for."""
        return Object(self.uri, self.size, self.etag)


@cache
def store() -> "Objects":
    """The store that the environment names, AWS_ENDPOINT_URL_S3 or Amazon's own; one for this process."""
    from registry.objects import Objects

    return Objects()


def trust(folder: Path) -> None:
    """Believe the lists below a folder of foldin's own; beside any other folder a stranger may have put one."""
    _trusted.add(folder.absolute())


def far_files(folder: Path) -> dict[str, Far]:
    """Path below the folder -> what is far of it; {} where everything is here."""
    if _trusted.isdisjoint(folder.absolute().parents):
        return {}
    for root in (folder, *folder.parents[:2]):
        path = _list_of(root)
        if path.is_file():
            below = "" if root == folder else f"{folder.relative_to(root).as_posix()}/"
            found = read_json(path)["far"].items()
            return {name.removeprefix(below): Far(*facts) for name, facts in found if name.startswith(below)}
    return {}


def names_in(folder: Path, where: str = "") -> list[str]:
    """Every file of a folder, here or far; raises as `files.walk`."""
    return sorted({*(name for name, _ in walk(folder, where)), *far_files(folder)})


def is_mirror(folder: Path) -> bool:
    """Whether a folder is one that `mirror` made, or began to make."""
    return _list_of(folder).is_file()


def note_far(folder: Path, files: Mapping[str, Far], here: Mapping[str, Object] = NOTHING_HERE) -> None:
    """Write the list of what is far of a folder, and of what was brought here; none, where nothing is far."""
    if files:
        write_json(_list_of(folder), {"far": {name: list(each) for name, each in files.items()}, "here": dict(here)})
    else:
        _list_of(folder).unlink(missing_ok=True)


def _list_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{SUFFIX}")


def mirror(uri: str, folder: Path, seen: Path, *, ours: bool = False) -> None:
    """Make a folder hold what lies below a URI now: small files are brought here, the others listed as far.

    Args:
        uri: of a folder in the store.
        folder: where it shall be; what is in it already and still has its etag stays.
        seen: folder with the digests of far files that were read before, by whatever name.
        ours: foldin wrote the folder, so its own list of digests is believed, and what is far not read whole; each
            tensor is compared with its digest when it is read.

    Raises:
        FoldinError: as `Objects.below` and `Objects.download`; E_PATH for a name that only foldin's lists may have.
    """
    found, kept = store().below(uri), _brought(folder)
    for name in found:
        if name.endswith(SUFFIX):
            place = Place(uri, shown(name), "rename the object")
            raise place.refuse("E_PATH", "the name is kept for foldin's own lists")
    large = {name: each for name, each in found.items() if _stays(name) and each.size >= SMALL}
    here = {name: each for name, each in found.items() if name not in large}
    folder.mkdir(parents=True, exist_ok=True)
    if not _list_of(folder).is_file():
        write_json(_list_of(folder), {"far": {}, "here": {}})  # from now on it is a mirror, whole or not
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in here and not path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)
    for name, each in here.items():
        if kept.get(name) != each or not (folder / name).is_file():
            store().download(each, folder / name)
    for name in large:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    told = read_json(folder / TENSORS) if ours and TENSORS in here else {}
    far = {name: Far(*each, *told[name]) if name in told else _digested(each, seen) for name, each in large.items()}
    write_json(_list_of(folder), {"far": {name: list(each) for name, each in far.items()}, "here": here})


def kept_at(far: Far, prefix: str) -> Far:
    """The same file under a name made of its digest, copied by its store unless it is there already."""
    uri = f"{prefix.rstrip('/')}/{far.sha256[:2]}/{far.sha256}.safetensors"
    there = store().head(uri)
    if there is None or there.size != far.size:
        there = store().copy(far.stored, uri)
    return far._replace(uri=uri, etag=there.etag)


def _stays(name: str) -> bool:
    """Whether a large file may stay in the store; heads are copied from version to version, so they are brought."""
    return name.endswith(".safetensors") and not name.startswith("heads/")


def _brought(folder: Path) -> dict[str, Object]:
    path = _list_of(folder)
    return {name: Object(*each) for name, each in read_json(path)["here"].items()} if path.is_file() else {}


def _digested(found: Object, seen: Path) -> Far:
    """The digests of a stored file, taken once for each content of it."""
    note = seen / f"{hashlib.sha256(repr(found).encode()).hexdigest()}.json"
    if not note.is_file():
        from registry.headers import read_far_header

        write_json(note, {"far": Far(*found, *digests(partial(read_far_header, found), store().stream(found)))})
    return Far(*read_json(note)["far"])


def look_again(folder: Path, seen: Path) -> None:
    """Read every far file of a folder whole that was not read whole before, and list it by what it is.

    For those who must know now, not when a tensor is read: a rollback, a doctor.
    """
    far = {name: _digested(each.stored, seen) for name, each in far_files(folder).items()}
    if far:
        note_far(folder, far, _brought(folder))


def write_digests(folder: Path) -> None:
    """Write what readers of the stored folder need to know of its weights, so that they need not read all of them."""
    from registry.headers import read_header

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if path.stat().st_size >= SMALL:
            with open_regular(path) as file:
                pieces = iter(partial(file.read, CHUNK), b"")
                found[path.relative_to(folder).as_posix()] = digests(partial(read_header, path), pieces)
    if found:
        write_json(folder / TENSORS, found)


def digests(
    header: "Callable[[], Mapping[str, Span]]", pieces: Iterable[bytes | bytearray]
) -> tuple[str, dict[str, str]]:
    """SHA-256 of a file that passes by in pieces, and tensor name -> `tensor_sha256`.

    One whose header is no safetensors header has no tensors here; whoever opens it is told.
    """
    from registry.headers import start_digest

    try:
        spans = sorted(header().values())
    except FoldinError:
        spans = []
    waiting, done = deque((span, start_digest(span.spec)) for span in spans), dict[str, str]()
    whole, at = hashlib.sha256(), 0
    for piece in pieces:
        whole.update(piece)
        end = at + len(piece)
        while waiting and waiting[0][0].begin < end:
            span, digest = waiting[0]
            digest.update(memoryview(piece)[max(span.begin - at, 0) : span.end - at])
            if span.end > end:
                break
            done[span.name] = digest.hexdigest()
            waiting.popleft()
        at = end
    done |= {span.name: digest.hexdigest() for span, digest in waiting if span.begin == span.end}
    return whole.hexdigest(), done
