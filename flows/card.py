"""README.md of a version: what is in it, how good it is, how to load it, with Hugging Face's metadata on top.

Facts only, and no dates: equal versions have equal cards. https://huggingface.co/docs/hub/model-cards
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from evaluation.escape import markdown
from flows.memory import Memory
from flows.versions import Version

if TYPE_CHECKING:
    from evaluation.report import Record

CARD_FILE = "README.md"
METADATA = ("---", "library_name: transformers", "tags: [merge, foldin, continual-merging]", "---")


def card(line: str, parent: Version, memory: Memory, record: "Record") -> str:
    """The card of a version that was folded into `parent`; whatever strangers named is escaped."""
    parts = [
        *METADATA,
        f"# {markdown(line)}",
        "",
        f"A merge of {len(memory.experts)} fine-tuned experts of one base, folded one after the other by foldin "
        f"with {markdown(memory.method)}{_parameters(memory)}.",
        "It loads with transformers' `from_pretrained`; nothing of foldin is needed.",
        "",
        *_experts(memory),
        *_scores(record),
        "## Lineage",
        "",
        *(f"- {name}: {markdown(text)}" for name, text in _lineage(parent, memory).items()),
        "",
    ]
    return "\n".join(parts)


def _experts(memory: Memory) -> Iterator[str]:
    yield "## Experts, in the order of folding"
    yield ""
    yield "| | expert | task | weight | weights, SHA-256 |"
    yield "|---|---|---|---|---|"
    for place, each in enumerate(memory.experts, 1):
        name = f"{markdown(each.model)} v{each.version}"
        yield f"| {place} | {name} | {markdown(each.task)} | {each.weight:g} | `{each.weights_sha256[:16]}` |"
    yield ""


def _scores(record: "Record") -> Iterator[str]:
    scores = {name: each for name, each in record.report.scores.items() if not each.error}
    if not scores:
        return
    yield "## How good it is"
    yield ""
    yield "| task | metric | value | rows |"
    yield "|---|---|---|---|"
    for name, each in scores.items():
        yield f"| {markdown(name)} | {each.metric} | {each.value:.3f} | {each.examples} |"
    verdict = record.verdict
    if verdict is not None:
        yield ""
        yield f"The gate: {verdict.outcome}{f' ({markdown(verdict.reason, 400)})' if verdict.reason else ''}."
    yield ""


def _parameters(memory: Memory) -> str:
    told = ", ".join(f"{key} = {value}" for key, value in memory.used.items())
    return f" ({markdown(told)})" if told else ""


def _lineage(parent: Version, memory: Memory) -> Mapping[str, str]:
    return {
        "parent": f"v{parent.number}",
        "parent's manifest": parent.manifest_sha256,
        "base weights": memory.base_sha256,
        "weights": memory.weights_sha256,
        "numerics profile": ", ".join(f"{key} {value}" for key, value in memory.profile.items()),
        "everything": "foldin/manifest.json, foldin/state.json and foldin/report.json",
    }
