"""A real worker of a work pool: it folds while the watch loads no tensor; a cancelled run leaves nothing behind."""

import json
import os
import signal
import subprocess
import threading
import uuid
from contextvars import copy_context

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.plain_client import register_expert
from flows.pooling import CONTROL
from flows.processes import python
from flows.serve import offer_folds
from flows.starting import start
from flows.watch import watch
from flows.wiring import artifact_root, house, tracking_uri
from registry import weights
from registry.files import sha256_file
from registry.records import FoldinError
from tests.flows.patience import marked, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.timeout(900)]

POOL = "foldin-gpu"
SLOW = "import time\n\ndef slow(model, examples):\n    time.sleep(600)\n"


@pytest.fixture
def guard(workshop, monkeypatch):
    """A row of foldin.toml that makes every evaluation last until it is ended."""
    folder, name = workshop / "guard", f"slow_{uuid.uuid4().hex}"
    folder.mkdir()
    (workshop / f"{name}.py").write_text(SLOW)
    pq.write_table(pa.Table.from_pylist([{"text": "row", "split": "gate"}] * 20), folder / "rows.parquet")
    data = {"data": "rows.parquet", "data_sha256": sha256_file(folder / "rows.parquet")}
    (folder / "suite.json").write_text(json.dumps({"kind": "python", "function": f"{name}:slow", **data}))
    monkeypatch.setenv("PYTHONPATH", f"{workshop}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(workshop))
    return f"guards = {{ slow = {json.dumps(str(folder))} }}"


@pytest.fixture
def worker(request, workshop, prefect, monkeypatch):
    """A worker of the pool, or of another one, and the mark that it and its children carry."""
    mark = f"FOLDIN_TEST={uuid.uuid4()}"
    monkeypatch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
    monkeypatch.setenv(*mark.split("="))
    with open(workshop / "worker.log", "wb") as log:
        command = python("flows.pooling", str(workshop / "foldin.toml"), getattr(request, "param", POOL))
        process = subprocess.Popen(command, cwd=workshop, stdout=log, stderr=log)
    monkeypatch.delenv("FOLDIN_TEST")
    yield process, mark
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def runs(line):
    """The pool's runs of a line that fold, the oldest first."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        tags = FlowRunFilter(tags=FlowRunFilterTags(all_=[line]))
        return client.read_flow_runs(flow_run_filter=tags, sort=FlowRunSort.EXPECTED_START_TIME_ASC)


def opened(toml):
    house.cache_clear()
    return house(str(toml))


def test_a_worker_folds_and_a_cancelled_run_gives_the_line_back(workshop, zoo, guard, worker, monkeypatch):
    toml, (process, mark) = workshop / "foldin.toml", worker
    text = f'{toml.read_text()}\n[lines.tiny.runner]\npool = "{POOL}"\n'
    toml.write_text(text.replace("interval = 3600.0", f"interval = 3600.0\n{guard}"))
    at = opened(toml)
    start(at, "tiny", at.config.line("tiny"))
    offer_folds(at.config, str(toml))
    register_expert(tracking_uri(at.config), "tiny-experts", zoo / "expert-1", "task-1", artifact_root(at.config))

    def never(*arguments, **named):
        raise AssertionError("the watch loads tensors")

    monkeypatch.setattr(weights.Checkpoint, "open", never)

    # Cancelled in the middle of the evaluation.
    def cancel():
        from prefect.client.orchestration import get_client
        from prefect.states import Cancelling

        run = wait_until(lambda: [each for each in runs("tiny") if each.state.is_running()], 120)[0]
        wait_until(lambda: at.ledger.leases.alive("tiny") and list(at.config.home.glob("work/tiny/*/fold.json")), 120)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())

    canceller = threading.Thread(target=copy_context().run, args=(cancel,))
    canceller.start()
    with pytest.raises(FoldinError, match="E_CANCELLED"):
        watch("tiny", str(toml))
    canceller.join()
    wait_until(lambda: not at.ledger.leases.alive("tiny"), 30)
    wait_until(lambda: marked(mark) == [process.pid], 30)
    (expert,) = at.ledger.experts("tiny")
    assert (str(expert.state), expert.attempts) == ("pending", 0)
    at.ledger.close()

    # Without what made it slow the next look folds it, in the pool; the watch has loaded no tensor.
    toml.write_text(text)
    at = opened(toml)
    (outcome,) = watch("tiny", str(toml))
    assert (outcome["expert"], outcome["state"], outcome["version"]) == ("tiny-experts v1", "folded", 2)
    assert [(each.work_pool_name, each.state.type.value) for each in runs("tiny")] == [
        (POOL, "CANCELLED"),
        (POOL, "COMPLETED"),
    ]
    assert not list(at.config.home.glob("work/tiny/*"))
    at.ledger.close()


@pytest.mark.parametrize("worker", [CONTROL], indirect=True)
def test_a_forked_run_that_is_cancelled_gives_the_line_back(workshop, zoo, guard, worker):
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelling

    toml, (_, mark) = workshop / "foldin.toml", worker
    toml.write_text(toml.read_text().replace("interval = 3600.0", f"interval = 3600.0\n{guard}"))
    at = opened(toml)
    start(at, "tiny", at.config.line("tiny"))
    register_expert(tracking_uri(at.config), "tiny-experts", zoo / "expert-1", "task-1", artifact_root(at.config))

    def deployed():
        try:
            return client.read_deployment_by_name("watch/tiny")
        except ObjectNotFound:
            return None

    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(wait_until(deployed, 60).id)
        wait_until(lambda: at.ledger.leases.alive("tiny") and list(at.config.home.glob("work/tiny/*/fold.json")), 120)
        assert len(marked(mark)) == 4, "the worker, what is forked from, the errand and the run"
        client.set_flow_run_state(run.id, Cancelling())
        wait_until(lambda: client.read_flow_run(run.id).state.is_cancelled(), 60)
    wait_until(lambda: not at.ledger.leases.alive("tiny"), 30)
    wait_until(lambda: len(marked(mark)) == 2, 30)
    (expert,) = at.ledger.experts("tiny")
    assert (str(expert.state), expert.attempts) == ("pending", 0)
    at.ledger.close()
