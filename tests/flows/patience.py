"""Waiting for what comes sooner or later, and finding the processes that a test has started."""

import os
import time
from pathlib import Path


def wait_until(true, seconds=20):
    """What `true()` is as soon as it is anything; every tenth of a second, since each look may ask a server."""
    patience = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < patience, f"not after {seconds} s: {found!r}"
        time.sleep(0.1)
    return found


def marked(mark):
    """The living processes whose environment carries a mark, except this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            carries = mark.encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if carries:  # a process that ended and was not waited for has an empty environment
            found.append(int(folder.name))
    return found
