"""What a Prefect run keeps for people: the verdict as a table, the heat map, what became of an expert."""

import base64
import math
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from evaluation.escape import clean
from flows.versions import PLOTS
from registry.records import Expert, ExpertState
from registry.verdicts import Check

if TYPE_CHECKING:
    from evaluation.report import Record


PICTURES = {"accuracy-matrix": "accuracy_matrix.png", "tasks": "tasks.png", "search": "pareto.png"}


def judged(line: str, experts: str, record: "Record", folder: Path) -> None:
    """The gate's answer rule by rule, and the pictures that there are."""
    verdict = record.verdict
    assert verdict is not None
    rows = [_row(check) for check in verdict.checks]
    create_table_artifact(rows, key="verdict", description=f"{clean(line)}: {clean(experts)}: {verdict.outcome}")
    for key, name in PICTURES.items():
        picture = folder / PLOTS / name
        if picture.exists():  # what was rejected early has fewer
            data = base64.b64encode(picture.read_bytes()).decode()
            create_image_artifact(f"data:image/png;base64,{data}", key=key, description=f"{clean(line)}")


def _row(check: Check) -> dict[str, str]:
    low, high = check.interval or (math.nan, math.nan)
    return {
        "rung": check.rung,
        "rule": check.rule,
        "task": clean(check.task),
        "value": f"{check.value:.3f}",
        "limit": f"{check.threshold:g}",
        "95 % interval": f"{low:.3f} to {high:.3f}" if check.interval else "",
        "passed": "yes" if check.passed else "NO",
        "why": clean(check.text),
    }


def refused(line: str, expert: Expert, state: ExpertState, reason: str) -> None:
    """Why an expert was not folded."""
    text = f"**{clean(expert.name)}** of line **{clean(line)}** is **{state}**.\n\n```\n{clean(reason, 2000)}\n```\n"
    create_markdown_artifact(text, key="refusal", description=f"{clean(expert.name)}: {state}")
