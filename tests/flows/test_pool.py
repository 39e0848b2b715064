"""Work on many tensors at once: in order, within the memory that is allowed, on one thread a tensor."""

import threading
from time import sleep

import pytest
import torch

from flows import pool as module
from flows.pool import Job, devices_of, pool

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


class Scales:
    """Weighs what is under way."""

    def __init__(self):
        self.lock, self.now, self.most, self.together = threading.Lock(), 0, 0, 0

    def job(self, size, jobs=1):
        def run(device):
            with self.lock:
                self.now += size
                self.most = max(self.most, self.now)
            sleep(0.01)
            with self.lock:
                self.now -= size
            return size

        return Job(run, size)


def test_the_jobs_under_way_keep_within_the_budget(monkeypatch):
    monkeypatch.setattr(module, "BUDGET", 100)
    sizes, scales = [40, 40, 40, 10, 90, 10, 60, 60, 30, 30, 30] * 2, Scales()
    with pool(("cpu",) * 4) as run:
        assert list(run(map(scales.job, sizes))) == sizes
    assert 60 < scales.most <= 100


def test_a_job_larger_than_the_budget_has_the_machine_to_itself(monkeypatch):
    monkeypatch.setattr(module, "BUDGET", 100)
    sizes, scales = [40, 40, 500, 40, 40], Scales()
    with pool(("cpu",) * 4) as run:
        assert list(run(map(scales.job, sizes))) == sizes
    assert scales.most == 500


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
