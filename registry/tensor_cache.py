"""Tensors that came from a store, kept on this machine by their digests, as long as there is room for them.

A fold reads the same model several times over, so what was used lately is not replaced by what comes now: of a model
larger than the room, a part stays instead of all of it passing through.
"""

import os
import re
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

DIGEST = re.compile("[0-9a-f]{64}")  # it becomes a file's name
IDLE = 3600.0  # seconds; what nobody read for so long makes room
LOOK = 60.0  # seconds between two looks at everything that is kept


class TensorCache:
    """Bytes by SHA-256. What is read from it may be damaged: the reader compares."""

    def __init__(self, folder: Path, room: int) -> None:
        """Keep at most about `room` bytes in a folder, which several processes may share."""
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
        with self._lock:
            if self._used + size > self._room and time.monotonic() - self._looked >= LOOK:
                self._used, self._looked = self._kept(), time.monotonic()
            if self._used + size > self._room:
                return False
            self._used += size
            return True

    def _kept(self) -> int:
        """Bytes that are kept, once what was idle too long is gone."""
        total, idle = 0, time.time() - IDLE
        for path in self._folder.glob("*/*"):
            with suppress(OSError):  # another process removed it
                found = path.stat()
                if found.st_mtime < idle:
                    path.unlink()
                else:
                    total += found.st_size
        return total
