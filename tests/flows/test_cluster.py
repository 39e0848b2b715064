"""The parts of a fold on a Dask cluster: two processes of their own, a real scheduler, a real Prefect server."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("prefect_dask")
pytestmark = pytest.mark.integration

import dask  # noqa: E402
from distributed import LocalCluster  # noqa: E402

from flows import first_pass, parts  # noqa: E402
from flows.admission import Admitted  # noqa: E402
from flows.cluster import fold_on_cluster  # noqa: E402
from flows.folding import fold  # noqa: E402
from flows.versions import Memory, Version  # noqa: E402
from registry.files import hash_tree  # noqa: E402
from registry.records import FoldinError  # noqa: E402

BIAS = "encoder.layer.1.output.dense.bias"


@pytest.fixture(scope="module")
def scheduler(prefect):
    """The address of a cluster of two workers with two threads each."""
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 16 * 1024)


def admitted(line, folder):
    """An expert as intake would hand it over."""
    found = line.fit(folder)
    return Admitted((folder.name, 1), "task", folder, "0" * 64, found.sha256, found.body, found.head, _suite())


def _suite():
    return SimpleNamespace(sha256="1" * 64)


def test_a_cluster_gives_the_bytes_of_this_process(zoo, bare_line, scheduler, tmp_path):
    base = Version(1, zoo / "base", "", Memory("opcm", {}, "0" * 64, "0" * 64))
    trees, progress = [], []
    for workers in ("1", scheduler):
        line = bare_line(zoo / "base", workers=workers)
        experts = [admitted(line, zoo / name) for name in ("expert-1", "expert-2")]
        scratch = tmp_path / f"scratch-{len(trees)}"
        candidate = fold(scratch, line.settings, base, base, experts, lambda *each: progress.append(each))
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


def test_what_cannot_be_folded_is_said_by_its_tensor(zoo, bare_line, scheduler, tmp_path):
    expert = shutil.copytree(zoo / "expert-1", tmp_path / "huge")
    tensors = load_file(expert / "model.safetensors")
    tensors[BIAS] = torch.full_like(tensors[BIAS], 3e38)
    save_file(tensors, expert / "model.safetensors", {"format": "pt"})
    line = bare_line(zoo / "base")
    line.fold(expert)
    with pytest.raises(FoldinError) as caught:
        fold_on_cluster(scheduler, tmp_path / "state", tmp_path / "records", line.plan(expert), "cpu")
    assert (caught.value.refusal.code, caught.value.refusal.tensor) == ("E_FOLD", BIAS)
