"""What a safetensors checkpoint says of itself, checked before anything is allocated: files, index, headers."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import NamedTuple

from registry.far import far_files
from registry.files import Place, open_regular, parse_json, read_json, shown
from registry.ranged import Reader
from registry.records import SYSTEM_ERRORS, TensorSpec
from registry.stored import Object

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER = 16 * 2**20  # bytes; the format allows 100 MB, real shards need less than 1
MAX_RANK = 16
FIRST = 2**17  # bytes asked of a far file at once; most headers are smaller
SHARD = re.compile(r"\w[\w.-]{0,180}\.safetensors", re.ASCII)
PART = re.compile(r".*-\d{5}-of-\d{5}\.safetensors", re.ASCII)
MAGIC = ((b"PK", "a zip archive"), (b"\x80", "a pickle"), (b"7z\xbc\xaf", "a 7z archive"), (b"\x1f\x8b", "a gzip file"))
RESAVE = "save the weights again with save_pretrained (safetensors), from a model you trust"
RECAST = "register the weights as they were before quantisation, or cast to bfloat16"


class Span(NamedTuple):
    """Where one tensor's bytes lie in its file."""

    begin: int  # bytes from the start of the file
    end: int
    name: str
    spec: TensorSpec


def read_folder(folder: Path, where: str = "") -> dict[str, dict[str, Span]]:
    """File name -> (tensor name -> span, in file order) of the one checkpoint in `folder`; only headers are read.

    A checkpoint is one *.safetensors, or several with an index that agrees with every header.

    Raises:
        FoldinError: E_FORMAT, E_HEADER, E_DTYPE, E_PATH, E_FILETYPE or E_UNREACHABLE, naming the file and, where one is
            at fault, the tensor.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        if error.errno in SYSTEM_ERRORS:
            raise
        place = Place(where, shown(folder.name), "check the path")
        raise place.refuse("E_UNREACHABLE", "the folder cannot be read", found=error.strerror or "") from error
    far = far_files(folder)
    files = sorted({*(name for name in names if name.endswith(".safetensors")), *(n for n in far if "/" not in n)})
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if indexes:
        return _read_sharded(folder, files, indexes, where)
    if len(files) != 1 or PART.fullmatch(files[0]):
        found = shown(", ".join(files)) or "none"
        remedy = "upload model.safetensors.index.json too, as save_pretrained wrote it" if len(files) > 1 else RESAVE
        place = Place(where, shown(files[0]) if files else "model.safetensors", remedy)
        raise place.refuse("E_FORMAT", "this is not one whole checkpoint", "one safetensors file or an index", found)
    return {files[0]: read_header(folder / files[0], where)}


def _read_sharded(folder: Path, files: list[str], indexes: list[str], where: str) -> dict[str, dict[str, Span]]:
    place = Place(where, shown(indexes[0]), RESAVE)
    if len(indexes) > 1:
        raise place.refuse("E_FORMAT", "there are several indexes", "one", shown(", ".join(indexes)))
    weight_map = read_json(folder / indexes[0], where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise place.refuse("E_FORMAT", "the index has no weight_map", "tensor name -> file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise place.refuse("E_PATH", "the index names no plain file", "name.safetensors", shown(file), shown(name))
    if set(weight_map.values()) != set(files):
        odd = sorted(set(weight_map.values()) ^ set(files))[0]
        what, remedy = "the file that the index names is missing", f"upload it beside {shown(indexes[0])}"
        if odd in files:
            what, remedy = "the index does not name this file", f"remove it, or name it in {shown(indexes[0])}"
        raise Place(where, shown(odd), remedy).refuse("E_FORMAT", what)
    headers = {file: read_header(folder / file, where) for file in files}
    _check_index(weight_map, headers, place)
    return headers


def _check_index(weight_map: Mapping[str, str], headers: Mapping[str, Iterable[str]], place: Place) -> None:
    counts = Counter(name for header in headers.values() for name in header)
    homes = {name: file for file, header in headers.items() for name in header}
    for name in sorted({*weight_map, *homes}):
        if counts[name] > 1:
            raise place.refuse("E_FORMAT", "the tensor is in two files", "one file", homes[name], name)
        if weight_map.get(name) != homes.get(name):
            found = homes.get(name, "no file")
            raise place.refuse(
                "E_FORMAT", "the index misplaces a tensor", weight_map.get(name, "none"), found, shown(name)
            )


def read_header(path: Path, where: str = "") -> dict[str, Span]:
    """Tensor name -> span, in file order, of one safetensors file that is exactly as long as its header says.

    Raises:
        FoldinError: as `read_folder`.
    """
    far = far_files(path.parent).get(path.name)
    if far:
        return read_far_header(far.stored, where)
    place = Place(where, shown(path.name), RESAVE)
    with open_regular(path, where) as file:
        size = os.fstat(file.fileno()).st_size
        text = _header_text(file, size, place)
    return check_header(text, size - 8 - len(text), place)


def read_far_header(found: Object, where: str = "") -> dict[str, Span]:
    """As `read_header`, of a file in a store; little more than the header is transferred."""
    place = Place(where, shown(found.uri.rpartition("/")[2]), RESAVE)
    text = _header_text(BufferedReader(Reader(found), FIRST), found.size, place)
    return check_header(text, found.size - 8 - len(text), place)


def start_digest(spec: TensorSpec) -> "hashlib._Hash":
    """The SHA-256 of a tensor before its bytes are added: dtype and shape are part of it."""
    return hashlib.sha256(f"{spec.dtype} {list(spec.shape)}\n".encode())


def _header_text(file: BufferedReader, size: int, place: Place) -> bytes:
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        kind = next((kind for magic, kind in MAGIC if start.startswith(magic)), "something else")
        raise place.refuse("E_FORMAT", "this is not a safetensors file", "a header", f"{kind}, {size} bytes")
    if not 2 <= length <= MAX_HEADER:
        raise place.refuse("E_HEADER", "the header's length is absurd", f"2 to {MAX_HEADER} bytes", f"{length}")
    if size < 8 + length:
        raise place.refuse("E_FORMAT", "the file ends inside its header", f"{8 + length} bytes or more", f"{size}")
    return b"{" + file.read(length - 1)


def check_header(text: bytes, data_bytes: int, place: Place) -> dict[str, Span]:
    """Tensor name -> span, in file order, of a header before `data_bytes` of data; nothing is allocated for them.

    Format: https://github.com/huggingface/safetensors, its README; stricter here about keys, names and dtypes.
    """
    # A tensor takes some 50 bytes and three brackets; far more brackets would only make the parser eat memory.
    if 12 * (text.count(b"[") + text.count(b"{")) > len(text) + 1000:
        raise place.refuse("E_HEADER", "the header is nested", "one flat object per tensor")
    entries = parse_json(text, place, "E_HEADER")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise place.refuse("E_HEADER", "the metadata is not text to text", "strings", shown(metadata))
    spans = sorted(_span(name, entry, place) for name, entry in entries.items())
    end = 0
    for span in spans:
        if span.begin != end:
            what = "the tensor's bytes do not follow the last tensor's"
            raise place.refuse("E_HEADER", what, f"offset {end}", f"offset {span.begin}", span.name)
        end = span.end
    if end != data_bytes:
        what = "the file is cut off" if end > data_bytes else "there are bytes after the last tensor"
        torn = next((span.name for span in spans if span.end > data_bytes), "")
        raise place.refuse("E_FORMAT", what, f"{end} bytes of tensors", f"{data_bytes}", torn)
    start = 8 + len(text)
    return {name: Span(start + begin, start + end, name, spec) for begin, end, name, spec in spans}


def _span(name: str, entry: object, place: Place) -> Span:
    """One header entry, with every number checked; offsets from the start of the data."""
    tensor = _tensor_name(name, place)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise place.refuse("E_HEADER", "the entry is malformed", "dtype, shape, data_offsets", shown(entry), tensor)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        known = ", ".join(BYTES)
        raise place._replace(remedy=RECAST).refuse("E_DTYPE", "the dtype is not supported", known, shown(dtype), tensor)
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise place.refuse(
            "E_HEADER", "the shape is not valid", "whole numbers from 0 to 2^63 - 1", shown(shape), tensor
        )
    if not _counts(offsets) or len(offsets) != 2:
        raise place.refuse("E_HEADER", "the offsets are not valid", "[begin, end]", shown(offsets), tensor)
    needed, given = prod(shape) * BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        what = f"the bytes do not match {dtype} {shown(shape)}"
        raise place.refuse("E_HEADER", what, f"{needed} bytes", f"{given}", tensor)
    return Span(offsets[0], offsets[1], name, TensorSpec(dtype, tuple(shape)))


def _counts(values: object) -> bool:
    """Whether this is a list of whole numbers that fit 63 bits; True and 1.0 are not numbers here."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _tensor_name(name: str, place: Place) -> str:
    """A name that is safe to print and that no careless reader can take for a path out of its folder."""
    escapes = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
    if not name or len(name) > 512 or not name.isprintable() or escapes:
        raise place.refuse(
            "E_PATH", "the tensor's name is not sane", "1 to 512 printable characters", tensor=shown(name)
        )
    return name
