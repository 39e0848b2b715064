"""What each benchmark is to show, and how far a measured document is from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Facts = Mapping[str, Any]  # the document of one benchmark


class Target(NamedTuple):
    """One promise about one figure of a document."""

    what: str
    find: Callable[[Facts], float]
    bound: float
    most: bool = False  # whether the bound is the most that the figure may be; else the least
    unit: str = ""


def judged(target: Target, facts: Facts) -> tuple[str, str, str]:
    """Wanted, measured and the verdict, as words; a figure that the run left out is not measured.

    >>> judged(Target("speed", lambda facts: facts["times"], 5.0, unit=" times"), {"times": 4.0})
    ('at least 5 times', '4 times', 'missed by 20 %')
    """
    wanted = f"at {'most' if target.most else 'least'} {target.bound:g}{target.unit}"
    try:
        found = target.find(facts)
    except KeyError:
        return wanted, "not measured", "-"
    met = found <= target.bound if target.most else found >= target.bound
    missed = f"missed by {abs(found / target.bound - 1):.0%}".replace("%", " %") if target.bound else "missed"
    return wanted, f"{found:.3g}{target.unit}", "met" if met else missed


def at(*keys: str, scale: float = 1.0) -> Callable[[Facts], float]:
    """The figure under these keys, one inside the other, times `scale`."""

    def find(facts: Facts) -> float:
        found: Any = facts
        for key in keys:
            found = found[key]
        return scale * float(found)

    return find


def peak(side: str) -> Callable[[Facts], float]:
    """A side's peak resident memory, in GB of 10^9 bytes."""
    return at("sides", side, "peak_rss_mb", scale=2**20 / 1e9)


def growth(method: str, key: str, since: int) -> Callable[[Facts], float]:
    """By how many percent the largest figure of a method exceeds the smallest, from the expert `since` on."""

    def find(facts: Facts) -> float:
        figures = [float(point[key]) for number, point in facts["experts"][method].items() if int(number) >= since]
        return 100 * (max(figures) / min(figures) - 1)

    return find


def _accuracy(facts: Facts) -> float:
    found = facts["accuracy"]
    return float(found["foldin"]["whole"] / found["reference"]["whole"])


def _device_seconds(facts: Facts) -> float:
    details = facts["sides"]["fold"]["details"]
    return math.fsum((details["fold_seconds"], details["read_seconds"]))


def _flat(method: str) -> list[Target]:
    return [
        Target(f"{method}: memory, over all experts", growth(method, "peak_rss_mb", 1), 5, True, " %"),
        Target(f"{method}: memory, from the second expert on", growth(method, "peak_rss_mb", 2), 5, True, " %"),
        Target(f"{method}: time, from the second expert on", growth(method, "seconds", 2), 10, True, " %"),
    ]


def _against(peer: str, ours: str) -> list[Target]:
    return [
        Target(f"{ours}: faster than {peer}", at("ratios", f"{peer}/{ours}", "seconds", "median"), 1.5, unit=" times"),
        Target(f"{ours}: less memory than {peer}", at("ratios", f"{peer}/{ours}", "peak_rss"), 2, unit=" times"),
    ]


STEP = ("ratios", "reference/foldin")
GATE = ("ratios", "score_all/forward passes")
TARGETS: Mapping[str, Sequence[Target]] = {
    "step": [
        Target("faster than the published step", at(*STEP, "seconds", "median"), 5, unit=" times"),
        Target("less memory above the imports", at(*STEP, "peak_rss_over_baseline"), 4, unit=" times"),
        Target("distance to float64, of the reference's own", _accuracy, 1, True),
    ],
    "stream": [
        Target(
            "average: time of a copy", at("ratios", "foldin average/copy", "seconds", "median"), 2.5, True, " times"
        ),
        Target("average: peak memory", peak("foldin average"), 1.5, True, " GB"),
        Target("OPCM: peak memory", peak("foldin opcm"), 2.5, True, " GB"),
    ],
    "adapters": [
        Target("fold by factors faster", at("ratios", "densified/adapter", "seconds", "median"), 10, unit=" times"),
        Target("distance between the results", at("agreement", "whole"), 1e-5, True),
    ],
    "parallel": [Target("files that differ", lambda facts: float(len(facts["bytes"]["differing"])), 0, True)],
    "scaling": [*_flat("average"), *_flat("opcm")],
    "gate": [
        Target("time of the forward passes", at(*GATE, "seconds", "median"), 1.3, True, " times"),
        Target("processor time of the forward passes", at(*GATE, "processor", "median"), 1.3, True, " times"),
    ],
    "peers": [
        *_against("mergekit linear", "foldin average"),
        *_against("mergekit task_arithmetic", "foldin task_arithmetic"),
    ],
    "gpu": [
        Target("fold and read on the device", _device_seconds, 120, True, " s"),
        Target(
            "faster than gesvd with full bases",
            at("ratios", "reference, scaled up/fold and read", "seconds"),
            20,
            unit=" times",
        ),
    ],
}
