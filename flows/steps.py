"""The steps of a flow: Prefect tasks that take what they are given as it is."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from flows.observing import measured
from flows.tracing import start, tag

start()  # before any flow runs: every flow that has steps imports this file

P = ParamSpec("P")
R = TypeVar("R")


def step(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A task that is not cached and whose result is not kept: the ledger decides what is done.

    Prefect searches arguments for results of other tasks. Here they hold every tensor's place and every expert that was
    ever folded, and no such result; `quote` spares them.
    """

    def made(work: Callable[P, R]) -> Callable[P, R]:
        @wraps(work)
        def tagged(*arguments: P.args, **named: P.kwargs) -> R:
            tag(name)
            return work(*arguments, **named)

        run: Callable[..., R] = task(name=name, cache_policy=NO_CACHE, persist_result=False)(tagged)

        @wraps(work)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            quoted = {key: quote(value) for key, value in named.items()}
            return measured(name, lambda: run(*map(quote, arguments), **quoted))

        return call

    return made
