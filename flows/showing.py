"""What a Prefect run keeps for people: the verdict as a table, the heat map, what became of an expert."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from evaluation.escape import clean
from registry.records import Expert, ExpertState

if TYPE_CHECKING:
    from evaluation.report import Record


def judged(line: str, expert: Expert, record: "Record", folder: Path) -> None:
    """The gate's answer rule by rule, and the accuracy matrix."""
    verdict = record.verdict
    assert verdict is not None
    rows = [
        {"rule": check.rule, "task": check.task, "passed": "yes" if check.passed else "NO", "why": clean(check.text)}
        for check in verdict.checks
    ]
    create_table_artifact(rows, key="verdict", description=f"{clean(line)}: {clean(expert.name)}: {verdict.outcome}")
    picture = folder / "foldin/plots/accuracy_matrix.png"
    if not picture.exists():  # rejected before everything was measured
        return
    data = base64.b64encode(picture.read_bytes()).decode()
    create_image_artifact(f"data:image/png;base64,{data}", key="accuracy-matrix", description=f"{clean(line)}")


def refused(line: str, expert: Expert, state: ExpertState, reason: str) -> None:
    """Why an expert was not folded."""
    text = f"**{clean(expert.name)}** of line **{clean(line)}** is **{state}**.\n\n```\n{clean(reason, 2000)}\n```\n"
    create_markdown_artifact(text, key="refusal", description=f"{clean(expert.name)}: {state}")
