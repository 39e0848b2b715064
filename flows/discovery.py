"""Which experts were registered since the last look. The registry is polled; a webhook could only say: look now."""

from flows.about import about
from flows.admission import declared_task
from flows.options import LineConfig
from flows.telling import say
from flows.wiring import House
from registry.records import ExpertVersion, Lease


def discover(house: House, lease: Lease, settings: LineConfig) -> int:
    """Enrol every new version of the watched models, in version order; how many were new.

    Version numbers are the cursor: MLflow's creation times run backwards under concurrent writers. Several watched
    models are merged by creation time, which only decides between models.
    """
    fresh = [
        found
        for model in settings.experts
        for found in house.mlflow.newer(model, house.ledger.newest_enrolled(lease.line, model))
    ]
    enrolled = 0
    for found in _interleaved(fresh):
        if house.ledger.enrol(lease.line, found, declared_task(found)):
            with about(line=lease.line, expert=found.name):
                say(f"{found.name}: registered; waits for {lease.line}")
            enrolled += 1
    return enrolled


def _interleaved(fresh: list[ExpertVersion]) -> list[ExpertVersion]:
    """All models in one queue: within a model by version, between models by the time of its newest version so far."""
    latest: dict[str, float] = {}
    keyed = []
    for found in sorted(fresh, key=lambda each: (each.model, each.version)):
        latest[found.model] = max(latest.get(found.model, 0.0), found.created)
        keyed.append(((latest[found.model], found.model, found.version), found))
    return [found for _, found in sorted(keyed, key=lambda pair: pair[0])]
