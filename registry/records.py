"""The value types that cross a border between packages. Standard library only, so that importing them costs nothing."""

import errno
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from registry.logins import without_logins
from registry.verdicts import Outcome, Verdict

# What the system says of itself when a file cannot be opened or read; it says nothing against the file.
SYSTEM_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)
DAY = 86400.0  # seconds; what is younger and unfinished may be somebody's work


class FoldinError(Exception):
    """What is wrong, where, what was expected and found, and what to do: the one exception foldin raises on purpose."""

    def __init__(self, refusal: "Refusal") -> None:
        super().__init__(str(refusal))
        self.refusal = refusal

    def __reduce__(self) -> tuple[type["FoldinError"], tuple["Refusal"]]:
        """Travels between processes with its facts."""
        return FoldinError, (self.refusal,)


@dataclass(frozen=True)
class Refusal:
    """Why something may not be used. A value: intake returns it, the ledger stores it, the command line prints it."""

    code: str  # E_FORMAT, E_SCHEMA, E_NONFINITE, E_BASE, E_DIGEST, E_SUITE, E_CONFIG, E_UNREACHABLE, ...
    what: str  # one clause: "the tensor has another shape than the base's"
    where: str = ""  # "expert demo-experts v3", "suite of task city", ...
    file: str = ""  # file name inside the checkpoint
    tensor: str = ""  # tensor name
    expected: str = ""
    found: str = ""
    remedy: str = ""  # an imperative clause: "re-export it from base 9f2c…"

    def __str__(self) -> str:
        place = ", ".join(
            text
            for text in (
                self.where,
                self.file and f"file {self.file}",
                self.tensor and f"tensor {self.tensor}",
            )
            if text
        )
        facts = " ".join(
            text
            for text in (
                self.expected and f"Expected {self.expected}.",
                self.found and f"Found {self.found}.",
            )
            if text
        )
        sentence = f"{place}: {self.what}" if place else self.what
        parts = (
            f"{self.code} {sentence}.",
            facts,
            self.remedy and f"{self.remedy[0].upper()}{self.remedy[1:]}.",
        )
        return without_logins(" ".join(part for part in parts if part))


class ExpertState(StrEnum):
    """Where an expert stands. Every registered expert is in exactly one of these."""

    PENDING = "pending"
    FOLDED = "folded"
    REJECTED = "rejected"  # the gate said no
    QUARANTINED = "quarantined"  # intake refused it; never merged
    WITHDRAWN = "withdrawn"  # deleted in MLflow before it was folded
    ROLLED_BACK = "rolled-back"  # was folded; the champion no longer contains it


class TensorSpec(NamedTuple):
    """What a checkpoint's header says about one tensor."""

    dtype: str  # safetensors spelling: F32, F16, BF16, I64, ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertVersion:
    """One version of a watched registered model, as MLflow shows it."""

    model: str  # registered model name
    version: int
    tags: Mapping[str, str] = field(default_factory=dict)
    model_id: str = ""  # LoggedModel id, "" when the version was not made from one
    status: str = "READY"  # of the LoggedModel, or of the version
    created: float = 0.0  # seconds since the epoch, MLflow's clock

    @property
    def name(self) -> str:
        """How people write it: 'demo-experts v3'."""
        return f"{self.model} v{self.version}"


def plain(value: Any) -> Any:  # noqa: ANN401 - json has no narrower type
    """A dataclass of this module as what json can write."""
    return asdict(value)


@dataclass(frozen=True)
class Line:
    """One running model as the ledger knows it."""

    name: str
    base_sha256: str  # content digest of the base's weights
    champion: int | None  # version of the line's registered model
    blocked: str  # why nothing may be folded; "" when free


@dataclass(frozen=True)
class Expert:
    """One row of the ledger's experts: what became of one registered expert."""

    id: int
    line: str
    model: str
    version: int
    generation: int
    seq: int  # the order of folding within the line
    task: str
    digest: str  # content digest of its weights; "" until intake has read them
    state: ExpertState
    code: str  # of the refusal, "" when there was none
    reason: str
    attempts: int  # begun and not ended, in a row

    @property
    def name(self) -> str:
        """How people write it: 'demo-experts v3'."""
        return f"{self.model} v{self.version}"


class Decision(StrEnum):
    """What a person said of a version that waited."""

    APPROVED = "approved"
    DECLINED = "declined"


@dataclass(frozen=True)
class Merge:
    """One gated fold: which experts into which parent, and what came of it."""

    merge_key: str
    line: str
    expert_id: int | None  # None: the base itself
    parent: int | None
    verdict: Verdict
    run_id: str = ""
    version: int | None = None  # None: not registered (yet), or rejected
    manifest_sha256: str = ""
    decided: Decision | None = None  # None: no person was asked, or none has answered
    created: float = 0.0  # when it was gated, or last began to wait; seconds since the epoch, the database's clock
    also: tuple[int, ...] = ()  # experts that were folded before it in the same pass, in their order

    @property
    def experts(self) -> tuple[int, ...]:
        """The ids of all experts that it folded, in their order; () for the base."""
        return () if self.expert_id is None else (*self.also, self.expert_id)

    @property
    def may_serve(self) -> bool:
        """Whether its version may be champion: the gate or a person said yes."""
        return self.verdict.passed or self.decided is Decision.APPROVED

    @property
    def undecided(self) -> bool:
        """Whether its version was kept for a person who has not answered."""
        return self.verdict.outcome is Outcome.WAITING and self.version is not None and self.decided is None


@dataclass(frozen=True)
class Event:
    """One append-only line of a line's history; a move of the champion when `target` is set."""

    id: int
    line: str
    kind: str  # init, fold, approved, rollback, adopted, repaired; no moves: waiting, declined, blocked, unblocked
    origin: int | None
    target: int | None
    because: str
    who: str
    done: bool  # the alias was seen on the target
    at: float  # seconds since the epoch, the database's clock


@dataclass(frozen=True)
class Lease:
    """The right to change one line until it expires; the fence is what later writes are checked against."""

    line: str
    holder: str
    fence: int
