"""Run a command no longer than the process that asked for it lives, however that process ends.

`python -m flows.tether COMMAND ...` with a pipe as standard input: when the starter dies, even by SIGKILL, the kernel
closes the pipe, and the command and everything it started are ended. Prefect's own temporary server lacks this: it
outlives a killed flow for ever, with the killed process's output open.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flows.alive import lives

GRACE = 5.0  # seconds between asking the command's processes to end and ending them
REST = 30.0  # the same for those that lead sessions of their own: a fold gives its line back and tells Prefect
LOOK = 0.2  # seconds between two looks at the command


def main(command: list[str]) -> int:
    """The exit status of the command, once it ended by itself or the starter let go of standard input."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while running.poll() is None and not _let_go():
            pass
    finally:
        _end(running)
    return running.returncode


def _let_go() -> bool:
    """Whether the starter closed its end of standard input, or died."""
    ready, _, _ = select.select([0], [], [], LOOK)
    return bool(ready) and not os.read(0, 1024)


def _end(running: "subprocess.Popen[bytes]") -> None:
    """End the command's whole process group: servers start workers that do not follow them.

    First those that lead sessions of their own, while the command stands still: Prefect's worker, asked to end, kills
    its flow runs without a word, and left alone would begin the next.
    """
    apart = _apart(running.pid)
    if apart:
        _send(running.pid, signal.SIGSTOP)
        for pid in apart:
            _send(pid, signal.SIGTERM)
        _last(REST, lambda: any(map(lives, apart)))
        for pid in apart:
            _send(pid, signal.SIGKILL)
    grace = GRACE if running.poll() is None else REST  # of a worker that died its flow runs are left
    asked = _send(running.pid, signal.SIGTERM)
    _send(running.pid, signal.SIGCONT)
    if asked and _last(grace, lambda: running.poll() is None or _send(running.pid, 0)):
        _send(running.pid, signal.SIGKILL)
    running.wait()


def _last(seconds: float, true: Callable[[], bool]) -> bool:
    """Whether something is still true after a while."""
    patience = time.monotonic() + seconds
    while true():
        if time.monotonic() > patience:
            return True
        time.sleep(0.05)
    return False


def _send(group: int, number: int) -> bool:
    """Send a signal to a process group; False when there is none of that number any more."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _apart(pid: int) -> list[int]:
    """The processes below one that lead groups of their own; none where there is no /proc."""
    found = []
    with suppress(OSError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()):
            with suppress(ProcessLookupError):
                found += [*([child] if os.getpgid(child) == child else []), *_apart(child)]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
