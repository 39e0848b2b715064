"""May this expert be folded into this line? From the registry's version to verified tensors, or to a refusal."""

import math
import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.fitting import Fitted, fit, retrain
from flows.options import LineConfig
from flows.signing import accepted_of, check_expert
from flows.versions import Version
from flows.wiring import House
from registry import intake
from registry.files import read_json, shown
from registry.manifests import MANIFEST
from registry.records import Expert, ExpertVersion, FoldinError, Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.suites import Suite
    from registry.weights import Checkpoint

TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Admitted:
    """An expert whose every file and tensor was looked at; only this copy is used from here on."""

    name: tuple[str, int]  # registered model and version
    task: str
    folder: Path  # the copy in the content store
    tree_sha256: str  # digest of its files
    weights_sha256: str  # content digest of its tensors
    body: Fitted  # the tensors that the base has, as the base would hold them
    head: "Checkpoint"  # those it lacks: the task's head
    suite: "Suite"
    weight: float = 1.0  # what its change is multiplied by

    @property
    def whole(self) -> "Mapping[str, Tensor]":
        """The expert as a model of its own: what it lacks is the base's."""
        return ChainMap(self.body, self.body.base)  # type: ignore[arg-type]  # only read


def admit(
    house: House,
    settings: LineConfig,
    base: Version,
    expert: Expert,
    found: ExpertVersion,
    archived: intake.Admitted | None = None,
) -> Admitted | Refusal:
    """The expert, ready to be folded; or why it may not be.

    `archived` is what its archive gave back, where the original is gone: the signature was of the original, and
    `readmit` looks at it.

    Errors that are not the expert's (MLflow or the ledger out of reach, a full disk, whatever is wrong with the files
    of the base, a broken suite of the line's own) are raised.
    """
    where = f"expert {expert.name}"
    task = declared_task(found)
    own = None
    if task in settings.suites:
        own = suite_of(settings, task, house.experts, f"suite of task {task} in [lines.{expert.line}.suites]")
    accepts = accepted_of(settings, expert.line, "experts")
    try:
        refusal = _check_tags(base, found, task, where) or _check_guards(settings, task, where)
        if refusal:
            return refusal
        files = archived or intake.admit(house.mlflow.fetch(found), house.experts, where, keep=house.far)
        if isinstance(files, Refusal):
            raise FoldinError(files)
        refusal = None if archived else check_expert(accepts, files, where)
        if refusal:
            return refusal
        admitted = _read(base, (expert.model, expert.version), task, files, own, where)
        return admitted if isinstance(admitted, Refusal) else replace(admitted, weight=declared_weight(found))
    except FoldinError as error:
        if error.refusal.code in TRANSIENT:
            raise
        if error.refusal.where == base.where:
            remedy = "restore the version's artifacts, or start a new line"
            raise FoldinError(replace(error.refusal, remedy=remedy)) from error
        remedy = error.refusal.remedy or "correct it and register the result as a new version"
        return replace(error.refusal, where=where, remedy=remedy)


def _check_guards(settings: LineConfig, task: str, where: str) -> Refusal | None:
    if task not in settings.guards:
        return None
    what, expected = "the task has the name of one of the line's guards", f"none of {', '.join(settings.guards)}"
    return Refusal("E_TASK", what, where, "", "", expected, task, "register it again with another foldin.task")


# Not the expert's fault: it stays pending, and the run ends with the error. E_DIGEST is damage in foldin's own folders.
TRANSIENT = frozenset(
    {
        *("E_MLFLOW", "E_S3", "E_EXISTS", "E_LEDGER", "E_LOCKED", "E_DISK", "E_DIGEST"),
        *("E_FENCED", "E_ALIAS", "E_METHOD"),
    }
)


def declared_task(found: ExpertVersion) -> str:
    """The task an expert declares, fit to be printed; "" when it declares none.

    A tag is a stranger's text and goes into logs and terminals before it is judged. Escaped, it can pass for no other.
    """
    return shown(found.tags.get("foldin.task", "").strip())


def declared_weight(found: ExpertVersion) -> float:
    """What an expert's change shall be multiplied by, 1 when it does not say; NaN when that cannot be used."""
    text = found.tags.get("foldin.weight", "").strip()
    if not re.fullmatch(r"|\d{1,3}(\.\d{1,9})?", text):
        return math.nan
    return float(text or 1) or math.nan


def suite_of(settings: LineConfig, task: str, folder: Path, where: str) -> "Suite":
    """The suite that measures a task: the line's own when it names one, else the one that came with the expert."""
    from evaluation.suites import load_suite

    own = settings.suites.get(task)
    return load_suite(Path(own) if own else folder, task=task, where=where, trusted=own is not None)


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
    if math.isnan(declared_weight(found)):
        return Refusal(
            code="E_WEIGHT",
            what="the expert's weight cannot be used",
            where=where,
            expected="a tag foldin.weight such as 0.5, above 0 and below 1000, or none",
            found=shown(found.tags["foldin.weight"]),
            remedy="register it again with a plain number, or without the tag",
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
    if not declared:
        return None
    return intake.base_matches(declared, base_digests(base.folder, base.memory.base_sha256, base.where), where)


def base_digests(folder: Path, weights_sha256: str, where: str) -> list[str]:
    """What may be declared as the base: the content digest of its weights, or the SHA-256 of its one weight file.

    Args:
        folder: of the version that holds the base.
        weights_sha256: content digest of its weights.
        where: names that version in messages.
    """
    files = read_json(folder / MANIFEST, where)["files"]
    weights = [digest for name, digest in files.items() if "/" not in name and name.endswith(".safetensors")]
    return [weights_sha256, *(weights if len(weights) == 1 else [])]


def _read(
    base: Version, name: tuple[str, int], task: str, files: intake.Admitted, named: "Suite | None", where: str
) -> Admitted | Refusal:
    from evaluation.suites import load_suite

    refusal = None if files.is_adapter else _check_config(base, files, where)
    if refusal:
        return refusal
    suite = named or load_suite(files.folder, task=task, where=where)
    fitted = fit(base, files, suite.kind.endswith("-classification"), where)
    if isinstance(fitted, Refusal):
        return fitted
    return Admitted(name, task, files.folder, files.tree_sha256, fitted.sha256, fitted.body, fitted.head, suite)


def _check_config(base: Version, files: intake.Admitted, where: str) -> Refusal | None:
    """Why config.json describes a model that cannot be folded into this base; None when it does not."""
    config, own = read_json(files.folder / "config.json", where), read_json(base.folder / "config.json", base.where)
    if config.get("quantization_config"):
        what, remedy = "the weights are quantised", "register the expert's weights as they were before quantisation"
        found = shown(config["quantization_config"])
        return Refusal("E_DTYPE", what, where, "config.json", "", "float weights", found, remedy)
    differs = intake.architecture_differs(own, config)
    if not differs:
        return None
    field, expected, got = differs
    return Refusal(
        "E_SCHEMA", f"config.json has another {field}", where, "config.json", "", expected, got, retrain(base)
    )
