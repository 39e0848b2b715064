"""`python -m flows.forking FD`: what flow runs begin from, having imported once what each would import for seconds.

It listens at the socket FD for errands (`flows.errand`) and forks for each one. It opens no database, no connection and
no store itself: those would break in a child. It ends with whoever holds its standard input, after the last child.
"""

import gc
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module

from flows.environment import using_variables
from flows.errand import GO, STATUS, Errand, is_ours, receive

IMPORTED = (
    *("flows.approval", "flows.batching", "flows.nightly", "flows.rollback", "flows.watch"),
    *("evaluation.gate", "evaluation.page", "evaluation.pictures", "evaluation.score", "merging"),
    *("registry.adapters", "registry.ledger", "registry.mlflow_store", "registry.objects"),
    *("prefect.engine", "prefect.flow_engine", "prefect.task_engine", "mlflow.tracking"),
    *("torch", "transformers"),
)
PATIENCE = 5.0  # seconds an errand may take to say what it wants


@dataclass
class Starter:
    """What listens for errands, and the children that it has forked."""

    listener: socket.socket
    children: dict[int, socket.socket]  # pid -> whom its end is told
    ended: bool = False  # no more errands are taken

    def next_errand(self) -> tuple[socket.socket, Errand] | None:
        """In each child its errand; in the starter itself None, once it is to end and has no child any more."""
        self._hear_signals()
        while self.children or not self.ended:
            calls = self.listener.fileno()
            ready, _, _ = select.select([self._woken, *([] if self.ended else [0, calls])], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if 0 in ready and not os.read(0, 4096):
                self.ended = True
            if self.ended:
                self.listener.close()  # whoever calls now sees that nobody listens
            elif calls in ready and (found := self._take()):
                return found
        return None

    def _take(self) -> tuple[socket.socket, Errand] | None:
        """Fork for whoever calls; None in the parent."""
        with ExitStack() as kept:
            try:
                connection = kept.enter_context(self.listener.accept()[0])
                connection.settimeout(PATIENCE)
                if not is_ours(connection):
                    return None
                errand = receive(connection)
                kept.callback(errand.close)
                pid = _fork()
            except (OSError, ValueError):  # it ended, is none, or there is no room: it helps itself
                return None
            if pid == 0:
                kept.pop_all()
                self._let_go()
                return connection, errand
            errand.close()
            kept.pop_all()
        self.children[pid] = connection
        with suppress(OSError):  # the child sees too that nobody is there
            connection.sendall(STATUS.pack(pid))
        return None

    def _let_go(self) -> None:
        """In a child: what was the starter's."""
        os.setsid()
        for each in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(each, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.set_wakeup_fd(-1)
        for fd in self._pipe:
            os.close(fd)
        for other in (self.listener, *self.children.values()):
            other.close()

    def _hear_signals(self) -> None:
        self._pipe = self._woken, wakes = os.pipe()
        for fd in self._pipe:
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "ended", True))

    def _reap(self) -> None:
        """Tell how each child ended."""
        for pid in list(self.children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with self.children.pop(pid) as connection, suppress(OSError):
                    connection.sendall(STATUS.pack(os.waitstatus_to_exitcode(status)))


def _fork() -> int:
    """As `os.fork`; in the child SIGTERM waits until it has handlers of its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        pid = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        raise
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return pid


def main(listener: int) -> None:
    """Import, listen; in each child, be the process that its errand stands for."""
    with using_variables({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):  # a GPU that was looked for is lost to all children
        for name in IMPORTED:
            import_module(name)
    gc.collect()
    gc.freeze()  # what a child never touches stays one copy
    found = Starter(socket.socket(fileno=listener), {}).next_errand()
    if found is not None:
        _become(*found)
        runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def _become(connection: socket.socket, errand: Errand) -> None:
    """Have the errand's environment, folder and output, and live no longer than it does."""
    from prefect.context import refresh_global_settings_context

    connection.settimeout(None)
    if connection.recv(1) != GO:  # it did not wait
        os._exit(1)
    threading.Thread(target=_follow, args=(connection,), daemon=True).start()
    errand.adopt()
    sys.argv, sys.path[0] = ["prefect.engine"], errand.folder
    del sys.modules["prefect.engine"]  # it is to be run as the main module, and runpy warns of what is there already
    refresh_global_settings_context()


def _follow(connection: socket.socket) -> None:
    """End with the errand, however that ends, and all that was started."""
    with suppress(OSError):
        connection.recv(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
