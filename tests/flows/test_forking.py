"""Flow runs that begin in a fork: they are what a process of their own would be, and end with it, however it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from flows.alive import lives
from flows.processes import python
from tests.flows.patience import marked, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.skipif(sys.platform != "linux", reason="it forks on Linux alone")]
FLOWS = """
import json, os, subprocess, sys, time
from pathlib import Path
from prefect import flow

@flow
def tell(file: str):
    print("said on the way")
    told = {"folder": os.getcwd(), "word": os.environ.get("WORD"), "pid": os.getpid(), "group": os.getpgid(0)}
    told |= {"main": sys.modules["__main__"].__spec__.name, "first": sys.path[0]}
    Path(file).write_text(json.dumps(told))

@flow
def fail(file: str):
    raise ValueError("on purpose")

@flow
def wait(file: str):
    started = subprocess.Popen(["sleep", "120"])
    Path(file).write_text(json.dumps({"pid": os.getpid(), "started": started.pid}))
    try:
        time.sleep(120)
    finally:
        started.wait()
        Path(file + ".end").write_text("in order")
"""


class Room:
    """A starter, and what is sent to it."""

    def __init__(self, folder, prefect):
        self.folder, self.mark, self.name = folder, f"FOLDIN_TEST={uuid.uuid4()}", f"foldin-test-{uuid.uuid4()}"
        (folder / "told.py").write_text(FLOWS)
        key, value = self.mark.split("=")
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "PREFECT_API_URL": prefect, key: value}
        self.log = folder / "log"
        self.starter = None

    def start(self):
        with socket.socket(socket.AF_UNIX) as listener, open(self.log, "ab") as log:
            listener.bind(f"\0{self.name}")
            listener.listen()
            command = python("flows.forking", str(listener.fileno()))
            self.starter = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                env=self.environment,
                start_new_session=True,
            )
        return self

    def send(self, flow, **variables):
        """An errand for a new run of a flow, the run, and the file it is to write."""
        from prefect.client.orchestration import get_client

        file = self.folder / f"{uuid.uuid4()}.json"
        with get_client(sync_client=True) as client:
            named = client.create_flow_from_name(flow)
            deployment = client.create_deployment(flow_id=named, name="test", entrypoint=f"told.{flow}")
            run = client.create_flow_run_from_deployment(deployment, parameters={"file": str(file)})
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        errand = subprocess.Popen(
            python("flows.errand"),
            cwd=work,
            env={**self.environment, "PREFECT__FLOW_RUN_ID": str(run.id), "FOLDIN_STARTER": self.name, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return errand, run.id, file

    def begun(self, flow):
        """The same, once it has begun, and the process that it is in, which has started another."""
        errand, run, file = self.send(flow)
        told = wait_until(lambda: file.exists() and json.loads(file.read_text() or "0"), 60)
        return errand, run, file, told["pid"], told["started"]


@pytest.fixture(scope="module")
def room(tmp_path_factory, prefect):
    made = Room(tmp_path_factory.mktemp("starter"), prefect).start()
    yield made
    made.starter.kill()
    made.starter.communicate()
    for pid in marked(made.mark):
        os.kill(pid, signal.SIGKILL)


def state(run):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).state.type.value


def test_a_run_has_the_environment_folder_and_output_of_its_errand(room):
    errand, run, file = room.send("tell", WORD="this one")
    said, _ = errand.communicate(timeout=60)
    assert (errand.returncode, state(run)) == (0, "COMPLETED"), said
    told = json.loads(file.read_text())
    assert (told["word"], told["main"]) == ("this one", "prefect.engine")
    assert told["folder"] == told["first"] == str(room.folder / "work")
    assert told["pid"] == told["group"] != errand.pid
    assert b"said on the way" in said
    assert b"said on the way" not in room.log.read_bytes()
    again, _, other = room.send("tell")
    again.communicate(timeout=60)
    assert json.loads(other.read_text())["word"] is None  # nothing of one run reaches the next


def test_the_starter_has_opened_nothing_that_a_fork_would_break(room):
    first, _, _ = room.send("tell")
    first.communicate(timeout=60)
    links = [os.readlink(each) for each in Path(f"/proc/{room.starter.pid}/fd").iterdir()]
    assert len([each for each in links if each.startswith("socket:")]) == 1, links
    assert not [each for each in links if each.endswith(".db")], links


def test_nothing_that_the_starter_imports_asks_for_a_gpu():
    code = """
import torch
def asked(*_): raise SystemExit("somebody asked for a GPU")
torch._C._cuda_getDeviceCount = torch._C._cuda_init = torch.cuda._lazy_init = asked
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = asked
from importlib import import_module
from flows.forking import IMPORTED
for each in IMPORTED: import_module(each)
print("none")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (found.stdout.strip(), found.returncode) == ("none", 0), found.stderr


def test_a_run_that_fails_is_failed_and_its_errand_ends_as_the_engine_would(room):
    errand, run, _ = room.send("fail")
    said, _ = errand.communicate(timeout=60)
    assert state(run) == "FAILED"
    plain, other, _ = room.send("fail", FOLDIN_STARTER="")
    said_plainly, _ = plain.communicate(timeout=60)
    assert (state(other), plain.returncode, said_plainly) == ("FAILED", errand.returncode, said)


def test_a_signal_to_the_errand_is_one_to_the_run(room):
    errand, _, file, _, started = room.begun("wait")
    errand.terminate()
    errand.communicate(timeout=30)
    assert Path(f"{file}.end").read_text() == "in order"
    assert errand.returncode != 0
    assert not lives(started)


def test_a_run_does_not_outlive_its_errand(room):
    errand, _, file, pid, started = room.begun("wait")
    errand.kill()
    errand.communicate()
    wait_until(lambda: not lives(pid) and not lives(started), 10)
    assert not Path(f"{file}.end").exists()


def test_an_errand_ends_as_its_run_was_ended(room):
    errand, _, _, pid, started = room.begun("wait")
    os.kill(pid, signal.SIGKILL)
    assert errand.wait(timeout=10) == -signal.SIGKILL
    os.kill(started, signal.SIGKILL)  # nobody else does
    errand.communicate()


@pytest.mark.parametrize(
    "said", [b"", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b"\x02\x00\x00\x00[]", b"GET / HTTP/1.1\r\n"]
)
def test_what_is_no_errand_disturbs_nobody(room, said):
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(f"\0{room.name}")
        socket.send_fds(caller, [said], [0, 1, 2])
    errand, run, _ = room.send("tell")
    errand.communicate(timeout=60)
    assert state(run) == "COMPLETED"


def test_who_calls_and_goes_away_begins_nothing(room, monkeypatch):
    from flows.errand import STATUS, read, send

    errand, run, file = room.send("wait", FOLDIN_STARTER="", PREFECT__FLOW_RUN_ID="")
    errand.communicate()
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run))
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(f"\0{room.name}")
        send(caller)
        (pid,) = STATUS.unpack(read(caller, STATUS.size))
    wait_until(lambda: not lives(pid), 10)
    assert not file.exists()
    assert state(run) == "SCHEDULED"


def test_without_a_starter_the_errand_is_the_run(room):
    errand, run, file = room.send("tell", FOLDIN_STARTER="foldin-nobody")
    errand.communicate(timeout=60)
    assert state(run) == "COMPLETED"
    assert json.loads(file.read_text())["pid"] == errand.pid


def test_the_starter_ends_after_its_last_run_and_one_that_was_killed_leaves_its_run_alone(tmp_path, prefect):
    room = Room(tmp_path, prefect).start()
    errand, _, file, pid, _ = room.begun("wait")
    room.starter.stdin.close()
    late, run, _ = room.send("tell")
    late.communicate(timeout=60)
    assert state(run) == "COMPLETED"  # by itself
    assert room.starter.poll() is None
    room.starter.kill()
    room.starter.wait()
    time.sleep(0.5)
    assert lives(pid)
    assert errand.poll() is None
    errand.terminate()
    errand.communicate(timeout=30)
    assert Path(f"{file}.end").read_text() == "in order"
