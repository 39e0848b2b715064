"""Services are started in order, started again when they end or fall silent, and ended with who keeps them."""

import os
import signal
import socket
import sys
import threading
import time

import pytest

from flows import processes, supervising
from flows.processes import Page, Service, free_port
from flows.supervising import Supervisor
from registry.records import FoldinError
from tests.flows.patience import wait_until

SERVER = """
import http.server, os, sys, time
print("begins", flush=True)
class Well(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *words): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Well).serve_forever()
"""


def service(name="one", program=SERVER, port=None, **more):
    page = Page(name, free_port() if port is None else port, "--port", "/")
    return Service(page, lambda: [sys.executable, "-c", program, str(page.port)], **more)


class Keeper:
    """A supervisor at work in a thread."""

    def __init__(self, folder, *services):
        self.stop, self.notes = threading.Event(), []
        self.supervisor = Supervisor(services, folder, lambda kept: self.notes.append([each.restarts for each in kept]))
        self.kept = self.supervisor._kept
        self.thread = threading.Thread(target=self.supervisor.keep, args=(self.stop,))

    def __enter__(self):
        try:
            self.supervisor.start(self.stop)
        except FoldinError:
            self.supervisor.end()
            raise
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()
        self.supervisor.end()


def server_of(kept):
    """The process id of the server itself, which its tether started."""
    return int(children(kept.process.pid)[0])


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as found:
        return found.read().split()


def test_each_is_started_when_those_before_it_answer_and_ended_after_those_behind_it(tmp_path):
    order = []
    first = service("first", prepare=lambda: order.append("first"))

    def second_command():
        assert first.is_well()
        order.append("second")
        return [sys.executable, "-c", SERVER, str(second.page.port)]

    second = Service(Page("second", free_port(), "", "/"), second_command)
    with Keeper(tmp_path, first, second) as keeper:
        assert order == ["first", "second"]
        assert first.is_well()
        assert second.is_well()
        pids = [server_of(each) for each in keeper.kept]
    assert not first.is_well()
    assert not second.is_well()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert (tmp_path / "first-server.log").read_text() == "begins\n"


def test_one_that_is_killed_is_started_again_and_prepared_again(tmp_path):
    started, prepared = [], []
    one = service()

    def command():
        started.append(time.monotonic())
        return one.command()

    with Keeper(tmp_path, Service(one.page, command, prepare=lambda: prepared.append(one.is_well()))) as keeper:
        for times in (1, 2):
            os.kill(server_of(keeper.kept[0]), signal.SIGKILL)
            wait_until(lambda times=times: len(prepared) == 1 + times)
            assert keeper.kept[0].restarts == times
    assert prepared == [True, True, True]
    assert [note for note in keeper.notes if note != [0]] == [[1], [2]]
    assert started[2] - started[1] > 1.9, "who keeps ending is given longer pauses"


def test_one_that_falls_silent_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(supervising, "PROBE", 0.1)
    one = service()
    silent = Service(one.page, one.command, answers=lambda: not frozen.is_set() and one.is_well())
    frozen = threading.Event()
    with Keeper(tmp_path, silent) as keeper:
        before = server_of(keeper.kept[0])
        os.kill(before, signal.SIGSTOP)
        frozen.set()
        wait_until(lambda: not os.path.exists(f"/proc/{before}"))
        frozen.clear()
        wait_until(lambda: keeper.kept[0].lives and silent.is_well())
        assert server_of(keeper.kept[0]) != before


def test_one_that_takes_long_to_start_again_is_given_time(tmp_path, monkeypatch):
    monkeypatch.setattr(supervising, "PROBE", 0.1)
    one = service()
    slow = Service(one.page, one.command, answers=lambda: not asleep.is_set() and one.is_well())
    asleep = threading.Event()
    with Keeper(tmp_path, slow) as keeper:
        kept = keeper.kept[0]
        asleep.set()
        os.kill(server_of(kept), signal.SIGKILL)
        wait_until(lambda: kept.restarts == 1)
        wait_until(lambda: kept.unanswered > 5 * supervising.UNANSWERED)
        asleep.clear()
        wait_until(lambda: kept.answered)
        assert kept.restarts == 1
        asleep.set()
        wait_until(lambda: kept.restarts == 2)


def test_one_that_never_answers_is_started_again_after_all(tmp_path, monkeypatch):
    one, asleep = service(), threading.Event()
    with Keeper(
        tmp_path, Service(one.page, one.command, answers=lambda: not asleep.is_set() and one.is_well())
    ) as keeper:
        monkeypatch.setattr(processes, "PATIENCE", 1.0)
        asleep.set()
        os.kill(server_of(keeper.kept[0]), signal.SIGKILL)
        wait_until(lambda: keeper.kept[0].restarts == 2)
        assert not keeper.kept[0].answered


def test_what_cannot_be_prepared_is_said_and_tried_again(tmp_path, caplog):
    prepared = []

    def prepare():
        prepared.append(time.monotonic())
        if len(prepared) == 2:
            raise OSError("the disk is full")

    with Keeper(tmp_path, service(prepare=prepare)) as keeper:
        os.kill(server_of(keeper.kept[0]), signal.SIGKILL)
        wait_until(lambda: len(prepared) == 3)
        wait_until(lambda: keeper.kept[0].answered)
        assert keeper.kept[0].restarts == 1
    assert "one: the disk is full" in caplog.text


def test_one_that_does_not_start_is_named_with_its_log_and_the_others_are_ended(tmp_path):
    good, bad = service("good"), service("bad", "print('no'); raise SystemExit(7)")
    with (
        pytest.raises(FoldinError, match=r"E_SERVER bad: the service did not start") as refused,
        Keeper(tmp_path, good, bad),
    ):
        pass
    assert "exit status 7" in str(refused.value)
    assert str(tmp_path / "bad-server.log") in str(refused.value)
    assert (tmp_path / "bad-server.log").read_text() == "no\n"
    assert not good.is_well()


def test_a_port_that_is_taken_is_found_before_anything_starts(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        good, taken = service("good"), service("taken", port=other.getsockname()[1])
        with pytest.raises(FoldinError, match="the port is taken"), Keeper(tmp_path, good, taken):
            pass
    assert not (tmp_path / "good-server.log").exists()
