"""Work on many tensors at once: in order, within the memory that is allowed, on one thread a tensor."""

import os
import threading
from time import sleep

import pytest
import torch

from flows import pool as module
from flows.pool import Job, devices_of, pool, syncing

WORKERS = [("cpu",), ("cpu",) * 2, ("cpu",) * 5]
each_number = pytest.mark.parametrize("devices", WORKERS, ids=["1 worker", "2 workers", "5 workers"])


@each_number
def test_results_come_in_the_order_of_the_jobs(devices):
    def job(number):
        def run(device):
            sleep(0.02 if number % 4 == 0 else 0)  # the later ones are ready first
            return number, device

        return Job(run, 1)

    with pool(devices) as run:
        assert list(run(map(job, range(30)))) == [(number, "cpu") for number in range(30)]
        assert list(run(map(job, range(3)))) == [(number, "cpu") for number in range(3)]
        assert list(run([])) == []


@each_number
def test_an_error_comes_where_the_result_would_and_ends_the_work(devices):
    started = []

    def job(number):
        def run(device):
            started.append(number)
            if number == 3:
                raise ValueError("the fourth job")
            return number

        return Job(run, 1)

    got = []
    with pytest.raises(ValueError, match="the fourth job"), pool(devices) as run:
        got.extend(run(map(job, range(1000))))
    assert got == [0, 1, 2]
    assert len(started) < 100


@each_number
def test_the_jobs_are_taken_as_they_are_needed(devices):
    """A thousand tensors are not all asked for, nor read ahead, before the first is folded."""
    asked, expected = [], []

    def jobs():
        for number in range(1000):
            asked.append(number)
            yield Job(lambda device: None, 1, lambda number=number: expected.append(number))

    with pool(devices) as run:
        results = run(jobs())
        next(results)
        assert len(asked) <= 2 + (module.AHEAD + 1) * len(devices)
        assert asked[: len(expected)] == expected
        assert len(expected) > 1  # the next one is read while this one is computed


@pytest.mark.parametrize(("size", "held"), [(40, 2), (20, 5), (500, 2), (1, 9)])
def test_jobs_are_begun_before_their_results_are_taken_within_the_budget(monkeypatch, size, held):
    """At least one a worker, at most AHEAD more a worker, and between the two as many as there is memory for."""
    monkeypatch.setattr(module, "BUDGET", 100)
    begun = []
    with pool(("cpu",) * 2) as run:
        results = run(Job(begun.append, size) for _ in range(100))
        for taken in range(1, 4):
            next(results)
            sleep(0.1)  # whatever may begin has begun
            assert held <= len(begun) - taken + 1 <= held + 1


def test_every_worker_has_a_job_however_large_they_are(monkeypatch):
    """A model of large matrices keeps all cores, or all GPUs, busy."""
    monkeypatch.setattr(module, "BUDGET", 100)
    together = threading.Barrier(4, timeout=10)
    with pool(("cpu",) * 4) as run:
        assert len(list(run(Job(lambda device: together.wait(), 10_000) for _ in range(8)))) == 8


def test_files_are_durable_when_the_block_ends(tmp_path, monkeypatch):
    asked, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (asked.append(os.readlink(f"/proc/self/fd/{descriptor}")), real(descriptor))
    )
    files = [tmp_path / str(number) for number in range(3)]
    with syncing() as later:
        for file in files:
            file.write_text("x")
            later(file)
    assert [name for name in asked if name != str(tmp_path)] == [str(file) for file in files]
    assert asked[-1] == str(tmp_path)  # the names too
    with pytest.raises(FileNotFoundError), syncing() as later:
        later(tmp_path / "no such file")


@each_number
def test_a_tensor_is_computed_by_one_thread_and_the_number_is_restored(devices):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pool(devices) as run:
            inside = set(run([Job(lambda device: torch.get_num_threads(), 1)] * 12))
        assert inside == {1}
        assert torch.get_num_threads() == 3
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
        with pytest.raises(ValueError, match="broken"), pool(devices) as run:
            list(run([Job(_broken, 1)]))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def _broken(device):
    raise ValueError("broken")


def test_every_worker_has_its_device():
    devices = ("cuda:0", "cuda:1", "cuda:2")  # names only: nothing is computed there
    both = threading.Barrier(3)

    def run_there(device):
        both.wait(timeout=10)
        return device

    with pool(devices) as run:
        assert set(run([Job(run_there, 1)] * 3)) == set(devices)


def test_devices_are_what_the_settings_name(monkeypatch):
    assert devices_of("cpu", 3) == ("cpu",) * 3
    assert set(devices_of("cpu")) == {"cpu"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cuda") == ("cuda:0", "cuda:1")
    assert devices_of("cuda:1") == ("cuda:1",)
