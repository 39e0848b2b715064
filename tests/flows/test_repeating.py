"""What died with its worker is told to Prefect and looked at again; what lives on somewhere is left alone."""

import os
import subprocess
import sys

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Crashed, Pending, Running

from flows.alive import holder
from flows.config import load
from flows.repeating import repeat_dead
from flows.serve import deployments

pytestmark = pytest.mark.integration


@pytest.fixture
def client(prefect):
    with get_client(sync_client=True) as found:
        yield found


@pytest.fixture
def pool(client, workshop, request):
    """A work pool of its own for each test, with the deployments of the line `tiny`."""
    name = f"pool-{abs(hash(request.node.name)) % 10**8}"
    client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    for each in deployments(load(workshop / "foldin.toml"), str(workshop / "foldin.toml")):
        each.apply(work_pool_name=name)
    return name


@pytest.fixture
def dead():
    """A process that ended: its number, and its name as a worker's."""
    program = "from flows.alive import holder; print(holder())"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    return ended.split(":")[1], ended


def begun(client, flow, pid):
    """A flow run that has begun in a process."""
    run = client.create_flow_run_from_deployment(client.read_deployment_by_name(f"{flow}/tiny").id, tags=["foldin"])
    client.set_flow_run_state(run.id, Pending())
    client.update_flow_run(run.id, infrastructure_pid=pid)
    client.set_flow_run_state(run.id, Running())
    return run


def repeated(client, run):
    """The run that is to do the same again; None when there is none."""
    found = client.read_flow_runs()
    return next((each for each in found if each.idempotency_key == f"again {run.id}"), None)


def test_a_look_that_died_with_its_worker_is_repeated_and_its_place_is_free(client, pool, dead):
    pid, worker = dead
    client.send_worker_heartbeat(pool, worker)
    look, back = begun(client, "watch", pid), begun(client, "rollback", pid)
    assert repeat_dead(client, pool) == 2
    assert {client.read_flow_run(each.id).state.name for each in (look, back)} == {"Crashed"}
    again = repeated(client, look)
    assert (again.parameters, again.tags) == (look.parameters, look.tags)
    assert client.set_flow_run_state(again.id, Pending()).state.is_pending(), "the line's place is free"
    assert repeated(client, back) is None, "who wanted that may not want it twice"


def test_a_look_that_crashed_because_its_worker_had_died_is_repeated_once(client, pool, dead):
    client.send_worker_heartbeat(pool, dead[1])
    look, back = begun(client, "watch", dead[0]), begun(client, "rollback", dead[0])
    for run in (look, back):
        client.set_flow_run_state(run.id, Crashed())
    assert repeat_dead(client, pool) == 0
    again = repeated(client, look)
    assert again.state.is_scheduled()
    repeat_dead(client, pool)
    assert repeated(client, look).id == again.id
    assert repeated(client, back) is None


def test_what_lives_on_without_its_worker_is_left_alone(client, pool, dead):
    client.send_worker_heartbeat(pool, dead[1])
    run = begun(client, "nightly", str(os.getpid()))
    assert repeat_dead(client, pool) == 0
    assert client.read_flow_run(run.id).state.is_running()


@pytest.mark.parametrize("other", [holder(), "elsewhere:7:7"], ids=["here", "elsewhere"])
def test_nothing_is_done_while_another_worker_may_be_at_work(client, pool, dead, other):
    client.send_worker_heartbeat(pool, other)
    run = begun(client, "nightly", dead[0])
    assert repeat_dead(client, pool) == 0
    assert client.read_flow_run(run.id).state.is_running()
    assert repeated(client, run) is None
