"""The parts of a fold on a Dask cluster: two processes of their own, a real scheduler, a real Prefect server."""

import os
import signal

import pytest

pytest.importorskip("prefect_dask")
pytestmark = pytest.mark.integration

import dask  # noqa: E402
from distributed import LocalCluster  # noqa: E402

from flows import cluster, first_pass, parts  # noqa: E402
from flows.cluster import fold_on_cluster  # noqa: E402
from flows.folding import fold  # noqa: E402
from flows.recipe import Recipe  # noqa: E402
from registry.files import hash_tree  # noqa: E402
from registry.records import FoldinError  # noqa: E402


@pytest.fixture(scope="module")
def scheduler(prefect):
    """The address of a cluster of two workers with two threads each."""
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0") as made:
        yield made.scheduler_address


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 16 * 1024)


@pytest.mark.chaos
def test_a_cluster_gives_the_bytes_of_this_process(zoo, bare_line, scheduler, tmp_path):
    trees, progress = [], []
    for workers in ("1", scheduler):
        line = bare_line(zoo / "base", workers=workers)
        experts = [line.admitted(zoo / name) for name in ("expert-1", "expert-2")]
        scratch = tmp_path / f"scratch-{len(trees)}"
        inputs = (line.settings, Recipe(line.settings.method, {}), line.version, line.version, experts)
        candidate = fold(scratch, *inputs, lambda *each: progress.append(each))
        trees.append((hash_tree(candidate.folder), candidate.memory, candidate.overlap))
        assert len(list((scratch / "parts").glob("*.json"))) > 2
        assert progress[-1][0] == progress[-1][1]
    assert trees[0] == trees[1]


def test_the_work_is_done_on_the_cluster(zoo, bare_line, scheduler, monkeypatch):
    """This process only finds the parts that are there."""
    line = bare_line(zoo / "base")
    plan = line.plan(zoo / "expert-1")
    parts.state_parts(plan)  # a plan that was used travels too
    fold_on_cluster(scheduler, line.root / "state-0", line.root / "records-0", plan, "cpu")

    def never(*arguments):
        raise AssertionError("folded here")

    monkeypatch.setattr(first_pass, "_step", never)
    monkeypatch.setattr(first_pass, "_fold_pieces", never)
    done = line.run(plan)
    monkeypatch.undo()
    monkeypatch.setattr(parts, "PART_BYTES", 16 * 1024)
    assert done.bytes == bare_line(zoo / "base").run(plan).bytes


def test_a_cluster_is_used_from_within_a_task(zoo, bare_line, scheduler, tmp_path):
    """As the merge of an expert does."""
    from prefect import flow, task

    plan, folders = bare_line(zoo / "base").plan(zoo / "expert-1"), (tmp_path / "state", tmp_path / "records")

    @task
    def inner():
        fold_on_cluster(scheduler, *folders, plan, "cpu")

    @flow(validate_parameters=False)
    def outer():
        inner()

    outer()
    assert {path.name for path in folders[0].iterdir()} == {part.file for part in parts.state_parts(plan)}


def test_a_scheduler_that_does_not_answer_is_said(zoo, bare_line, prefect, tmp_path):
    plan = bare_line(zoo / "base").plan(zoo / "expert-1")
    with dask.config.set({"distributed.comm.timeouts.connect": "300ms"}), pytest.raises(FoldinError) as caught:
        fold_on_cluster("tcp://127.0.0.1:9", tmp_path / "state", tmp_path / "records", plan, "cpu")
    assert (caught.value.refusal.code, caught.value.refusal.where) == ("E_SERVER", "tcp://127.0.0.1:9")


def test_what_cannot_be_folded_is_said_by_its_tensor(bare_line, zoo, huge, scheduler, tmp_path):
    line = bare_line(zoo / "base")
    line.fold(huge.folder)
    with pytest.raises(FoldinError) as caught:
        fold_on_cluster(scheduler, tmp_path / "state", tmp_path / "records", line.plan(huge.folder), "cpu")
    assert (caught.value.refusal.code, caught.value.refusal.tensor) == ("E_FOLD", huge.tensor)


def die(*arguments):
    """A worker that the system takes away, for want of memory say."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.chaos
def test_a_part_that_kills_its_workers_counts_as_a_crash_of_this_process(
    zoo, bare_line, prefect, tmp_path, monkeypatch
):
    plan = bare_line(zoo / "base").plan(zoo / "expert-1")
    monkeypatch.setattr(cluster, "fold_part", die)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as doomed,
        pytest.raises(RuntimeError, match=r"workers of the Dask cluster .* died"),  # counts as an attempt
    ):
        fold_on_cluster(doomed.scheduler_address, tmp_path / "state", tmp_path / "records", plan, "cpu")
