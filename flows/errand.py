"""`python -m flows.errand`: a flow run, as `python -m prefect.engine`, begun at once where `flows.forking` listens.

Prefect's worker starts it, watches it and sends it signals; it stands for the forked process, which ends with it.
Nothing is imported here that takes time.
"""

import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass

from flows.environment import child_environment, replace_variables, starter_name

GO = b"g"  # the errand still waits: begin
STATUS = struct.Struct("=i")  # first the child's pid, then its exit status as subprocess gives it
HEAD = struct.Struct("=I")  # bytes of JSON that follow
CREDENTIALS = struct.Struct("=3i")  # pid, uid, gid
PATIENCE = 60.0  # seconds the starter may take to fork: it may be importing


@dataclass(frozen=True)
class Errand:
    """What a forked process takes over."""

    environment: dict[str, str]
    folder: str
    outputs: tuple[int, ...]  # descriptors: standard input, output and error

    def adopt(self) -> None:
        """Become it."""
        for number, fd in enumerate(self.outputs):
            os.dup2(fd, number)
        self.close()
        replace_variables(self.environment)
        os.chdir(self.folder)

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd in self.outputs:
            os.close(fd)


def send(connection: socket.socket) -> None:
    """Tell the starter what this process is."""
    told = json.dumps({"environment": child_environment({}), "folder": os.getcwd()}).encode()
    socket.send_fds(connection, [HEAD.pack(len(told))], [0, 1, 2])
    connection.sendall(told)


def receive(connection: socket.socket) -> Errand:
    """What `send` sent.

    Raises:
        OSError: it ended before.
        ValueError: it is no errand.
    """
    head, outputs, _, _ = socket.recv_fds(connection, HEAD.size, 3)
    try:
        (size,) = HEAD.unpack(head)
        told = json.loads(read(connection, size))
        if len(outputs) != 3:
            raise ValueError("an errand has three descriptors")
        return Errand(told["environment"], told["folder"], tuple(outputs))
    except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
        for fd in outputs:
            os.close(fd)
        raise ValueError("no errand") from error


def read(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes.

    Raises:
        ConnectionError: the other side ended before.
    """
    found = bytearray()
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionError("it ended")
        found += part
    return bytes(found)


def is_ours(connection: socket.socket) -> bool:
    """Whether the other side belongs to this user; the environment holds secrets."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, user, _ = CREDENTIALS.unpack(told)
    return bool(user == os.getuid())


def main() -> int:
    """The exit status of the flow run's process."""
    try:
        connection, child = _call(starter_name())
    except OSError as error:  # nobody listens: be the process oneself, which leads a group as a worker's runs do
        if starter_name():
            sys.stderr.write(f"the starter does not answer ({error}); the run imports everything itself\n")
        with suppress(PermissionError):
            os.setsid()
        os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, frame: _pass_on(child, number))
    with suppress(ConnectionError):  # it was ended already
        connection.sendall(GO)
    try:
        (status,) = STATUS.unpack(read(connection, STATUS.size))
    except ConnectionError:  # the starter died, and after it the child
        return 1
    if status < 0:  # as the child was ended, so that the worker can tell
        with suppress(OSError):  # SIGKILL is nobody's to handle
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return int(status)


def _call(name: str) -> tuple[socket.socket, int]:
    """A connection to the starter, and the process that it has forked.

    Raises:
        OSError: nobody listens, or does not answer.
    """
    if not name:
        raise ConnectionError("no starter is named")
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    connection.connect(f"\0{name}")
    if not is_ours(connection):
        raise ConnectionError("another user listens")
    send(connection)
    (child,) = STATUS.unpack(read(connection, STATUS.size))
    connection.settimeout(None)
    return connection, child


def _pass_on(child: int, number: int) -> None:
    """Send a signal to the child and to all that it has started."""
    with suppress(ProcessLookupError):
        try:
            os.killpg(child, number)
        except ProcessLookupError:  # it leads no group yet
            os.kill(child, number)


if __name__ == "__main__":
    sys.exit(main())
