"""Work on many tensors at once, its results in the order in which they were asked for."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import local
from typing import NamedTuple, TypeVar

from registry.files import sync

T = TypeVar("T")
AHEAD = 4  # jobs per worker: no worker waits because the next result in order is a slow one
BUDGET = 2**30  # bytes that jobs may need together before more of them are begun than there are workers


class Job(NamedTuple):
    """One piece of work."""

    run: Callable[[str], object]  # given the device of the worker
    bytes: int  # of memory that it needs, result included
    expect: Callable[[], None] = lambda: None  # asks the system to read ahead; called when the job is accepted


def devices_of(device: str, workers: int = 0) -> tuple[str, ...]:
    """Where the workers work, one entry each: every core or `workers` of them, or every GPU ("cuda:1" names one)."""
    if device == "cpu":
        return ("cpu",) * (workers or len(os.sched_getaffinity(0)))
    import torch

    return (device,) if ":" in device else tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


@contextmanager
def pool(devices: tuple[str, ...]) -> Iterator[Callable[[Iterable[Job]], Iterator[object]]]:
    """A function that runs jobs on one thread per device and yields their results in order.

    On processors a tensor is computed by one thread: different tensors fill the cores better than one tensor does, and
    the bytes of a result then depend neither on how many cores there are nor on how many are used.
    """
    import torch

    threads, numbers, mine = torch.get_num_threads(), count(), local()
    if len(devices) == 1:
        torch.set_num_threads(1)
        try:
            yield lambda jobs: _here(jobs, devices[0])
        finally:
            torch.set_num_threads(threads)
        return

    def begin() -> None:
        mine.device = devices[next(numbers)]
        torch.set_num_threads(1)

    with ThreadPoolExecutor(len(devices), "fold", begin) as executor:

        def run(jobs: Iterable[Job]) -> Iterator[object]:
            return _in_order(jobs, lambda job: executor.submit(lambda: job.run(mine.device)), len(devices))

        try:
            yield run
        finally:
            executor.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # threads made later start with what was set last, in whatever thread


@contextmanager
def syncing() -> Iterator[Callable[[Path], None]]:
    """A function that makes a file durable while other things go on; all of them are when the block ends well."""
    with ThreadPoolExecutor(1, "sync") as executor:
        begun: list[Future[None]] = []
        yield lambda path: begun.append(executor.submit(sync, path))
        for each in begun:
            each.result()


def _here(jobs: Iterable[Job], device: str) -> Iterator[object]:
    """Results of a single worker, this thread; the system reads the next job's files meanwhile."""
    waiting: deque[Job] = deque()
    for job in jobs:
        job.expect()
        waiting.append(job)
        if len(waiting) > 1:
            yield waiting.popleft().run(device)
    while waiting:
        yield waiting.popleft().run(device)


def _in_order(jobs: Iterable[Job], submit: Callable[[Job], "Future[object]"], workers: int) -> Iterator[object]:
    """Results in order, while as many jobs are under way, or waiting to be taken, as memory allows."""
    waiting: deque[tuple[Future[object], int]] = deque()
    held = 0
    for job in jobs:
        while len(waiting) >= workers and (held + job.bytes > BUDGET or len(waiting) > AHEAD * workers):
            future, size = waiting.popleft()
            yield future.result()
            del future
            held -= size
        job.expect()
        waiting.append((submit(job), job.bytes))
        held += job.bytes
    while waiting:
        yield waiting.popleft()[0].result()
