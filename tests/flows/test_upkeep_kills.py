"""Services that are killed while they fold: every expert is folded, once, and within minutes."""

import os
import signal
import time
from zlib import crc32

import pytest
from mlflow import MlflowClient

from experiments.plain_client import register_expert
from flows.config import load
from flows.wiring import house
from registry.records import FoldinError
from tests.flows.patience import wait_until
from tests.flows.standing import foldin, is_folding, kill, pids, served, standing, variables

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*BaseConnection.__del__:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish):
    """A line that looks every minute, as lines do, in a folder where everything runs."""
    path = furnish(tmp_path_factory.mktemp("kills")) / "foldin.toml"
    path.write_text(path.read_text().replace("interval = 3600.0\n", ""))
    with standing(path), pytest.MonkeyPatch.context() as patch:
        for key, value in variables(path).items():
            patch.setenv(key, value)
        yield path


@pytest.mark.parametrize("name", ["worker", "worker alone", "prefect", "mlflow", "postgresql"])
def test_a_service_that_is_killed_during_a_fold_costs_no_expert(toml, expert_maker, name):
    uri, at = load(toml).registry.tracking_uri, house(str(toml))
    for turn in range(5):
        number = register_expert(uri, "tiny-experts", expert_maker(crc32(f"{name} {turn}".encode())), "words")
        wait_until(lambda: is_folding(at), 120)
        time.sleep(turn / 2)  # from its beginning to somewhere behind its middle
        assert is_folding(at)
        if name == "worker alone":  # its runs are still there
            os.kill(pids(toml, "worker")[0], signal.SIGKILL)
        else:
            kill(toml, name)
        killed = time.monotonic()
        wait_until(lambda number=number: became(at, number) == "folded", 300)
        print(f"{name} killed: folded after {time.monotonic() - killed:.0f} s")
    experts = [each.version for each in at.ledger.experts("tiny")]
    assert experts == list(range(1, len(experts) + 1))
    versions = MlflowClient(uri, uri).search_model_versions("name = 'tiny'")
    assert len(versions) == 1 + len(experts), "every expert was folded once"
    wait_until(lambda: served(uri) == 1 + len(experts), 120)
    # Who was killed between its last step and its end has left the line's lease: the next look takes it.
    wait_until(lambda: foldin(toml, "doctor").returncode == 0, 180)


def became(at, number):
    """The state of an expert in the ledger; "" while the ledger cannot be asked."""
    try:
        return next((str(each.state) for each in at.ledger.experts("tiny") if each.version == number), "")
    except FoldinError:
        return ""
