"""What the work at hand is about: line, expert, parent, merge key, version. Log lines and spans carry it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

Facts = Mapping[str, str | int]

_FACTS: ContextVar[Facts] = ContextVar("foldin_about", default=MappingProxyType({}))


def facts() -> Facts:
    """What is known now."""
    return _FACTS.get()


@contextmanager
def about(**more: str | int) -> Iterator[None]:
    """All that happens in the block is about this as well; what `learn` adds in it is forgotten with it."""
    token = _FACTS.set({**_FACTS.get(), **more})
    try:
        yield
    finally:
        _FACTS.reset(token)


def learn(**more: str | int) -> None:
    """From now to the end of the block it is about this as well."""
    _FACTS.set({**_FACTS.get(), **more})
