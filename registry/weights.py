"""Checkpoints: read lazily, written whole or not at all, known by the digest of what they contain. Only safetensors."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from registry.files import Place, canonical_json, replacing
from registry.headers import BYTES, PART, SHARD, check_header, read_folder, read_header
from registry.records import TensorSpec

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """Where one tensor of a checkpoint lies."""

    file: str
    name: str  # its name in that file, whatever the view calls it
    spec: TensorSpec


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one safetensors checkpoint by name; names, shapes and dtypes are known before any data is read.

    Every read gives a new tensor on the CPU, which the caller may change. Views (`prefixed`, `renamed`, `only`) share
    the files and read nothing.
    """

    folder: Path
    where: str  # names the checkpoint in messages
    stored: Mapping[str, Stored]  # name -> place, in file order

    @classmethod
    def open(cls, folder: Path, where: str = "") -> "Checkpoint":
        """The checkpoint in `folder`: one *.safetensors, or shards with an index. Every header is checked first.

        Raises:
            FoldinError: E_FORMAT, E_HEADER, E_DTYPE, E_PATH, E_FILETYPE or E_UNREACHABLE, as `headers.read_folder`.
        """
        headers = read_folder(folder, where)
        stored = {name: Stored(file, name, spec) for file, specs in headers.items() for name, spec in specs.items()}
        return cls(folder, where, MappingProxyType(stored))

    @classmethod
    def open_file(cls, path: Path, where: str = "") -> "Checkpoint":
        """The tensors of one safetensors file, whatever lies beside it. Raises like `open`."""
        stored = {name: Stored(path.name, name, spec) for name, spec in read_header(path, where).items()}
        return cls(path.parent, where, MappingProxyType(stored))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Tensor name -> dtype and shape, sorted by name."""
        return {name: self.stored[name].spec for name in self}

    @property
    def layout(self) -> Mapping[str, tuple[str, ...]]:
        """File name -> the names of its tensors, in file order; what `write_checkpoint` takes."""
        files: dict[str, list[str]] = {}
        for name, place in self.stored.items():
            files.setdefault(place.file, []).append(name)
        return {file: tuple(names) for file, names in files.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor. Raises KeyError for an unknown name, FoldinError E_FORMAT where the file has changed."""
        file, stored_name, spec = self.stored[name]
        place = Place(self.where, file, "restore the file, then run again")
        try:
            with safe_open(self.folder / file, framework="pt", device="cpu") as tensors:
                tensor: Tensor = tensors.get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise place.refuse(
                "E_FORMAT", "the tensor cannot be read any more", found=str(error), tensor=name
            ) from error
        _check_spec(tensor, spec, place, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(sorted(self.stored))

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; reads nothing."""
        return name in self.stored

    def renamed(self, rename: Callable[[str], str]) -> "Checkpoint":
        """A view under new names. Raises FoldinError E_SCHEMA where two tensors would get one name."""
        stored: dict[str, Stored] = {}
        for name, place in self.stored.items():
            if rename(name) in stored:
                what = f"renaming gives it the name of another tensor, {rename(name)}"
                raise Place(self.where, place.file, "rename one of the two").refuse("E_SCHEMA", what, tensor=name)
            stored[rename(name)] = place
        return Checkpoint(self.folder, self.where, MappingProxyType(stored))

    def prefixed(self, prefix: str) -> "Checkpoint":
        """A view without `prefix`: "vit.layers.0.x" becomes "layers.0.x"; names without the prefix stay as they are."""
        return self.renamed(lambda name: name.removeprefix(prefix))

    def only(self, names: Iterable[str]) -> "Checkpoint":
        """A view of these tensors. Raises FoldinError E_SCHEMA for a name that the checkpoint lacks."""
        wanted = set(names)
        for name in sorted(wanted - self.stored.keys()):
            place = Place(self.where, str(self.folder), "ask for names that the checkpoint has")
            raise place.refuse("E_SCHEMA", "the checkpoint lacks this tensor", tensor=name)
        kept = {name: place for name, place in self.stored.items() if name in wanted}
        return Checkpoint(self.folder, self.where, MappingProxyType(kept))


class Written(NamedTuple):
    """What was written, by digest (SHA-256, 64 hex digits)."""

    files: dict[str, str]  # file name -> digest of its bytes
    tensors: dict[str, str]  # tensor name -> digest of its dtype, shape and bytes
    sha256: str  # the checkpoint's content digest


def spec_of(tensor: Tensor) -> TensorSpec:
    """The dtype and shape of a tensor as a header says it; an unsupported dtype keeps torch's spelling."""
    return TensorSpec(SPELLING.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 over a tensor's dtype, shape and little-endian bytes; where it is stored does not matter."""
    return _digest(spec_of(tensor), _raw(tensor))


def content_sha256(
    tensors: Mapping[str, Tensor],
    names: Iterable[str] | None = None,  # None: all
    visit: Callable[[str, Tensor], None] = lambda name, tensor: None,
) -> tuple[str, dict[str, str]]:
    """(content digest, tensor name -> digest): equal for equal tensors under equal names, however they are sharded.

    Each tensor is read once and shown to `visit` before it is dropped, so that other checks need no second pass.
    """
    digests = {name: _visited(tensors, name, visit) for name in sorted(tensors if names is None else names)}
    return combined_sha256(digests), digests


def _visited(tensors: Mapping[str, Tensor], name: str, visit: Callable[[str, Tensor], None]) -> str:
    tensor = tensors[name]
    visit(name, tensor)
    return tensor_sha256(tensor)


def combined_sha256(digests: Mapping[str, str]) -> str:
    """The content digest made of per-tensor digests: SHA-256 over the JSON list of [name, digest], sorted by name."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def plan_layout(specs: Mapping[str, TensorSpec], max_bytes: int = 5 * 10**9) -> dict[str, tuple[str, ...]]:
    """File name -> tensor names, for a checkpoint that follows no other's layout: shards of at most `max_bytes` each.

    A larger tensor gets a shard of its own. Wide dtypes come first in a shard, so that every tensor is aligned.
    """
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name in sorted(specs):
        size = _size(specs[name])
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    ordered = (tuple(sorted(shard, key=lambda name: (-BYTES[specs[name].dtype], name))) for shard in shards)
    return dict(zip(files, ordered, strict=True))


def write_checkpoint(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Callable[[str], Tensor] | Iterable[tuple[str, Tensor]],  # by name, or in the layout's order
    *,
    layout: Mapping[str, Sequence[str]],  # file name -> tensor names in file order; each tensor in one file
    metadata: Mapping[str, str] | None = None,  # None: {"format": "pt"}, which transformers asks for
) -> Written:
    """Write a checkpoint, holding one tensor at a time; with several files the index gets its name last.

    The same tensors, layout and metadata give the same bytes. Nothing stays behind when something goes wrong.

    Raises:
        FoldinError: E_SCHEMA for a tensor unlike its spec or a layout unlike the specs, E_DISK, or as `check_header`.
    """
    _check_layout(folder, specs, layout)
    fetch = tensors if callable(tensors) else _in_order(tensors, str(folder))
    text = {"format": "pt"} if metadata is None else metadata
    files: dict[str, str] = {}
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        if len(layout) > 1 or any(PART.fullmatch(file) for file in layout):  # entered first, so it is renamed last
            stack.enter_context(replacing(folder / INDEX)).write(_index(specs, layout))
        for file, names in layout.items():
            target = stack.enter_context(replacing(folder / file))
            place = Place(str(folder), file)
            chosen = {name: specs[name] for name in names}
            files[file] = _write_file(target, chosen, fetch, text, place, digests)
    return Written(files, digests, combined_sha256(digests))


def _write_file(
    target: BinaryIO,
    specs: Mapping[str, TensorSpec],  # in file order
    fetch: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    place: Place,
    digests: dict[str, str],  # gets the tensors' digests
) -> str:
    header = _header(specs, metadata, place)
    whole = hashlib.sha256(header)
    target.write(header)

    def put(name: str, spec: TensorSpec) -> None:  # a function, so that a tensor is dropped before the next is made
        tensor = fetch(name)
        _check_spec(tensor, spec, place, name)
        raw = _raw(tensor)
        target.write(raw)
        whole.update(raw)
        digests[name] = _digest(spec, raw)

    for name, spec in specs.items():
        put(name, spec)
    return whole.hexdigest()


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], place: Place) -> bytes:
    """The length and the header, padded with spaces to 8 bytes; held to the same rules as a header that is read."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + _size(spec)
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    check_header(text, end, place)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(specs: Mapping[str, TensorSpec], layout: Mapping[str, Sequence[str]]) -> bytes:
    total = sum(_size(spec) for spec in specs.values())
    weight_map = {name: file for file, names in layout.items() for name in names}
    return canonical_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _check_layout(folder: Path, specs: Mapping[str, TensorSpec], layout: Mapping[str, Sequence[str]]) -> None:
    """Every tensor in exactly one plainly named file."""
    homes: dict[str, str] = {}
    for file, names in layout.items():
        place = Place(str(folder), file, "correct the layout")
        if not SHARD.fullmatch(file):
            raise place.refuse("E_PATH", "the layout names no plain file", "name.safetensors")
        for name in names:
            if name in homes or name not in specs:
                expected = "one file" if name in homes else "only tensors that have a spec"
                raise place.refuse("E_SCHEMA", "the layout misplaces a tensor", expected, tensor=name)
            if specs[name].dtype not in BYTES:
                raise place.refuse("E_DTYPE", "the dtype is not supported", ", ".join(BYTES), specs[name].dtype, name)
            homes[name] = file
    for name in sorted(specs.keys() - homes.keys()):
        raise Place(str(folder), "", "correct the layout").refuse("E_SCHEMA", "the layout lacks a tensor", tensor=name)


def _in_order(pairs: Iterable[tuple[str, Tensor]], where: str) -> Callable[[str], Tensor]:
    """Take the tensors as they come, as long as they come in the order that is asked for."""
    stream = iter(pairs)

    def fetch(name: str) -> Tensor:
        given, tensor = next(stream, ("no more tensors", None))
        if given != name or tensor is None:
            place = Place(where, "", "give the tensors in the layout's order")
            raise place.refuse("E_SCHEMA", "another tensor is due", name, given, name)
        return tensor

    return fetch


def _check_spec(tensor: Tensor, spec: TensorSpec, place: Place, name: str) -> None:
    found = spec_of(tensor)
    if found != spec:
        expected, given = (f"{dtype} {list(shape)}" for dtype, shape in (spec, found))
        raise place.refuse("E_SCHEMA", "the tensor is not what its spec says", expected, given, name)


def _size(spec: TensorSpec) -> int:
    return prod(spec.shape) * BYTES[spec.dtype]


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy where it lies so in CPU memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(spec: TensorSpec, raw: memoryview) -> str:
    digest = hashlib.sha256(f"{spec.dtype} {list(spec.shape)}\n".encode())
    digest.update(raw)
    return digest.hexdigest()
