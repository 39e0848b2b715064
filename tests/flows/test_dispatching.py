"""Folds that a work pool makes: nobody there, a worker without a GPU, one that dies, a person who cancels."""

import threading
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from experiments.plain_client import register_expert
from flows import dispatching
from flows.options import LineConfig, RunnerConfig
from flows.placing import placed
from flows.serve import offer_folds
from flows.settings import check_settings
from flows.watch import watch
from flows.wiring import artifact_root, house, tracking_uri
from registry.records import FoldinError

POOL = "foldin-test"


@pytest.fixture
def pooled(workshop, prefect):
    """A function that opens the line `tiny`, whose folds are a pool's that has no worker, with an expert that waits."""
    opened = []

    def made(zoo, **runner):
        toml = workshop / "foldin.toml"
        rows = [f'pool = "{POOL}"', *(f"{key} = {value!r}" for key, value in runner.items())]
        toml.write_text(toml.read_text() + "\n[lines.tiny.runner]\n" + "\n".join(rows) + "\n")
        at = house(str(toml))
        opened.append(at)
        offer_folds(at.config, str(toml))
        uri, root = tracking_uri(at.config), artifact_root(at.config)
        register_expert(uri, "tiny-experts", zoo / "expert-1", "task-1", root)
        return at, str(toml)

    yield made
    for each in opened:
        each.ledger.close()


def states(at):
    return [str(each.state) for each in at.ledger.experts("tiny")]


@pytest.fixture
def prompted(monkeypatch):
    """A function that lets something happen to the pool's run, given its id, once it waits for a worker."""

    def made(act):
        seen = []

        def awaited(client, at, line, run):
            if not seen:
                seen.append(threading.Thread(target=copy_context().run, args=(act, run)))
                seen[0].start()
            return waits(client, at, line, run)

        waits = dispatching._awaited
        monkeypatch.setattr(dispatching, "_awaited", awaited)

    return made


def put(run, state):
    """Set the state of a flow run, as its worker or a person would."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, state, force=True)


@pytest.mark.integration
def test_without_a_worker_it_is_folded_here_where_the_line_allows_it_and_its_history_says_so(pooled, zoo):
    at, toml = pooled(zoo, fallback="cpu", patience=1.0)
    began = datetime.now(UTC)
    (outcome,) = watch("tiny", toml)
    assert (outcome["state"], outcome["version"]) == ("folded", 2)
    told = [each.because for each in at.ledger.events("tiny") if each.kind == "fallback"]
    assert told == [f"tiny-experts v1: no worker of the pool {POOL} took the fold within 1 s"]
    assert runs("merge-expert", began) == ["CANCELLED", "COMPLETED"]


def runs(flow, since):
    """The states of the runs of a flow since a time, the oldest first; other tests' runs are on the server too."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        named = FlowFilter(name=FlowFilterName(any_=[flow]))
        late = FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(after_=since))
        found = client.read_flow_runs(flow_filter=named, flow_run_filter=late, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        return [str(each.state.type.value) for each in found]


@pytest.mark.integration
def test_a_person_who_cancels_the_run_ends_the_watch_and_the_expert_waits_on(pooled, zoo, prompted):
    from prefect.states import Cancelled

    at, toml = pooled(zoo)
    prompted(lambda run: put(run, Cancelled()))
    with pytest.raises(FoldinError, match="E_CANCELLED line tiny: the fold was cancelled"):
        watch("tiny", toml)
    assert states(at) == ["pending"]
    assert at.ledger.experts("tiny")[0].attempts == 0
    assert not at.ledger.leases.alive("tiny")


@pytest.mark.integration
def test_a_run_that_failed_for_no_fault_of_the_expert_ends_the_watch_with_its_words(pooled, zoo, prompted):
    from prefect.states import Failed

    at, toml = pooled(zoo)
    prompted(lambda run: put(run, Failed(message="Flow run encountered an exception: FoldinError: E_CONFIG no GPU")))
    with pytest.raises(FoldinError, match=f"E_RUNNER line tiny: the fold in the pool {POOL} failed.*E_CONFIG no GPU"):
        watch("tiny", toml)
    assert states(at) == ["pending"]


@pytest.mark.integration
def test_a_run_whose_worker_died_silently_is_ended_and_made_again(pooled, zoo, prompted, monkeypatch):
    from prefect.states import Running

    at, toml = pooled(zoo, fallback="cpu", patience=1.0)
    at.ledger.close()
    monkeypatch.setattr(dispatching, "SILENCE", 2.0)
    object.__setattr__(at, "config", replace(at.config, registry=replace(at.config.registry, lease_seconds=1.0)))
    prompted(lambda run: put(run, Running()))
    began = datetime.now(UTC)
    (outcome,) = watch("tiny", toml)  # the second run finds no worker, and is folded here
    assert outcome["state"] == "folded"
    assert datetime.now(UTC) - began < timedelta(minutes=2)
    assert "CRASHED" in runs("merge-expert", began)


def test_a_worker_without_a_gpu_folds_on_its_cpu_only_where_the_line_allows_it():
    line = LineConfig("base", ("experts",), device="cuda", runner=RunnerConfig("foldin-gpu", "cpu"))
    settings, because = placed(line)
    assert (settings.device, settings.runner.pool) == ("cpu", "")
    assert "has no GPU" in because
    strict, because = placed(replace(line, runner=RunnerConfig("foldin-gpu")))
    assert (strict.device, because) == ("cuda", "")
    with pytest.raises(FoldinError, match="this machine has no such device"):
        check_settings(strict, "tiny")
    check_settings(replace(line, runner=RunnerConfig("foldin-gpu")), "tiny")  # where it is watched nobody needs one


def test_a_fold_here_says_why_the_pool_did_not_make_it():
    line = LineConfig("base", ("experts",), device="cpu", runner=RunnerConfig("foldin-gpu", "cpu"))
    assert placed(line, "nobody came")[1] == "nobody came"
    assert placed(line) == (replace(line, runner=RunnerConfig()), "")
