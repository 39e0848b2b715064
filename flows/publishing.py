"""From a judged candidate to MLflow: its run, the tries of a search, the registered version."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.folding import Candidate
from flows.memory import Memory
from flows.naming import listed
from flows.signing import sign_version
from flows.versions import ANSWERS, PAGE_FILE, PLOTS, REPORT_FILE, Version
from flows.wiring import House, code_facts
from registry.far import write_digests
from registry.files import read_json, sha256_file
from registry.manifests import MANIFEST, verify_manifest, write_manifest
from registry.records import Expert, FoldinError, Refusal
from registry.verdicts import Report, Try, Verdict

if TYPE_CHECKING:
    from evaluation.report import Record


def metrics_of(record: "Record") -> dict[str, float]:
    """What MLflow shows as metrics: every task's, the sequence's summary, and what the gate took."""
    return {
        **scores_of(record.report),
        **dict(record.summary),
        **{f"seconds.{name}": value for name, value in record.seconds.items()},
    }


def scores_of(report: Report) -> dict[str, float]:
    """METRIC.TASK -> what was measured on the rows of the gate."""
    return {f"{each.metric}.{task}": each.value for task, each in report.scores.items() if each.split == "gate"}


def show(
    house: House,
    line: str,
    run_id: str,
    experts: Sequence[Expert],  # that were folded, in their order
    candidate: Candidate,
    record: "Record",
    inputs: Sequence[str],
) -> None:
    """Put a judged merge on its MLflow run: whether it passed or not, and why."""
    verdict, folder, memory = record.verdict, candidate.folder, candidate.memory
    assert verdict is not None
    kept = [(path, path.parent.name) for name in (PLOTS, ANSWERS) for path in sorted((folder / name).glob("*"))]
    settings = house.config.line(line)
    # Parameters cannot be written twice, and a search that is made again may choose otherwise: what it chose is a tag.
    names, tasks = listed([each.name for each in experts]), listed([each.task for each in experts])
    facts = {"line": line, "expert": names, "task": tasks, "method": settings.method}
    house.mlflow.runs.show(
        run_id,
        params={**facts, **settings.parameters},
        metrics=metrics_of(record),
        tags={
            "foldin.verdict": verdict.outcome,
            "foldin.rung": verdict.rung,
            "foldin.method": memory.method,
            "foldin.reason": verdict.reason,
            "foldin.search": record.lineage.get("search", ""),
            "foldin.parameters": json.dumps(dict(memory.parameters), sort_keys=True),
            "foldin.weight": ", ".join(f"{each.weight:g}" for each in memory.experts[-len(experts) :]),
            "foldin.expert": names,
        },
        artifacts=[(folder / REPORT_FILE, ""), (folder.parent / Path(PAGE_FILE).name, ""), *kept],
        inputs=inputs,
    )


def show_try(house: House, run_id: str, tried: Try) -> None:
    """One try of a search as a child of the merge's MLflow run."""
    house.mlflow.runs.show_child(
        run_id,
        tried.name,
        params={"method": tried.method, "weight": tried.weight, **tried.parameters},
        metrics={
            "tune.old": tried.old,
            "tune.new": tried.new,
            "chosen": float(tried.chosen),
            "front": float(tried.best),
        },
        tags={"foldin.passed": str(tried.passed).lower(), "foldin.reason": tried.reason, "foldin.split": "tune"},
    )


def write_version_manifest(
    folder: Path,
    line: str,
    merge_key: str,
    parent: Version | None,
    verdict: Verdict,
    known: Mapping[str, str],  # as in `hash_tree`
    *,
    far: bool,  # the version's weights will lie in S3
) -> str:
    """Write the manifest, after everything else; its digest. Nothing in it depends on when or where it was made."""
    memory = Memory.read(folder)
    if far:
        write_digests(folder)
    return write_manifest(
        folder,
        {
            "line": line,
            "merge_key": merge_key,
            "parent": {"version": parent.number, "manifest_sha256": parent.manifest_sha256} if parent else None,
            "base_sha256": memory.base_sha256,
            "weights_sha256": memory.weights_sha256,
            "experts": [expert._asdict() for expert in memory.experts],
            "method": memory.method,
            "parameters": dict(memory.parameters),
            "suites": dict(memory.suites),
            "verdict": verdict.outcome,
            "profile": dict(memory.profile),
            "code": code_facts(),
        },
        known,
    )


def register(
    house: House, line: str, merge_key: str, run_id: str, folder: Path, metrics: Mapping[str, float], many: int
) -> tuple[int, str]:
    """The registered version of a finished folder and its manifest's digest; found again when a run got that far.

    `many` is how many experts were folded to get it from its parent.

    What is found may have been made under another numerics profile, so it is judged by its own manifest.

    Raises:
        FoldinError: E_DIGEST when the version that carries this merge key is damaged or another merge's; as
            `sign_version`.
    """
    memory = Memory.read(folder)
    added = memory.experts[len(memory.experts) - many :]
    tags = {
        "foldin.manifest_sha256": sha256_file(folder / MANIFEST),
        "foldin.weights_sha256": memory.weights_sha256,
        "foldin.base_sha256": memory.base_sha256,
        "foldin.experts": str(len(memory.experts)),
        "foldin.expert": listed([f"{each.model} v{each.version}" for each in added]),
        "foldin.method": memory.method,
        "foldin.verdict": read_json(folder / MANIFEST)["verdict"],
    }
    names = ", ".join(f"{each.task} ({each.model} v{each.version})" for each in added)
    told = f"adds {names}; {len(memory.experts)} experts in all" if added else "the base"
    version = house.mlflow.publish(line, merge_key, run_id, folder, description=told, metrics=metrics, tags=tags)
    stored = house.mlflow.folder(line, version)
    wrong = verify_manifest(stored)
    if not wrong and read_json(stored / MANIFEST)["merge_key"] != merge_key:
        wrong = [Refusal("E_DIGEST", "the version that carries this merge key is another merge's", file=MANIFEST)]
    if wrong:
        remedy = f"delete the tag foldin.merge_key of {line} v{version}; foldin then registers the merge again"
        raise FoldinError(replace(wrong[0], where=f"{line} v{version}", remedy=remedy))
    sign_version(house, line, version, stored)  # before anything can make it champion
    return version, sha256_file(stored / MANIFEST)
