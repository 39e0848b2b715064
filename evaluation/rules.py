"""What a line demands of a candidate, and how its configuration says so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from evaluation.escape import clean, nearest
from registry.records import FoldinError, Refusal


@dataclass(frozen=True)
class Rules:
    """The gate's limits. Accuracies, scores and shares are in [0, 1]: 0.05 is five points. p values are one-sided."""

    # free: what the fold itself says
    max_norm_ratio: float = 5.0  # norm of the expert's change over the median of those folded before
    max_overlap: float = 0.98  # share of the expert's change, by norm, that lies along the total, tensor by tensor
    max_removed: float = 0.98  # share of the expert's change, by squared norm, that the projection took away
    # canary: a fixed sample of every known task
    canary_examples: float = 64  # of each task, a whole number
    max_canary_drop: float = 0.15  # a known task may fall this far on its sample; more fails if it is significant
    max_canary_rise: float = 0.5  # the same for a perplexity, as a share of the champion's
    # full: every example
    max_task_drop: float = 0.02  # a known task may fall this far below the champion; more fails if it is significant
    max_total_drop: float = 0.10  # a known task may be this far below the best that the line ever had, chance or not
    max_mean_drop: float = 0.01  # the same for the mean over all known tasks, with their flips pooled
    max_negative_flips: float = 0.10  # share of a task's examples that turn wrong; more fails if it is significant
    max_perplexity_rise: float = 0.05  # a perplexity may rise by this share; more fails if it is significant
    max_safety_drop: float = 0.0  # a safety task may fall this far (a perplexity rise), significant or not
    min_gain: float = 0.0  # candidate - champion on the new task must be at least this
    min_expert_gain: float = 0.01  # expert - base on the new task must be at least this, with p < expert_significance
    min_retention: float = 0.10  # share of the expert's gain over the base that the candidate must keep
    significance: float = 0.05  # of all known tasks and their mean together: a loss counts when p < this / (tasks + 1)
    expert_significance: float = 0.10  # an expert has learnt when chance explains its gain with less than this


# All others are shares, from 0 to 1.
RANGES = {
    "max_norm_ratio": (1.0, math.inf),
    "canary_examples": (1.0, 1e6),
    "max_canary_rise": (0.0, math.inf),
    "max_perplexity_rise": (0.0, math.inf),
    "min_gain": (-1.0, 1.0),
    "min_expert_gain": (-1.0, 1.0),
    "min_retention": (-100.0, 1.0),
}


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
    lowest, highest = RANGES.get(key, (0.0, 1.0))
    # bool is an int in Python, and NaN fails the comparison.
    if isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest:
        return float(value)
    points = " (0.05 is five points)" if key not in RANGES else ""
    wanted = f"a number from {lowest:g} to {highest:g}{points}"
    raise _refuse(f"{key} is not a number in range", where, expected=wanted, found=repr(value))


def _refuse(what: str, where: str, *, expected: str = "", found: str = "", remedy: str = "") -> FoldinError:
    return FoldinError(Refusal("E_CONFIG", what, where, expected=expected, found=clean(found), remedy=remedy))
