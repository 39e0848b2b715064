"""Checkpoints written whole or not at all, one tensor in memory at a time, known by digest while they stream."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from registry.files import Place, canonical_json, replacing, write_atomic
from registry.headers import BYTES, PART, SHARD, check_header
from registry.records import TensorSpec
from registry.weights import DTYPES, check_spec, raw_bytes

INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """One tensor on its way into a file, or the next piece of it in the order of its bytes."""

    name: str
    tensor: Tensor


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


def write_part(
    path: Path,
    specs: Mapping[str, TensorSpec],  # in file order
    entries: Iterable[Entry],
    durable: bool = True,  # as `files.replacing`
) -> str:
    """Write one file of a checkpoint whose other files and index are written apart; the SHA-256 of its bytes.

    A tensor may come in pieces, so that none is ever whole in memory. Raises as `write_stream`.
    """
    stream, place = iter(entries), Place(str(path.parent), path.name)
    with replacing(path, durable) as target:
        digest = _write_pieces(target, specs, stream, place)
        _check_end(stream, place)
    return digest


def write_stream(
    folder: Path, specs: Mapping[str, TensorSpec], entries: Iterable[Entry], *, layout: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Write a checkpoint whose tensors come in the layout's order, in pieces; file name -> SHA-256 of its bytes.

    Raises:
        FoldinError: E_SCHEMA for a tensor that is not due, or unlike its spec, or a layout unlike the specs; E_DISK.
    """
    stream, files = iter(entries), {}
    with _opening(folder, specs, layout) as opened:
        for file, names in layout.items():
            chosen = {name: specs[name] for name in names}
            files[file] = _write_pieces(opened(file), chosen, stream, Place(str(folder), file))
        _check_end(stream, Place(str(folder), ""))
    return files


def write_index(folder: Path, specs: Mapping[str, TensorSpec], layout: Mapping[str, Sequence[str]]) -> None:
    """Write the index over files that are there; a checkpoint in parts is whole once it has its name."""
    _check_layout(folder, specs, layout)
    write_atomic(folder / INDEX, _index(specs, layout))


def write_checkpoint(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Callable[[str], Tensor],  # by name
    *,
    layout: Mapping[str, Sequence[str]],  # file name -> tensor names in file order; each tensor in one file
) -> dict[str, str]:
    """Write a checkpoint, holding one tensor at a time; with several files the index gets its name last.

    The same tensors and layout give the same bytes. Nothing stays behind when something goes wrong.

    Returns:
        File name -> SHA-256 of its bytes.

    Raises:
        FoldinError: E_SCHEMA for a tensor unlike its spec or a layout unlike the specs, E_DISK, or as `check_header`.
    """

    def entry(name: str, file: str) -> Entry:
        tensor = tensors(name)
        check_spec(tensor, specs[name], Place(str(folder), file), name)
        return Entry(name, tensor)

    return write_stream(
        folder, specs, (entry(name, file) for file, names in layout.items() for name in names), layout=layout
    )


@contextmanager
def _opening(
    folder: Path, specs: Mapping[str, TensorSpec], layout: Mapping[str, Sequence[str]]
) -> Iterator[Callable[[str], BinaryIO]]:
    """Opens files of a layout for writing; all get their names when the block ends well, the index last."""
    _check_layout(folder, specs, layout)
    with ExitStack() as stack:
        if len(layout) > 1 or any(PART.fullmatch(file) for file in layout):  # entered first, so it is renamed last
            stack.enter_context(replacing(folder / INDEX)).write(_index(specs, layout))
        yield lambda file: stack.enter_context(replacing(folder / file))


def _write_pieces(
    target: BinaryIO, specs: Mapping[str, TensorSpec], entries: Iterator[Entry], place: Place
) -> str:  # specs: in file order
    header = _header(specs, place)
    whole = hashlib.sha256(header)
    target.write(header)
    for name, spec in specs.items():
        missing, begun = _size(spec), False
        while missing or not begun:
            given, tensor = next(entries, Entry("no more tensors", torch.empty(0)))
            raw, begun = raw_bytes(tensor), True
            if given != name or tensor.dtype != DTYPES[spec.dtype] or len(raw) > missing:
                at = Place(place.where, place.file, "give the tensors in the layout's order")
                raise at.refuse("E_SCHEMA", "another tensor is due", name, given, name)
            target.write(raw)
            whole.update(raw)
            missing -= len(raw)
            del tensor, raw  # before the next one is made
    return whole.hexdigest()


def _check_end(entries: Iterator[Entry], place: Place) -> None:
    """Nothing, when no tensor is left; asking also lets the source finish what it does after its last piece."""
    extra = next(entries, None)
    if extra is not None:
        at = Place(place.where, place.file, "give the tensors in the layout's order")
        raise at.refuse("E_SCHEMA", "there are more tensors than the layout has", tensor=extra.name)


def _header(specs: Mapping[str, TensorSpec], place: Place) -> bytes:
    """The length and the header, padded with spaces to 8 bytes; held to the same rules as a header that is read."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + _size(spec)
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    check_header(text, end, place)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(specs: Mapping[str, TensorSpec], layout: Mapping[str, Sequence[str]]) -> bytes:
    """The index of a checkpoint in several files, as transformers reads it."""
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


def _size(spec: TensorSpec) -> int:
    """Bytes of a tensor's data."""
    return prod(spec.shape) * BYTES[spec.dtype]
