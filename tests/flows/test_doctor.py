"""The doctor: each fault that can be planted is found and named, and a lost ledger comes back from MLflow."""

import json
import shutil

import pytest
from sqlalchemy import delete, select, update

from experiments.plain_client import move_alias, register_expert
from flows.doctor import examine
from flows.wiring import artifact_root, house, tracking_uri
from registry import database
from registry.manifests import MANIFEST
from registry.mlflow_runs import HISTORY
from registry.records import ExpertState, FoldinError
from registry.schema import lines, merges

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish, prefect, zoo):
    """A line with two experts folded, one rejected, one set aside, one that waits, rolled back and forward again."""
    from flows.rollback import rollback
    from flows.watch import watch

    path = furnish(tmp_path_factory.mktemp("patient")) / "foldin.toml"
    at, strict = house(str(path)), path.read_text()

    def register(folder, task):
        register_expert(tracking_uri(at.config), "tiny-experts", folder, task, artifact_root(at.config))

    for number in (1, 2):
        register(zoo / f"expert-{number}", f"task-{number}")
    register(zoo / "expert-1", "task-1")  # the same weights
    watch("tiny", str(path))
    path.write_text(strict.replace("min_expert_gain = -1.0", "min_expert_gain = 0.99"))
    register(zoo / "expert-3", "task-3")
    house.cache_clear()
    watch("tiny", str(path))
    path.write_text(strict)
    house.cache_clear()
    rollback("tiny", "a test", 2, "ann", str(path))
    rollback("tiny", "it was right", 3, "ann", str(path))
    yield path
    house.cache_clear()


@pytest.fixture
def at(reopened):
    return reopened


def told(at):
    return [(each.code, str(each)) for each in examine(at)]


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def damaged_weights(at):
    flip(at.mlflow.folder("tiny", 2) / "model.safetensors")


def swapped_state(at):
    second, third = (
        next((at.mlflow.folder("tiny", number) / "foldin/state").glob("*.safetensors")) for number in (2, 3)
    )
    shutil.copyfile(second, third)


def another_manifest(at):
    """As somebody would who damages a file and then writes a manifest that says so."""
    from registry.files import read_json
    from registry.manifests import write_manifest

    folder = at.mlflow.folder("tiny", 3)
    facts = {key: value for key, value in read_json(folder / MANIFEST).items() if key != "files"}
    flip(folder / "model.safetensors")
    write_manifest(folder, facts)


def lost_parent(at):
    at.mlflow._client.delete_model_version("tiny", "2")


def written(at, statement):
    with database.transaction(at.ledger._engine) as tx:
        tx.execute(statement)


def parent_without_row(at):
    written(at, delete(merges).where(merges.c.version == 2))


def another_parent(at):
    written(at, update(merges).where(merges.c.version == 3).values(parent=1))


def ungated_alias(at):
    client = at.mlflow._client
    version = client.create_model_version("tiny", client.get_model_version("tiny", "2").source, model_id=None)
    move_alias(tracking_uri(at.config), "tiny", int(version.version))


def moved_alias(at):
    move_alias(tracking_uri(at.config), "tiny", 2)


def stale_history(at):
    run = at.mlflow.runs.history_run("tiny").info.run_id
    at.mlflow._client.set_tag(run, HISTORY, "history-0.json.gz " + 64 * "0")


PLANTED = {
    damaged_weights: ("E_DIGEST", "file model.safetensors: the file is not the one that the manifest lists"),
    swapped_state: ("E_DIGEST", "file foldin/state/"),
    another_manifest: (
        "E_DIGEST",
        "tiny v3, file foldin/manifest.json: the version's manifest is not the one that was",
    ),
    lost_parent: ("E_VERSION", "tiny v2: the ledger has a version that MLflow lost"),
    parent_without_row: ("E_CHAIN", "tiny v3: the version's parent is in no ledger row. Expected v2"),
    another_parent: (
        "E_CHAIN",
        "the version's manifest names another parent than the ledger. Expected v1 with manifest",
    ),
    ungated_alias: ("E_ALIAS", "the alias champion stands on a version that may not be champion. Expected version 3"),
    moved_alias: (
        "E_ALIAS",
        "the alias champion stands elsewhere than the ledger says. Expected version 3. Found version 2",
    ),
    stale_history: ("E_HISTORY", "line tiny: MLflow keeps another history of the line"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_and_named(at, plant, kept):
    assert told(at) == []
    code, words = PLANTED[plant]
    with kept(at):
        plant(at)
        assert any(found == code and words in text for found, text in told(at)), told(at)
    assert told(at) == []


def test_the_verb_names_what_it_finds_and_ends_with_one(at, toml, verbs, kept):
    verb = verbs(toml)
    assert verb("--quiet", "doctor")[:2] == (0, "")
    with kept(at):
        damaged_weights(at)
        code, out, _ = verb("--quiet", "doctor", "--json")
        assert (code, [each["code"] for each in json.loads(out)]) == (1, ["E_DIGEST"])
    assert verb("--quiet", "doctor", "--json")[:2] == (0, "[]\n")


def test_a_lost_ledger_comes_back_from_mlflow(at, toml, verbs, zoo, kept):
    verb = verbs(toml)
    before = {name: verb("--quiet", name, "tiny", "--json")[1] for name in ("log", "status", "show")}
    assert {each["state"] for each in json.loads(before["log"])["experts"]} == {"folded", "quarantined", "rejected"}
    with kept(at):
        house(str(toml)).ledger.close()
        for path in at.config.home.glob("ledger.db*"):
            path.unlink()
        code, out, _ = verb("--quiet", "doctor")
        assert (code, "E_LINE line tiny: MLflow has the line and the ledger does not" in out) == (1, True)
        assert "versions 1 to 3 in MLflow. Put it back with `foldin doctor --rebuild`" in out
        for lost in (("log", "tiny"), ("watch", "tiny"), ("rollback", "tiny", "--because", "it is lost")):
            code, _, said = verb(*lost)
            assert (code, "foldin doctor --rebuild" in said) == (1, True), said
        code, out, said = verb("doctor", "--rebuild")
        assert (code, out) == (0, "")
        assert "line tiny: 3 versions and 4 experts put back from MLflow" in said
        assert {name: verb("--quiet", name, "tiny", "--json")[1] for name in before} == before
        assert "nothing was put back" in verb("doctor", "--rebuild")[2]
        # And it goes on from there.
        register_expert(tracking_uri(at.config), "tiny-experts", zoo / "expert-4", "task-4", artifact_root(at.config))
        assert verb("watch", "tiny")[:2] == (0, "tiny-experts v5: folded as v4\n")
        assert verb("--quiet", "doctor")[:2] == (0, "")


def test_a_lost_ledger_comes_back_without_a_deleted_version_that_the_champion_did_not_grow_from(at, toml, verbs, kept):
    verb = verbs(toml)
    with kept(at):
        assert verb("rollback", "tiny", "--to", "2", "--because", "so that version 3 is beside it")[0] == 0
        lost_version(at, 3)
        before = verb("--quiet", "log", "tiny", "--json")[1]
        lose_ledger(at, toml)
        code, out, said = verb("doctor", "--rebuild")
        assert "tiny v3 was deleted in MLflow; the champion did not grow from it" in said
        assert (code, "E_VERSION tiny v3: the ledger has a version that MLflow lost" in out) == (1, True)
        assert verb("--quiet", "log", "tiny", "--json")[1] == before
        lost_version(at, 1)
        lose_ledger(at, toml)
        code, _, said = verb("doctor", "--rebuild")
        assert (code, "E_SOURCE tiny v1" in said) == (1, True)


def lost_version(at, number):
    at.mlflow._client.delete_model_version("tiny", str(number))


def lose_ledger(at, toml):
    house(str(toml)).ledger.close()
    for path in at.config.home.glob("ledger.db*"):
        path.unlink()


def test_a_watch_of_a_blocked_line_ends_with_one_and_says_why(at, toml, verbs, kept):
    with kept(at):
        ungated_alias(at)
        code, out, said = verbs(toml)("watch", "tiny")
        assert (code, out) == (1, "")
        assert "E_BLOCKED line tiny: the alias champion was moved by hand to version 4" in said
        assert "Move the alias champion to a version that passed" in said


def test_a_history_that_contradicts_the_versions_is_not_believed(at, toml, kept):
    from flows.rebuilding import rebuild

    with kept(at):
        another_manifest(at)
        at.ledger.close()
        for path in at.config.home.glob("ledger.db*"):
            path.unlink()
        house.cache_clear()
        fresh = house(str(toml))
        with pytest.raises(
            FoldinError, match=r"E_HISTORY tiny v3.*the version has another manifest than the history says"
        ):
            rebuild(fresh)
        assert fresh.ledger.lines() == []


def test_a_history_that_was_changed_is_not_believed(at, kept):
    with kept(at):
        stale_history(at)
        with pytest.raises(FoldinError, match="E_HISTORY history of line tiny in MLflow"):
            at.mlflow.runs.history("tiny")


def test_a_line_that_the_ledger_knows_is_never_overwritten(at):
    from registry.history import read

    document = read(at.mlflow.runs.history("tiny"), "tiny")
    with pytest.raises(FoldinError, match="E_HISTORY line tiny: the ledger knows the line"):
        at.ledger.restore(document)
    with database.transaction(at.ledger._engine) as tx:
        assert len(tx.execute(select(lines)).all()) == 1
    assert len(at.ledger.experts("tiny", ExpertState.FOLDED)) == 2
