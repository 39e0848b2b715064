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

GRACE = 5.0  # seconds between asking the command's processes to end and ending them
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
    """End the command's whole process group: servers start workers that do not follow them."""
    patience = time.monotonic() + GRACE
    alive = _send(running.pid, signal.SIGTERM)
    while alive and time.monotonic() < patience:
        running.poll()
        time.sleep(0.05)
        alive = _send(running.pid, 0)
    if alive:
        _send(running.pid, signal.SIGKILL)
    running.wait()


def _send(group: int, number: int) -> bool:
    """Send a signal to a process group; False when there is none of that number any more."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
