"""A line's lineage as a Mermaid flowchart, which GitHub, GitLab and many notebooks draw."""

from collections.abc import Iterator, Mapping
from typing import Any

from evaluation.escape import clean

STYLES = (
    "classDef champion stroke-width:4px",
    "classDef left stroke-dasharray:4 4",
    "classDef refused stroke:#c43d00,stroke-dasharray:2 2",
)


def mermaid(facts: Mapping[str, Any]) -> str:
    """The text of the flowchart, from what `reading.log` says; strangers' words lose what would end their quotes."""
    return "\n".join(["flowchart TD", *_lines(facts), *(f"  {style}" for style in STYLES)])


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    for node in facts["versions"]:
        number, kind = node["version"], "" if node["in_champion"] else ":::left"
        kind = ":::champion" if number == facts["champion"] else kind
        told = f"+ {node['task']}<br/>{_words(node['expert'])}" if node["expert"] else "base"
        yield f'  v{number}["v{number}<br/>{_words(told, 400)}"]{kind}'
        if node["parent"] is not None:
            yield f"  v{node['parent']} --> v{number}"
    refused = (each for each in facts["experts"] if each["state"] in ("rejected", "quarantined") and each["into"])
    for place, each in enumerate(refused, 1):
        told = f"{each['task']}<br/>{each['name']}<br/>{each['state']}"
        yield f'  x{place}["{_words(told, 400)}"]:::refused'
        yield f"  v{each['into']} -.-x x{place}"


def _words(text: str, limit: int = 120) -> str:
    """A label's text: no quote may end it, and no tag but a line break is one."""
    plain = clean(text, limit).replace("<br/>", "\n")
    for mark, entity in (("#", "#35;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        plain = plain.replace(mark, entity)
    return plain.replace("\n", "<br/>")
