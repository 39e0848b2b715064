"""A burst of registrations from many writers while two watchers run: every expert folded once, in version order.

FOLDIN_BURST says how many (`make chaos` takes a thousand, which is over half an hour on each back end).
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

from flows.config import load
from flows.doctor import examine
from flows.stack import servers
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.records import FoldinError
from tests.flows.writers import register_some

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


def watch_until(toml, over):
    """Look again and again, as services that hear of a registration late, twice or never."""
    from flows.watch import watch

    while not over():
        try:
            watch("tiny", str(toml))
        except FoldinError as error:
            if error.refusal.code not in {"E_LOCKED", "E_FENCED"}:  # the other watcher is at it
                raise


def burst(toml, expert, scratch, many):
    """Register `many` experts from eight processes while two threads watch; returns the house afterwards."""
    from flows.watch import watch

    at = house(str(toml))
    uri, files = tracking_uri(at.config), artifact_root(at.config)
    watch("tiny", str(toml))
    client = MlflowClient(uri, uri)
    client.create_registered_model("tiny-experts")  # the plain client's own race is none of ours
    client.create_experiment("fine-tuning", artifact_location=files)
    spawn = multiprocessing.get_context("spawn")  # a fork would share connections
    with ProcessPoolExecutor(WRITERS, spawn) as writers, ThreadPoolExecutor(WATCHERS) as watchers:
        parts = ((range(first, many, WRITERS), scratch / str(first)) for first in range(WRITERS))
        asked = [writers.submit(register_some, uri, files, expert, *part) for part in parts]

        def over():
            broken = any(each.done() and each.exception() for each in [*asked, *looking])
            return broken or sum(each.state != "pending" for each in at.ledger.experts("tiny")) >= many

        looking = []
        looking += [watchers.submit(watch_until, toml, over) for _ in range(WATCHERS)]
        for each in [*asked, *looking]:
            each.result()
    return at


@pytest.mark.parametrize(
    "many", [16, pytest.param(int(os.environ.get("FOLDIN_BURST", "1000")), marks=pytest.mark.chaos)]
)
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
