"""Tensors that came from a store, kept on this machine by their digests, as long as there is room for them.

A fold reads the same model several times over, so what was used lately is not replaced by what comes now: of a model
larger than the room, a part stays instead of all of it passing through.
"""

import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

DIGEST = re.compile("[0-9a-f]{64}")  # it becomes a file's name
IDLE = 3600.0  # seconds; what nobody read for so long makes room
LOOK = 60.0  # seconds between two looks at what all processes keep together


class TensorCache:
    """Bytes by SHA-256. What is read from it may be damaged: the reader compares."""

    def __init__(self, folder: Path, room: int) -> None:
        """Keep about `room` bytes at most in a folder; processes that share it see each other's once a minute."""
        self._folder, self._room = folder, room
        self._used, self._looked = 0, -LOOK
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        path = self._path(digest)
        return path is not None and path.is_file()

    def get(self, digest: str) -> bytearray | None:
        """The bytes kept under a digest; None where there are none."""
        path = self._path(digest)
        try:
            if path is None:
                return None
            content = bytearray(path.stat().st_size)
            with open(path, "rb") as file:
                file.readinto(content)
            os.utime(path)
        except OSError:
            return None
        return content

    def put(self, digest: str, content: bytes | bytearray) -> None:
        """Keep bytes where there is room; a disk that takes no more is no trouble."""
        path = self._path(digest)
        if path is None or not self._room_for(len(content)):
            return
        scratch = path.with_name(f".{secrets.token_hex(8)}.tmp")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(content)  # not synced: what a power cut leaves is compared when it is read
            scratch.replace(path)

    def _path(self, digest: str) -> Path | None:
        return self._folder / digest[:2] / digest if DIGEST.fullmatch(digest) else None

    def _room_for(self, size: int) -> bool:
        """Whether so much may be added; what others added meanwhile is seen once a minute."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK:
                self._used, self._looked = self._kept(), time.monotonic()
            if self._used + size > self._room:
                return False
            self._used += size
            return True

    def _kept(self) -> int:
        """Bytes that are kept; where they are too many, those that were idle too long go first."""
        found = sorted(self._files())
        total, idle = sum(size for _, size, _ in found), time.time() - IDLE
        for used, size, path in found:
            if total <= self._room // 2 or used >= idle:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(when it was used last, bytes, path) of every file."""
        for path in self._folder.glob("*/*"):
            with suppress(OSError):  # another process removed it
                found = path.stat()
                yield found.st_mtime, found.st_size, path
