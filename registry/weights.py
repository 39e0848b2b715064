"""Checkpoints: read lazily, written whole or not at all, known by the digest of what they contain. Only safetensors."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from registry.far import Far, far_files
from registry.files import Place
from registry.headers import Span, read_folder, read_header, start_digest
from registry.ranged import expect_span, read_span
from registry.records import TensorSpec

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
UNOPENED = "unable to open file"  # how torch begins when the system opens none
SPELLING = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """Where one tensor of a checkpoint lies."""

    file: str
    name: str  # its name in that file, whatever the view calls it
    spec: TensorSpec
    begin: int  # first byte in the file
    end: int

    @property
    def bytes(self) -> int:
        """How many it takes there."""
        return self.end - self.begin


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one safetensors checkpoint by name; names, shapes and dtypes are known before any data is read.

    Every read gives a new tensor on the CPU, which the caller may change. Views (`prefixed`, `renamed`, `only`) share
    the files and read nothing.
    """

    folder: Path
    where: str  # names the checkpoint in messages
    stored: Mapping[str, Stored]  # name -> place, in file order
    far: Mapping[str, Far] = field(default_factory=dict)  # files that lie in a store, not in the folder

    @classmethod
    def open(cls, folder: Path, where: str = "") -> "Checkpoint":
        """The checkpoint in `folder`: one *.safetensors, or shards with an index. Every header is checked first.

        Raises:
            FoldinError: E_FORMAT, E_HEADER, E_DTYPE, E_PATH, E_FILETYPE or E_UNREACHABLE, as `headers.read_folder`.
        """
        headers = read_folder(folder, where)
        stored = {name: _stored(file, span) for file, spans in headers.items() for name, span in spans.items()}
        return cls(folder, where, stored, far_files(folder))

    @classmethod
    def open_file(cls, path: Path, where: str = "") -> "Checkpoint":
        """The tensors of one safetensors file, whatever lies beside it. Raises like `open`."""
        stored = {name: _stored(path.name, span) for name, span in read_header(path, where).items()}
        return cls(path.parent, where, stored, far_files(path.parent))

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
        """Read one tensor. Raises KeyError for an unknown name, FoldinError E_FORMAT where the file has changed.

        An OSError (too many open files, a disk that fails) says nothing against the file, and comes out as one.
        """
        file, stored_name, spec, *_ = self.stored[name]
        place = Place(self.where, file, "restore the file, then run again")
        if file in self.far:
            return _read_far(self.far[file], self.stored[name], place)
        try:
            tensor = _read(self.folder / file, stored_name)
        except (SafetensorError, FileNotFoundError) as error:
            what = "the tensor cannot be read any more"
            raise place.refuse("E_FORMAT", what, found=str(error), tensor=name) from error
        check_spec(tensor, spec, place, name)
        return tensor

    def expect(self, name: str) -> None:
        """Tell the system that a tensor is read soon, so that it comes from the disk while something is computed."""
        place = self.stored[name]
        if place.file in self.far:
            far = self.far[place.file]
            expect_span(far, place.begin, place.end, far.tensors.get(place.name, ""))
            return
        with suppress(OSError):  # a hint; whether the file can be read shows when it is
            descriptor = os.open(self.folder / place.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, place.begin, place.end - place.begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

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
        return replace(self, stored=stored)

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
        return replace(self, stored=kept)


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a file; FileNotFoundError only where there is no such file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor
    except FileNotFoundError as error:  # safetensors says so whatever the system said
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        raise OSError(*error.args) from error
    except RuntimeError as error:  # of torch, which opens the file once more
        if UNOPENED not in str(error):
            raise
        raise OSError(*error.args) from error


def _read_far(far: Far, stored: Stored, place: Place) -> Tensor:
    """One tensor of a file in a store, compared with the digest that it had when the file was seen first."""
    expected = far.tensors.get(stored.name, "")
    content = read_span(far, stored.begin, stored.end, expected, start_digest(stored.spec))
    if content is None:
        raise place.refuse("E_DIGEST", "the tensor's bytes are others than before", expected[:12], tensor=stored.name)
    dtype = DTYPES[stored.spec.dtype]
    return (torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)).reshape(
        stored.spec.shape
    )


def _stored(file: str, span: Span) -> Stored:
    return Stored(file, span.name, span.spec, span.begin, span.end)


def spec_of(tensor: Tensor) -> TensorSpec:
    """The dtype and shape of a tensor as a header says it; an unsupported dtype keeps torch's spelling."""
    return TensorSpec(SPELLING.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 over a tensor's dtype, shape and little-endian bytes; where it is stored does not matter."""
    digest = start_digest(spec_of(tensor))
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


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


def check_spec(tensor: Tensor, spec: TensorSpec, place: Place, name: str) -> None:
    """Nothing, when a tensor has the dtype and shape that its header says; else raises FoldinError E_SCHEMA."""
    found = spec_of(tensor)
    if found != spec:
        expected, given = (f"{dtype} {list(shape)}" for dtype, shape in (spec, found))
        raise place.refuse("E_SCHEMA", "the tensor is not what its spec says", expected, given, name)


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy where it lies so in CPU memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
