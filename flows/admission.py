"""May this expert be folded into this line? From the registry's version to verified tensors, or to a refusal."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.config import LineConfig
from flows.versions import Version
from flows.wiring import House
from registry import intake
from registry.files import MANIFEST, read_json, shown
from registry.records import Expert, ExpertVersion, FoldinError, Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.suites import Suite
    from registry.weights import Checkpoint

TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Admitted:
    """An expert whose every file and tensor was looked at; only this copy is used from here on."""

    task: str
    folder: Path  # the copy in the content store
    tree_sha256: str  # digest of its files
    weights_sha256: str  # content digest of its tensors
    body: "Checkpoint"  # the tensors that the base has, by the base's names
    head: "Checkpoint"  # those it lacks: the task's head
    moved: frozenset[str]  # names of the body's tensors that differ from the base's
    suite: "Suite"


def admit(
    house: House, settings: LineConfig, base: Version, expert: Expert, found: ExpertVersion
) -> Admitted | Refusal:
    """The expert, ready to be folded; or why it may not be.

    Errors that are not the expert's (MLflow or the ledger out of reach, a full disk, a broken suite of the line's own)
    are raised.
    """
    where = f"expert {expert.name}"
    task = declared_task(found)
    own = None
    if task in settings.suites:
        own = suite_of(settings, task, house.experts, f"suite of task {task} in [lines.{expert.line}.suites]")
    try:
        refusal = _check_tags(base, found, task, where)
        if refusal:
            return refusal
        files = intake.admit(house.mlflow.fetch(found), house.experts, where)
        if isinstance(files, Refusal):
            raise FoldinError(files)
        return _read(base, task, files, own, where)
    except FoldinError as error:
        if error.refusal.code in TRANSIENT:
            raise
        remedy = error.refusal.remedy or "correct it and register the result as a new version"
        return replace(error.refusal, where=where, remedy=remedy)


# Not the expert's fault: it stays pending, and the run ends with the error. E_DIGEST is damage in foldin's own folders.
TRANSIENT = frozenset({"E_MLFLOW", "E_LEDGER", "E_LOCKED", "E_DISK", "E_DIGEST", "E_FENCED", "E_ALIAS", "E_METHOD"})


def declared_task(found: ExpertVersion) -> str:
    """The task an expert declares, fit to be printed; "" when it declares none.

    A tag is a stranger's text and goes into logs and terminals before it is judged. Escaped, it can pass for no other.
    """
    return shown(found.tags.get("foldin.task", "").strip())


def suite_of(settings: LineConfig, task: str, folder: Path, where: str) -> "Suite":
    """The suite that measures a task: the line's own when it names one, else the one that came with the expert."""
    from evaluation.suites import load_suite

    own = settings.suites.get(task)
    return load_suite(Path(own) if own else folder, task=task, where=where)


def _check_tags(base: Version, found: ExpertVersion, task: str, where: str) -> Refusal | None:
    if not task:
        return Refusal(
            code="E_TASK",
            what="the version has no tag foldin.task",
            where=where,
            expected="the name of the task it was trained for",
            remedy="register it again with the tag foldin.task set",
        )
    if not TASK.fullmatch(task):
        return Refusal(
            code="E_TASK",
            what="the task's name is not plain",
            where=where,
            expected="letters, digits, '.', '_' and '-', at most 64",
            found=task,
            remedy="register it again with a plain foldin.task",
        )
    if found.tags.get("foldin.weight", "1").strip() not in {"", "1", "1.0"}:
        return Refusal(
            code="E_WEIGHT",
            what="weights per expert are not supported yet",
            where=where,
            expected="no tag foldin.weight, or 1",
            found=shown(found.tags["foldin.weight"]),
            remedy="register it again without the tag",
        )
    if found.status not in {"READY", "LoggedModelStatus.READY"}:
        return Refusal(
            code="E_SOURCE",
            what="the model behind the version is not ready",
            where=where,
            expected="status READY",
            found=f"status {found.status}",
            remedy="finish the upload and register a new version",
        )
    declared = found.tags.get("foldin.base_sha256", "")
    return (
        intake.base_matches(declared, base_digests(base.folder, base.memory.base_sha256), where) if declared else None
    )


def base_digests(folder: Path, weights_sha256: str) -> list[str]:
    """What may be declared as the base: the content digest of its weights, or the SHA-256 of its one weight file.

    Args:
        folder: of the version that holds the base.
        weights_sha256: content digest of its weights.
    """
    files = read_json(folder / MANIFEST)["files"]
    weights = [digest for name, digest in files.items() if "/" not in name and name.endswith(".safetensors")]
    return [weights_sha256, *(weights if len(weights) == 1 else [])]


def _read(base: Version, task: str, files: intake.Admitted, named: "Suite | None", where: str) -> Admitted | Refusal:
    from evaluation import models
    from evaluation.suites import load_suite
    from registry.weights import Checkpoint, content_sha256

    differs = intake.architecture_differs(
        read_json(base.folder / "config.json"), read_json(files.folder / "config.json")
    )
    if differs:
        field, expected, got = differs
        return Refusal(
            "E_SCHEMA", f"config.json has another {field}", where, "config.json", "", expected, got, _retrain(base)
        )
    suite = named or load_suite(files.folder, task=task, where=where)
    whole = Checkpoint.open(files.folder, where)
    weights = base.weights()
    body = _aligned(whole, weights, models.base_prefix(base.folder, list(weights)))
    refusal = _check_names(weights, body, suite.kind, where, base)
    if refusal:
        return refusal
    seen = _Seen(weights, where)
    digest, _ = content_sha256(body, visit=seen.look)
    if seen.refusal:
        return seen.refusal
    own = body.only([name for name in body if name in weights.specs])
    head = body.only([name for name in body if name not in weights.specs])
    return Admitted(task, files.folder, files.tree_sha256, digest, own, head, frozenset(seen.moved), suite)


class _Seen:
    """What one pass over an expert's tensors finds: a value that is not finite, and which tensors moved."""

    def __init__(self, base: "Checkpoint", where: str) -> None:
        self._base = base
        self._where = where
        self.refusal: Refusal | None = None
        self.moved: list[str] = []

    def look(self, name: str, tensor: "Tensor") -> None:
        """Look at one tensor of the expert, by the base's name."""
        import torch

        from merging.check import check_finite

        # Folds are made in float32: a float64 value beyond its range is as bad as an infinity.
        found = check_finite(name, tensor.float() if tensor.dtype == torch.float64 else tensor)
        if found and not self.refusal:
            remedy = "train it again; a value that is not finite would spread to every tensor of the merged model"
            self.refusal = Refusal(found.code, found.what, self._where, "", name, found.expected, found.found, remedy)
        if name in self._base.specs and not torch.equal(tensor, self._base[name].to(tensor.dtype)):
            self.moved.append(name)


def _aligned(expert: "Checkpoint", base: "Checkpoint", prefix: str) -> "Checkpoint":
    """The expert by the base's names: task models store the base's tensors below a prefix such as `vit.`."""
    if prefix and not any(name in base.specs for name in expert.specs):
        return expert.prefixed(prefix)
    return expert


def _check_names(base: "Checkpoint", expert: "Checkpoint", kind: str, where: str, version: Version) -> Refusal | None:
    from merging.check import check_schema

    modules = {name.partition(".")[0] for name in base.specs}
    has_head = kind.endswith("-classification")
    findings = check_schema(
        base.specs, expert.specs, heads=lambda name: has_head and name.partition(".")[0] not in modules
    )
    if not findings:
        return None
    first, more = findings[0], len(findings) - 1
    what = first.what + (f" (and {more} more tensor{'s' * (more > 1)} differ{'s' * (more == 1)})" if more else "")
    return Refusal(first.code, what, where, "", first.tensor, first.expected, first.found, _retrain(version))


def _retrain(base: Version) -> str:
    return f"fine-tune it from this line's base (weights {base.memory.base_sha256[:12]}) and export every tensor of it"
