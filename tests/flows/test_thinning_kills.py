"""`foldin gc` and `foldin rollback`, killed or overtaken at named points: no weights that anybody needs are lost."""

import shutil
import signal

import pytest
from transformers import BertModel

from experiments.plain_client import champion as alias
from experiments.plain_client import register_expert
from flows.doctor import examine
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import hash_tree

pytestmark = pytest.mark.integration
GC = ("gc", "tiny", "--keep", 0, "--yes")
RETIRE = ("gc", "tiny", "--keep", 0, "--keep-thin", 0, "--yes")
BACK = ("rollback", "tiny", "--to", 2, "--because", "a test")
REMOVED = ("registry.mlflow_files", "Files.drop", "after", 1)  # the first of several shards
REMOVES = ("registry.mlflow_files", "Files.drop", "before", 1)


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish, prefect, zoo):
    """Three experts folded into versions 2 to 4, of a base in several shards."""
    from flows.watch import watch

    folder = tmp_path_factory.mktemp("killed")
    base = shutil.copytree(zoo / "base", folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    BertModel.from_pretrained(zoo / "base").save_pretrained(base, max_shard_size="30KB")
    path = furnish(folder) / "foldin.toml"
    path.write_text(path.read_text().replace(str(zoo / "base"), str(base)))
    at = house(str(path))
    for number in (1, 2, 3):
        uri, root = tracking_uri(at.config), artifact_root(at.config)
        register_expert(uri, "tiny-experts", zoo / f"expert-{number}", f"task-{number}", root)
    watch("tiny", str(path))
    assert len(weights_of(at, 2)) > 2
    yield path
    house(str(path)).ledger.close()
    house.cache_clear()


@pytest.fixture
def at(undone):
    """The line as it was folded."""
    return undone


@pytest.fixture
def before(at):
    """The digests of version 2, whole."""
    return hash_tree(at.mlflow.folder("tiny", 2))


@pytest.fixture
def life(toml, forge):
    """A function: one life of a verb, with a signal at a point; how it ended."""
    return lambda verb, *arguments, **then: forge.life(toml.parent, *arguments, verb=verb, **then)


@pytest.fixture
def kill(life, forge):
    """A function: lives of a verb that each die at a point."""

    def each(verb, *points):
        for point in points:
            assert life(verb, signal.SIGKILL, point)[1] == -signal.SIGKILL, f"{point}: {forge.said()}"

    return each


def weights_of(at, number):
    return sorted(path.name for path in at.mlflow.folder("tiny", number).glob("*.safetensors"))


def kinds(at):
    return [event.kind for event in at.ledger.events("tiny")]


def check_back(at, before):
    """Version 2 is champion, with the bytes that it had, and nothing lies about."""
    assert alias(tracking_uri(at.config), "tiny") == at.ledger.line("tiny").champion == 2
    assert hash_tree(at.mlflow.folder("tiny", 2)) == before
    assert "foldin.state" not in at.mlflow.expert("tiny", 2).tags
    assert list(at.work("tiny").glob("rebuilt-*")) == []
    assert examine(at) == []


def lose_ledger(at, verb):
    """The house with the ledger that MLflow's history gives, and how the doctor ends that made it."""
    at.ledger.close()
    for path in at.config.home.glob("ledger.db*"):
        path.unlink()
    code = verb("--quiet", "doctor", "--rebuild")[0]
    return house(str(at.config.folder / "foldin.toml")), code


@pytest.mark.chaos
def test_thinning_that_is_killed_is_ended_by_the_next_run(at, life, kill, forge):
    whole = weights_of(at, 2)
    kill(GC, ("flows.thinning", "read_again", "after", 1))
    assert list(at.work("tiny").glob("rebuilt-*/*"))  # nobody could clean up
    assert (weights_of(at, 2), "thinned" in kinds(at)) == (whole, False)
    kill(GC, ("registry.ledger", "Ledger.remark", "after", 1))
    assert (weights_of(at, 2), kinds(at)[-1]) == (whole, "thinned")
    kill(GC, REMOVED)
    assert weights_of(at, 2) == whole[1:]
    kill(GC, ("registry.mlflow_files", "Files.drop", "before", 3))
    assert life(GC)[1] == 0, forge.said()
    assert (weights_of(at, 2), weights_of(at, 3)) == ([], [])
    assert kinds(at)[-2:] == ["thinned", "thinned"]  # each once
    assert list(at.work("tiny").glob("rebuilt-*")) == []
    assert examine(at) == []


@pytest.mark.chaos
def test_a_rollback_that_is_killed_while_it_has_weights_back_is_ended_by_the_next(at, before, life, kill, forge):
    assert life(GC)[1] == 0, forge.said()
    kill(
        BACK,
        ("flows.thinning", "read_again", "after", 1),
        ("registry.mlflow_files", "Files._send", "after", 1),  # one shard of several
    )
    assert len(weights_of(at, 2)) == 1
    kill(
        BACK,
        ("registry.mlflow_store", "MlflowStore.unlabel", "after", 1),
        ("registry.ledger", "Ledger.move", "before", 1),  # it is whole, and not champion yet
    )
    assert life(BACK)[1] == 0, forge.said()
    assert (kinds(at).count("restored"), kinds(at)[-1]) == (1, "rollback")
    check_back(at, before)


@pytest.mark.parametrize(
    "point",
    [
        REMOVES,
        pytest.param(REMOVED, marks=pytest.mark.chaos),
        pytest.param(("registry.mlflow_store", "MlflowStore.label", "before", 1), marks=pytest.mark.chaos),
    ],
    ids=lambda point: "-".join(map(str, point[1:])),
)
def test_a_gc_that_is_overtaken_by_a_rollback_takes_nothing_from_the_champion(at, before, life, forge, point):
    sleeper, ended = life(GC, signal.SIGSTOP, point)
    assert ended is None
    assert life(BACK)[1] == 0, forge.said()
    assert forge.wake(sleeper)[1] == 1
    assert "error: E_FENCED line tiny" in forge.said(back=1)
    check_back(at, before)


def test_what_an_overtaken_gc_took_before_it_died_comes_back_with_the_next_watch(at, before, life, forge):
    sleeper, _ = life(GC, signal.SIGSTOP, REMOVES, then=REMOVED)
    assert life(BACK)[1] == 0, forge.said()
    assert forge.wake(sleeper)[1] == -signal.SIGKILL
    assert len(weights_of(at, 2)) == len(weights_of(at, 3)) - 1  # the champion's
    assert "E_DIGEST" in {each.code for each in examine(at)}
    assert life(("watch", "tiny"))[1] == 0, forge.said()
    check_back(at, before)


@pytest.mark.chaos
@pytest.mark.parametrize("verb", [BACK, ("gc", "tiny", "--restore", 2)], ids=["rollback", "restore"])
def test_what_an_overtaken_gc_took_before_it_died_comes_back_when_it_is_asked_for(at, before, life, forge, verb):
    sleeper, _ = life(GC, signal.SIGSTOP, REMOVES, then=REMOVED)
    assert life(BACK)[1] == 0, forge.said()
    assert forge.wake(sleeper)[1] == -signal.SIGKILL
    assert life(verb)[1] == 0, forge.said()
    check_back(at, before)


def test_weights_that_a_history_does_not_know_to_be_gone_come_back(at, before, life, kill, verbs, toml):
    kill(GC, REMOVED)  # MLflow keeps no history yet that says so
    at, code = lose_ledger(at, verbs(toml))
    assert (code, "thinned" in kinds(at)) == (1, False)  # it misses the shard
    assert life(BACK)[1] == 0
    check_back(at, before)


def test_a_ledger_that_is_lost_after_a_killed_retirement_comes_back(at, kill, verbs, toml):
    kill(
        ("gc", "tiny", "--keep", 0, "--keep-thin", 0, "--yes"),
        ("registry.mlflow_store", "MlflowStore.retire", "after", 1),
    )
    at, code = lose_ledger(at, verbs(toml))
    assert (code, kinds(at)[-2:]) == (0, ["retired", "retired"])
    assert verbs(toml)(*RETIRE)[0] == 0
    assert examine(house(str(toml))) == []
