"""Whether a process lives. A number alone does not say: the kernel gives it to another one later."""

import os
import socket
from pathlib import Path


def holder() -> str:
    """Who this process is, so that another one on the same host can see that it died: host:pid:start."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_dead(other: str) -> bool:
    """Whether a holder was a process of this host that runs no more. When in doubt: no."""
    host, _, process = other.partition(":")
    pid, _, started = process.partition(":")
    if host != socket.gethostname() or not pid.isdigit() or not Path("/proc/self/stat").exists():
        return False
    return _started(int(pid)) != started


def lives(pid: int) -> bool:
    """Whether a process still works; one that ended is there until its parent asks for it."""
    if Path("/proc/self/stat").exists():
        return bool(_started(pid))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" when there is no such process (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state == "Z" else rest[18]
