"""What Prometheus is told: how every line stands by the ledger, and what this receiver answered since it started.

Everything about lines is asked when somebody looks, so a receiver that was started again says the same as before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from registry.measures import WHOLE, Cost, LineFacts
from registry.records import ExpertState

Samples = Iterable[tuple[Sequence[str], float]]  # values of the labels, value


@dataclass(frozen=True)
class Told:
    """What one receiver answered since it started."""

    answers: Mapping[str, int] = field(default_factory=dict)  # kind of answer -> deliveries
    woken: Mapping[str, int] = field(default_factory=dict)  # line -> deliveries that woke it


class Kind(NamedTuple):
    """One metric about lines."""

    name: str
    help: str
    labels: tuple[str, ...]  # beside the line
    samples: Callable[[LineFacts], Samples]


GAUGES = (
    Kind(
        "foldin_experts",
        "Experts of the line in a state.",
        ("state",),
        lambda at: [((state,), at.experts.get(state, 0)) for state in ExpertState],
    ),
    Kind(
        "foldin_champion_version",
        "Version that is champion; absent before the base is.",
        (),
        lambda at: [] if at.champion is None else [((), at.champion)],
    ),
    Kind("foldin_blocked", "1 while nothing may be folded until somebody acts.", (), lambda at: [((), at.blocked)]),
    Kind("foldin_waiting", "1 while a version waits for a person.", (), lambda at: [((), at.waits)]),
    Kind(
        "foldin_oldest_pending_seconds",
        "Since the oldest pending expert was enrolled; 0 when none is pending.",
        (),
        lambda at: [((), at.oldest_pending)],
    ),
    Kind("foldin_lease_held", "1 while a living process works on the line.", (), lambda at: [((), at.held)]),
    Kind(
        "foldin_lease_age_seconds",
        "Since the line was taken by who holds it; 0 when nobody does.",
        (),
        lambda at: [((), at.lease_age)],
    ),
    Kind(
        "foldin_lease_remaining_seconds",
        "Until the line may be taken over; below 0 when its holder went silent, 0 when nobody holds it.",
        (),
        lambda at: [((), at.lease_left)],
    ),
    Kind(
        "foldin_score",
        "What the champion scored on a task when it was judged.",
        ("metric", "task"),
        lambda at: [(name.split(".", 1), value) for name, value in at.scores.items()],
    ),
    Kind(
        "foldin_gate_value",
        "What a rule of the gate found in the newest verdict; NaN where it could not be measured.",
        ("rung", "rule", "task"),
        lambda at: [((each.rung, each.rule, each.task), each.value) for each in at.checks],
    ),
    Kind(
        "foldin_gate_limit",
        "The rule's limit in that verdict.",
        ("rung", "rule", "task"),
        lambda at: [((each.rung, each.rule, each.task), each.threshold) for each in at.checks],
    ),
    Kind(
        "foldin_gate_passed",
        "1 where that verdict passed the rule.",
        ("rung", "rule", "task"),
        lambda at: [((each.rung, each.rule, each.task), each.passed) for each in at.checks],
    ),
)
COUNTERS = (
    Kind(
        "foldin_events",
        "Events of the line's history.",
        ("kind",),
        lambda at: [((k,), n) for k, n in at.events.items()],
    ),
    Kind(
        "foldin_step_failures",
        "Runs of a step that ended with an error.",
        ("step",),
        lambda at: [((step,), cost.failures) for step, cost in _steps(at)],
    ),
    Kind(
        "foldin_step_bytes",
        "Bytes of the files that runs of a step left: experts admitted, candidates folded.",
        ("step",),
        lambda at: [((step,), cost.bytes) for step, cost in _steps(at) if cost.bytes],
    ),
    Kind(
        "foldin_fold_failures",
        "Folds that ended with an error, which is no answer about an expert.",
        (),
        lambda at: [((), at.steps.get(WHOLE, Cost()).failures)],
    ),
)


def _steps(at: LineFacts) -> list[tuple[str, Cost]]:
    return sorted((step, cost) for step, cost in at.steps.items() if step != WHOLE)


def families(lines: Sequence[LineFacts] | None, told: Told) -> Iterator[Metric]:
    """Every metric, with or without samples; `lines` is None when the ledger did not answer."""
    yield GaugeMetricFamily("foldin_ledger_up", "1 when the ledger answered.", value=lines is not None)
    known = lines or ()
    for kind in GAUGES:
        yield _filled(GaugeMetricFamily(kind.name, kind.help, labels=("line", *kind.labels)), kind, known)
    for kind in COUNTERS:
        yield _filled(CounterMetricFamily(kind.name, kind.help, labels=("line", *kind.labels)), kind, known)
    yield from _took(known)
    answers = CounterMetricFamily("foldin_deliveries", "Webhook deliveries by what was answered.", labels=("answer",))
    woken = CounterMetricFamily("foldin_wakes", "Deliveries that woke a line.", labels=("line",))
    for family, counted in ((answers, told.answers), (woken, told.woken)):
        for name, count in counted.items():
            family.add_metric((name,), count)
        yield family


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, kind: Kind, lines: Sequence[LineFacts]
) -> GaugeMetricFamily | CounterMetricFamily:
    for at in lines:
        for labels, value in kind.samples(at):
            family.add_metric((at.line, *labels), value)
    return family


def _took(lines: Sequence[LineFacts]) -> Iterator[Metric]:
    """What folds and their steps took."""
    folds = SummaryMetricFamily("foldin_fold_seconds", "What folds took, from admission to the end.", labels=("line",))
    steps = SummaryMetricFamily("foldin_step_seconds", "What runs of a step took.", labels=("line", "step"))
    for at in lines:
        whole = at.steps.get(WHOLE, Cost())
        folds.add_metric((at.line,), whole.runs, whole.seconds)
        for step, cost in _steps(at):
            steps.add_metric((at.line, step), cost.runs, cost.seconds)
    yield from (folds, steps)


class _Found(Collector):
    """Metrics that were found already."""

    def __init__(self, found: Iterable[Metric]) -> None:
        self._found = tuple(found)

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        return self._found


def exposition(lines: Sequence[LineFacts] | None, told: Told, accept: str) -> tuple[bytes, str]:
    """The metrics as text and its type, in the format that a header `Accept` asks for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Found(families(lines, told)))
    encode, kind = choose_encoder(accept)
    return encode(registry), kind
