"""A burst of registrations from many writers while two watch: every expert folded once, in version order.

FOLDIN_BURST says how many (`make chaos` takes a thousand, which is over half an hour on each back end).
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest
from mlflow import MlflowClient

from flows.config import load
from flows.doctor import examine
from flows.stack import servers
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri
from tests.flows.writers import register_some, watch_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*BaseConnection.__del__:pytest.PytestUnraisableExceptionWarning"),
]
WRITERS, WATCHERS = 8, 2


@pytest.fixture(params=["embedded", "servers"])
def toml(request, workshop, prefect):
    """A line whose registry is SQLite and files, or PostgreSQL and S3."""
    path = workshop / "foldin.toml"
    if request.param == "embedded":
        yield path
    else:
        with servers(load(path)) as found:
            urls = [f'{key} = "{getattr(found, key)}"' for key in ("tracking_uri", "artifact_root", "ledger_url")]
            path.write_text(path.read_text().replace("[registry]\n", "\n".join(["[registry]", *urls, ""])))
            yield path
            house(str(path)).ledger.close()
    house.cache_clear()


def burst(toml, expert, scratch, many):
    """Register `many` experts from eight processes while two others watch; returns the house afterwards."""
    from flows.watch import watch

    at = house(str(toml))
    uri, files = tracking_uri(at.config), artifact_root(at.config)
    watch("tiny", str(toml))
    client = MlflowClient(uri, uri)
    client.create_registered_model("tiny-experts")  # the plain client's own race is none of ours
    client.create_experiment("fine-tuning", artifact_location=files)
    spawn = multiprocessing.get_context("spawn")  # a fork would share connections
    with spawn.Manager() as shared, ProcessPoolExecutor(WATCHERS + WRITERS, spawn) as pool:
        broken = shared.Event()
        asked = [pool.submit(watch_until, str(toml), many, broken) for _ in range(WATCHERS)]
        for first in range(WRITERS):
            numbers = range(first, many, WRITERS)
            asked.append(pool.submit(register_some, uri, files, expert, numbers, scratch / str(first)))
        try:
            for each in as_completed(asked):
                each.result()
        finally:
            broken.set()
    return at


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("many", [int(os.environ.get("FOLDIN_BURST", "1000"))])
def test_a_burst_is_folded_exactly_once_each_and_in_order(toml, zoo, tmp_path, many):
    at = burst(toml, zoo / "expert-1", tmp_path / "writers", many)
    experts = at.ledger.experts("tiny")
    assert [(each.version, each.seq) for each in experts] == [(n, n) for n in range(1, many + 1)]
    assert {each.state for each in experts} == {"folded"}
    folds = [merge for merge in at.ledger.merges("tiny") if merge.expert_id is not None]
    assert [merge.expert_id for merge in folds] == [each.id for each in experts]
    assert [(merge.parent, merge.version) for merge in folds] == [(n, n + 1) for n in range(1, many + 1)]
    assert [event.target for event in at.ledger.events("tiny") if event.target] == list(range(1, many + 2))
    assert at.mlflow.versions("tiny") == list(range(1, many + 2))
    assert at.mlflow.champion("tiny") == many + 1
    held = open_version(at, "tiny", many + 1).memory.experts
    assert [each.version for each in held] == list(range(1, many + 1))
    assert examine(at) == []
