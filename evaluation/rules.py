"""What a line demands of a candidate, and how its configuration says so."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from evaluation.escape import clean, nearest
from registry.records import FoldinError, Refusal


@dataclass(frozen=True)
class Rules:
    """The gate's limits. Accuracies and shares are in [0, 1]: 0.05 is five points. p values are one-sided and exact."""

    max_task_drop: float = 0.05  # a known task may fall this far below the champion; more fails if p < significance
    max_mean_drop: float = 0.03  # the same for the mean over all known tasks, with their flips pooled
    max_negative_flips: float = 0.10  # share of a task's examples that turn wrong; more fails if p < significance
    min_gain: float = 0.0  # candidate - champion on the new task must be at least this
    min_expert_gain: float = 0.01  # expert - base on the new task must be at least this, with p < expert_significance
    min_retention: float = 0.10  # share of the expert's gain over the base that the candidate must keep
    significance: float = 0.05  # a loss counts when chance alone explains it with less than this probability
    expert_significance: float = 0.10  # an expert has learnt when chance explains its gain with less than this


LOWEST = {"min_gain": -1.0, "min_expert_gain": -1.0, "min_retention": -100.0}  # all others are shares, from 0


def rules_from(table: Mapping[str, object], where: str = "gate rules") -> Rules:
    """The rules that a configuration table asks for; what it leaves out keeps its default.

    Raises FoldinError (E_CONFIG) for an unknown key, a value of another type, or a number out of range.
    """
    known = {field.name: field.type for field in fields(Rules)}
    for key in table:
        if key not in known:
            raise _refuse(f"the key {clean(key, 40)!r} is unknown", where, remedy=nearest(key, known))
    return Rules(**{key: _number(key, value, where) for key, value in table.items()})


def _number(key: str, value: object, where: str) -> float:
    lowest = LOWEST.get(key, 0.0)
    # bool is an int in Python, and NaN fails the comparison.
    if isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= 1.0:
        return float(value)
    wanted = f"a number from {lowest:g} to 1 (0.05 is five points)"
    raise _refuse(f"{key} is not a number in range", where, expected=wanted, found=repr(value))


def _refuse(what: str, where: str, *, expected: str = "", found: str = "", remedy: str = "") -> FoldinError:
    return FoldinError(Refusal("E_CONFIG", what, where, expected=expected, found=clean(found), remedy=remedy))
