"""OpenLineage: events about folds, for the catalogue of an organisation. The only file that imports openlineage.

A run is one expert folded into one parent: repeated, it is the same run. FAIL says that the run failed; an expert that
was refused is a run that completed, with no output. Spec: OpenLineage 2-0-2, https://openlineage.io/docs/spec.
"""

import importlib.metadata
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, uuid5

from evaluation.escape import clean
from flows.environment import openlineage_key
from flows.memory import Memory
from flows.telling import say
from flows.versions import Version, find_merge
from flows.wiring import tracking_uri
from flows.work import Work
from registry.records import FoldinError

if TYPE_CHECKING:
    from openlineage.client.event_v2 import InputDataset, RunEvent
    from openlineage.client.generated.base import RunFacet

PATIENCE = 3.0  # seconds that a fold waits for one event, whatever the other side does
PRODUCER = f"urn:foldin:{importlib.metadata.version('foldin')}"
TOLD: set[tuple[str, str]] = set()  # (target, kind of error) that this process has spoken of
REASON = 1000  # characters

Facts = Mapping[str, object]


def emitted(work: Work, fold: Callable[[Work], dict[str, Any]]) -> dict[str, Any]:
    """Fold, and send what begins and what came of it, where the configuration names an address; what `fold` returns.

    Nothing that goes wrong with an event is raised: it is said once a process.
    """
    if not work.house.config.registry.openlineage:
        return fold(work)
    _emit(work, partial(_event, work, "START", {}, _facts(work, {})))
    try:
        outcome = fold(work)
    except BaseException as error:
        if not (
            isinstance(error, FoldinError) and error.refusal.code == "E_FENCED"
        ):  # else another one goes on with it
            _emit(work, partial(_failed, work, error))
        raise
    _emit(work, partial(_completed, work, outcome))
    return outcome


def run_id(work: Work) -> str:
    """The id of a fold's run: of the line, the parent's digest, the expert and how often it was queued."""
    expert = work.expert
    name = f"{work.lease.line}/{work.parent.manifest_sha256}/{expert.model}/{expert.version}/{expert.generation}"
    return str(uuid5(NAMESPACE_URL, f"{PRODUCER.rpartition(':')[0]}:{_namespace(work)}/{name}"))


def _emit(work: Work, event: "Callable[[], RunEvent]") -> None:
    """Make an event and send it, from a thread of its own: requests bounds neither the lookup of a name nor a drip."""
    target, ended = work.house.config.registry.openlineage, list[Exception | None]()
    try:
        sender = threading.Thread(target=_send, args=(_sender(target), event(), ended), name="openlineage", daemon=True)
    except (FoldinError, ImportError, OSError, ValueError, LookupError) as error:
        _say_once(target, error)
        return
    sender.start()
    sender.join(PATIENCE)
    wrong = ended[0] if ended else TimeoutError(f"no answer within {PATIENCE:g} s")
    if wrong is not None:
        _say_once(target, wrong)


def _send(send: "Callable[[RunEvent], object]", event: "RunEvent", ended: list[Exception | None]) -> None:
    try:
        send(event)
    except (OSError, ValueError, RuntimeError, LookupError) as error:  # all of requests' and urllib3's are among them
        ended.append(error)
    else:
        ended.append(None)


def _say_once(target: str, error: Exception) -> None:
    """One line a process for each kind of trouble, without the address: it may hold a password."""
    kind = (target, type(error).__name__)
    if kind not in TOLD:
        TOLD.add(kind)
        remedy = "; install foldin[openlineage]" if isinstance(error, ImportError) else ""
        told = clean(str(error).replace(target, "…"), 160)
        say(f"an OpenLineage event could not be sent (said once): {kind[1]}: {told}{remedy}")


def _sender(target: str) -> "Callable[[RunEvent], object]":
    """What takes an event to a server (POST to api/v1/lineage) or to the end of a file, one JSON object a line."""
    if "://" not in target:
        from openlineage.client.transport.file import FileConfig, FileTransport

        return FileTransport(FileConfig(target, append=True)).emit
    from openlineage.client.transport.http import ApiKeyTokenProvider, HttpConfig, HttpTransport, TokenProvider

    key = openlineage_key()
    auth = ApiKeyTokenProvider({"apiKey": key}) if key else TokenProvider({})
    return HttpTransport(HttpConfig(target, timeout=PATIENCE / 2, retry={"total": 0}, auth=auth)).emit


def _failed(work: Work, error: BaseException) -> "RunEvent":
    """The end of a fold that came to no answer: FAIL, or ABORT when a person or the platform ended it."""
    from openlineage.client.generated.error_message_run import ErrorMessageRunFacet

    kind = "FAIL" if isinstance(error, Exception) else "ABORT"
    message = str(error) if isinstance(error, FoldinError) else f"{type(error).__name__}: {error}"
    told = ErrorMessageRunFacet(clean(message, REASON), "Python", producer=PRODUCER)
    return _event(work, kind, {"errorMessage": told}, _facts(work, {}))


def _completed(work: Work, outcome: Mapping[str, Any]) -> "RunEvent":
    """The end of a fold that came to an answer; its output is the version, if there is one."""
    number = outcome["version"]
    said: Facts = {"state": outcome["state"], "reason": clean(str(outcome["reason"] or ""), REASON)}
    if not number:
        return _event(work, "COMPLETE", {}, _facts(work, said))
    merge = find_merge(work.house, work.lease.line, number)
    memory = Memory.read(work.house.mlflow.folder(work.lease.line, number), f"{work.lease.line} v{number}")
    used = {"method": memory.method, "parameters": dict(memory.parameters), "experts": len(memory.experts)}
    made = {"merge_key": merge.merge_key, "mlflow_run": merge.run_id, "verdict": str(merge.verdict.outcome)}
    digests = {"manifest_sha256": merge.manifest_sha256, "weights_sha256": memory.weights_sha256}
    output = (work.lease.line, number, digests)
    return _event(work, "COMPLETE", {}, _facts(work, {**said, **used, **made}), output)


def _facts(work: Work, more: Facts) -> Facts:
    """What the run's own facet says: who folds what into what, and after the fold what came of it."""
    first = {"line": work.lease.line, "expert": work.expert.name, "task": work.expert.task}
    return {**first, "parent": work.parent.number, "method": work.settings.method, **more}


def _event(
    work: Work, kind: str, facets: "Mapping[str, RunFacet]", facts: Facts, output: tuple[str, int, Facts] | None = None
) -> "RunEvent":
    from openlineage.client.event_v2 import Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.generated.base import RunFacet
    from openlineage.client.generated.job_type_job import JobTypeJobFacet

    own = cast(RunFacet, RunFacet(producer=PRODUCER).with_additional_properties(**facts))
    batch = JobTypeJobFacet("BATCH", "FOLDIN", "FOLD", producer=PRODUCER)
    made = [_dataset(*output)] if output else []
    return RunEvent(
        eventType=RunState(kind),
        eventTime=datetime.now(UTC).isoformat(),
        run=Run(run_id(work), {"foldin_fold": own, **facets}),
        job=Job(_namespace(work), f"{work.lease.line}.fold", {"jobType": batch}),
        inputs=_inputs(work),
        outputs=[OutputDataset(_namespace(work), name, facets=digests) for name, digests in made],
        producer=PRODUCER,
    )


def _inputs(work: Work) -> "list[InputDataset]":
    """Base, parent and expert; the base once where it is the parent."""
    from openlineage.client.event_v2 import InputDataset

    expert = next(each for each in work.house.ledger.experts(work.lease.line) if each.id == work.expert.id)
    versions = {each.number: each for each in (work.base, work.parent)}
    datasets = [
        *((work.lease.line, number, _digests(version)) for number, version in versions.items()),
        (expert.model, expert.version, {"weights_sha256": expert.digest, "model_id": work.found.model_id}),
    ]
    made = (_dataset(*each) for each in datasets)
    return [InputDataset(_namespace(work), name, facets=facets) for name, facets in made]


def _digests(version: Version) -> Facts:
    return {"manifest_sha256": version.manifest_sha256, "weights_sha256": version.memory.weights_sha256}


def _dataset(model: str, version: int, digests: Facts) -> tuple[str, dict[str, Any]]:
    """A model version as a dataset, named as in MLflow's models:/NAME/VERSION: each is a node of the lineage."""
    from openlineage.client.generated.base import DatasetFacet
    from openlineage.client.generated.dataset_version_dataset import DatasetVersionDatasetFacet

    own = DatasetFacet(producer=PRODUCER).with_additional_properties(**digests)
    numbered = DatasetVersionDatasetFacet(str(version), producer=PRODUCER)
    return f"{model}/{version}", {"version": numbered, "foldin_digests": own}


def _namespace(work: Work) -> str:
    """The registry that the names belong to: MLflow's address, without credentials."""
    address = tracking_uri(work.house.config).partition("?")[0]
    login, at, _ = urlsplit(address).netloc.rpartition("@")
    return address.replace(f"//{login}@", "//", 1) if at else address
