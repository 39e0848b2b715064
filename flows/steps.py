"""The steps of a flow: Prefect tasks that take what they are given as it is."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

P = ParamSpec("P")
R = TypeVar("R")


def step(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A task that is not cached and whose result is not kept: the ledger decides what is done.

    Prefect searches arguments for results of other tasks. Here they hold every tensor's place and every expert that was
    ever folded, and no such result; `quote` spares them.
    """

    def made(work: Callable[P, R]) -> Callable[P, R]:
        run: Callable[..., R] = task(name=name, cache_policy=NO_CACHE, persist_result=False)(work)

        @wraps(work)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            quoted = {key: quote(value) for key, value in named.items()}
            return run(*map(quote, arguments), **quoted)

        return call

    return made
