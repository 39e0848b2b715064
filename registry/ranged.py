"""Reading files that are far: a tensor at a time, each compared with its digest, some of them ahead, some kept here."""

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from registry import far
from registry.stored import Object
from registry.tensor_cache import TensorCache

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LOOKS = 3  # at bytes that are not what they were: a bit may have flipped on the way
AHEAD = 4  # tensors on their way at a time
_near: TensorCache | None = None
_coming: dict[tuple[Object, int, int], "Future[bytearray]"] = {}
_coming_lock = threading.Lock()


def keep_near(folder: Path, room: int) -> None:
    """Keep up to `room` bytes of the tensors that this process reads in a folder; 0 keeps none."""
    global _near
    _near = TensorCache(folder, room) if room else None


@cache
def _bringers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AHEAD, "foldin-far")


class Reader(RawIOBase):
    """A far file as a file that can be read from its beginning."""

    def __init__(self, found: Object) -> None:
        self._found, self._at = found, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """The next bytes."""
        view = memoryview(buffer)
        end = min(self._at + len(view), self._found.size)
        piece = far.store().read(self._found, self._at, end)
        view[: len(piece)] = piece
        self._at = end
        return len(piece)


def read_span(file: far.Far, begin: int, end: int, expected: str, start: "hashlib._Hash") -> bytearray | None:
    """The bytes of one tensor, compared with its digest; None when they are others, after a second look.

    Args:
        file: the far one.
        begin: first byte of the tensor.
        end: one past its last.
        expected: its `tensor_sha256`; "" where none is known.
        start: the digest before the bytes are added.
    """
    near = _near.get(expected) if _near else None
    if near is not None and _is(near, expected, start):
        return near
    for _ in range(LOOKS):
        content = _taken(file, begin, end)
        if _is(content, expected, start):
            if _near:
                _near.put(expected, content)
            return content
    return None


def _is(content: bytearray, expected: str, start: "hashlib._Hash") -> bool:
    digest = start.copy()
    digest.update(content)
    return digest.hexdigest() == expected


def expect_span(file: far.Far, begin: int, end: int, expected: str) -> None:
    """Begin to bring bytes that are read soon; nothing where they are near, or enough is on its way already."""
    if _near and expected in _near:
        return
    with _coming_lock:
        key = (file.stored, begin, end)
        if key in _coming:
            return
        if len(_coming) == AHEAD:  # somebody changed their mind about the oldest
            _coming.pop(next(iter(_coming))).cancel()
        _coming[key] = _bringers().submit(far.store().read, *key)


def _taken(file: far.Far, begin: int, end: int) -> bytearray:
    with _coming_lock:
        coming = _coming.pop((file.stored, begin, end), None)
    return coming.result() if coming else far.store().read(file.stored, begin, end)
