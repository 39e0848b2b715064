"""Telling people elsewhere what became of an expert, through the notification blocks that Prefect keeps."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from evaluation.escape import clean
from flows.options import LineConfig
from flows.telling import say

ADDRESS = re.compile(r"\S+://\S+")  # of a webhook: whoever knows it can post there
HEARD = {"folded": "promoted", "needs-approval": "waits for a person", "rejected": "rejected"}
HEARD |= {"quarantined": "quarantined", "approved": "approved", "declined": "declined"}


def notify(settings: LineConfig, line: str, outcome: Mapping[str, Any]) -> None:
    """Send what became of an expert to every block that the line names; what cannot be sent is said, never raised.

    Args:
        settings: the line's, with the blocks as TYPE/NAME.
        line: its name.
        outcome: expert, state, reason and version, as a fold or a decision returns them.
    """
    if not settings.notify or outcome["state"] not in HEARD:
        return
    version = f" v{outcome['version']}" if outcome["version"] else ""
    subject = clean(f"foldin: {line}{version}: {outcome['expert']} {HEARD[outcome['state']]}", 200)
    lines = [subject, clean(str(outcome["reason"] or ""), 1000), _next(line, outcome)]
    send(settings, subject, "\n".join(filter(None, lines)))


def send(settings: LineConfig, subject: str, text: str) -> None:
    """Send a text to every block that the line names; what cannot be sent is said, never raised."""
    for slug in settings.notify:
        with spared(f"notification block {slug}"):
            block = _load(slug)
            with block.raise_on_failure():
                block.notify(text, subject)


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block is said and logged, without addresses: they may be secrets."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - other people's blocks and servers; none of it may fail a fold
        say(f"{what} could not be used: {type(error).__name__}: {clean(ADDRESS.sub('…', str(error)), 240)}")


def _load(slug: str) -> Any:  # noqa: ANN401 - a block of any type
    """The block that Prefect keeps under TYPE/NAME."""
    import prefect.blocks.notifications  # noqa: F401 - makes Prefect's own types known
    from prefect.blocks.core import Block

    return Block.load(slug)


def _next(line: str, outcome: Mapping[str, Any]) -> str:
    """What a person can do."""
    if outcome["state"] == "needs-approval":
        which = f"{line} {outcome['version']} --because TEXT"
        return f"foldin approve {which}, or foldin reject {which}"
    return f"foldin log {line}"
