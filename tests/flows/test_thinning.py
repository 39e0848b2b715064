"""Old versions without their weights: what is saved, had back to the byte, and that nothing is lost on the way."""

import json
import shutil

import pytest

from experiments.plain_client import champion as alias
from experiments.plain_client import move_alias, register_expert
from flows import collecting
from flows.collecting import Keep, collect, collectable, stored_of
from flows.doctor import examine
from flows.memory import Memory
from flows.thinning import read_again
from flows.versions import STATE_FOLDER, Version, open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import hash_tree, sha256_file
from registry.records import FoldinError
from registry.weights import Checkpoint

pytestmark = pytest.mark.integration
POLICY = Keep(1, 100)


def register(at, zoo, number):
    root = artifact_root(at.config)
    register_expert(tracking_uri(at.config), "tiny-experts", zoo / f"expert-{number}", f"task-{number}", root)


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish, prefect, zoo):
    """Four experts folded into versions 2 to 5."""
    from flows.watch import watch

    path = furnish(tmp_path_factory.mktemp("thinned")) / "foldin.toml"
    at = house(str(path))
    for number in (1, 2, 3, 4):
        register(at, zoo, number)
    watch("tiny", str(path))
    yield path
    house(str(path)).ledger.close()
    house.cache_clear()


@pytest.fixture
def at(undone):
    """The line as it was folded."""
    return undone


@pytest.fixture
def thinned(at):
    """The same, with versions 2 and 3 thin, and the digests of their files before."""
    before = {number: hash_tree(at.mlflow.folder("tiny", number)) for number in (2, 3)}
    collect(at, "tiny", POLICY, "room", "ann")
    return before


def kinds(at):
    return [event.kind for event in at.ledger.events("tiny")]


def weights_of(at, number):
    return at.mlflow.folder("tiny", number) / "model.safetensors"


def rolled_back(toml, number):
    from flows.rollback import rollback

    return rollback("tiny", "a test", number, "ann", str(toml))


def test_old_weights_go_and_everything_else_stays(at, toml, verbs):
    verb = verbs(toml)
    code, out, _ = verb("gc", "tiny", "--keep", 1, "--json")
    before = json.loads(out)
    assert code == 0
    items = [each for each in before["items"] if each["kind"] == "weights"]
    assert [each["name"] for each in items] == ["tiny v2", "tiny v3"]
    assert {each["files"] for each in before["versions"].values()} == {"whole"}
    at = house(str(toml))
    assert {each["size"] for each in items} == {weights_of(at, 2).stat().st_size}
    digests = hash_tree(at.mlflow.folder("tiny", 2))
    after = json.loads(verb("gc", "tiny", "--keep", 1, "--yes", "--json")[1])
    at = house(str(toml))
    for each in items:
        old, new = (facts["versions"][str(each["version"])] for facts in (before, after))
        assert (new["bytes"], new["files"]) == (old["bytes"] - each["size"], "thin")
    assert after["left"] == {}
    assert hash_tree(at.mlflow.folder("tiny", 2)) == {
        name: digest for name, digest in digests.items() if name != "model.safetensors"
    }
    assert at.mlflow.expert("tiny", 2).tags["foldin.state"] == "thin"
    assert examine(at) == []
    assert collectable(at, "tiny", POLICY, stored_of(at, "tiny")) == []
    assert "v2  + task-1  (tiny-experts v1), thin" in verb("log", "tiny")[1]
    assert "thin: made again from base and state" in verb("show", "tiny", 2)[1]
    code, _, said = verb("diff", "tiny", 2, 5)
    assert (code, "E_THIN version 2: the serving weights were given up" in said) == (1, True)
    assert "foldin gc tiny --restore 2" in said
    history = verb("--quiet", "log", "tiny", "--json")[1]
    house(str(toml)).ledger.close()
    for path in (toml.parent / ".foldin").glob("ledger.db*"):
        path.unlink()
    assert verb("--quiet", "doctor", "--rebuild")[:2] == (0, "")
    assert verb("--quiet", "log", "tiny", "--json")[1] == history
    assert verb("gc", "tiny", "--restore", 2)[:2] == (0, "tiny: v2 is whole\n")
    assert hash_tree(house(str(toml)).mlflow.folder("tiny", 2)) == digests


def test_a_rollback_has_the_weights_back_to_the_byte_and_folding_goes_on(at, toml, thinned, zoo):
    from flows.watch import watch

    assert not weights_of(at, 3).exists()
    assert rolled_back(toml, 3) == {"from": 5, "to": 3}
    assert hash_tree(at.mlflow.folder("tiny", 3)) == thinned[3]
    assert "foldin.state" not in at.mlflow.expert("tiny", 3).tags
    assert kinds(at)[-2:] == ["restored", "rollback"]
    assert alias(tracking_uri(at.config), "tiny") == 3
    register(at, zoo, 5)
    assert [each["state"] for each in watch("tiny", str(toml))] == ["folded"]
    assert [each.task for each in open_version(at, "tiny", 6).memory.experts] == ["task-1", "task-2", "task-5"]
    assert examine(at) == []


@pytest.mark.chaos
def test_a_replay_that_begins_at_a_thin_version_gives_the_bytes_of_an_untouched_line(at, toml, kept):
    from flows.replay import replay

    def replayed():
        facts = replay("tiny", "a test", without=["task-3"], who="ann", config_file=str(toml))
        assert facts["start"] == 3
        version = open_version(at, "tiny", facts["version"])
        found = hash_tree(version.folder)
        return {name: digest for name, digest in found.items() if name.endswith(".safetensors")}

    with kept(at):
        untouched = replayed()
    collect(at, "tiny", POLICY, "room", "ann")
    assert replayed() == untouched
    assert weights_of(at, 3).exists()
    assert not weights_of(at, 2).exists()
    collect(at, "tiny", Keep(0, 100), "room", "ann")
    assert not weights_of(at, 6).exists()
    assert replayed() == untouched  # found again by its merge key, and had back
    assert len(at.ledger.merges("tiny")) == 6


def test_a_hand_moved_alias_is_adopted_and_its_version_had_back(at, toml, thinned):
    from flows.watch import watch

    move_alias(tracking_uri(at.config), "tiny", 2)
    assert [each.code for each in examine(at)] == ["E_ALIAS"]
    watch("tiny", str(toml))
    assert at.ledger.line("tiny").champion == 2
    assert kinds(at)[-2:] == ["restored", "adopted"]
    assert hash_tree(at.mlflow.folder("tiny", 2)) == thinned[2]
    assert examine(at) == []


def test_a_damaged_state_gives_nothing_back_and_moves_nothing(at, toml, thinned):
    from flows.watch import watch

    state = next((at.mlflow.folder("tiny", 2) / STATE_FOLDER).glob("*.safetensors"))
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(FoldinError, match="E_DIGEST"):
        rolled_back(toml, 2)
    assert alias(tracking_uri(at.config), "tiny") == at.ledger.line("tiny").champion == 5
    move_alias(tracking_uri(at.config), "tiny", 2)
    watch("tiny", str(toml))
    assert "moved by hand to version 2, which may not be champion: E_DIGEST" in at.ledger.line("tiny").blocked


def test_weights_that_come_out_otherwise_stay(at, toml, monkeypatch):
    """Stands for another processor: the same state gives other bytes."""

    def otherwise(folder, settings, base, version):
        return {**read_again(folder, settings, base, version), "model.safetensors": "0" * 64}

    with monkeypatch.context() as patch:
        patch.setattr("flows.thinning.read_again", otherwise)
        items, left = collect(at, "tiny", POLICY, "room", "ann")
        assert ([each for each in items if each.kind == "weights"], sorted(left)) == ([], [2, 3])
        assert "E_THIN tiny v2, file model.safetensors: base and state do not give" in left[2]
    assert open_version(at, "tiny", 2).weights()
    assert "thinned" not in kinds(at)
    collect(at, "tiny", POLICY, "room", "ann")
    monkeypatch.setattr("flows.thinning.read_again", otherwise)
    with pytest.raises(FoldinError, match="E_THIN tiny v3"):
        rolled_back(toml, 3)
    assert at.ledger.line("tiny").champion == 5


def test_nothing_is_given_up_while_the_base_is_damaged(at):
    weights = weights_of(at, 1)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    left = collect(at, "tiny", POLICY, "room", "ann")[1]
    assert sorted(left) == [2, 3]
    assert all("nothing gives its weights back: E_DIGEST" in why for why in left.values())
    assert weights_of(at, 2).exists()


def test_damaged_weights_are_made_again_by_a_rollback_whatever_the_ledger_calls_them(at, toml):
    before = hash_tree(at.mlflow.folder("tiny", 3))
    content = bytearray(weights_of(at, 3).read_bytes())
    content[-1] ^= 1
    weights_of(at, 3).write_bytes(content)
    (told,) = examine(at)
    assert (told.code, told.remedy) == ("E_DIGEST", "run `foldin gc tiny --restore 3`; it makes it again")
    assert rolled_back(toml, 3) == {"from": 5, "to": 3}
    assert hash_tree(at.mlflow.folder("tiny", 3)) == before
    assert kinds(at)[-2:] == ["restored", "rollback"]
    assert examine(at) == []
    weights_of(at, 1).unlink()
    with pytest.raises(FoldinError, match=r"E_DIGEST .*file model.safetensors"):
        rolled_back(toml, 1)
    assert at.ledger.line("tiny").champion == 3


@pytest.mark.parametrize(("step", "keep"), [("_old_versions", Keep(0, 0)), ("_old_weights", Keep(0, 100))])
def test_an_alias_that_comes_while_a_version_is_about_to_go_keeps_it(at, monkeypatch, step, keep):
    found = getattr(collecting, step)

    def named_meanwhile(*arguments):
        items = found(*arguments)
        at.mlflow._client.set_registered_model_alias("tiny", "pinned", "3")
        return items

    monkeypatch.setattr(collecting, step, named_meanwhile)
    before = hash_tree(at.mlflow.folder("tiny", 3))
    items, left = collect(at, "tiny", keep, "room", "ann")
    assert [each.version for each in items if each.version] == [2, 4]
    assert left.keys() == {3}
    assert "E_ALIAS tiny v3: an alias names the version" in left[3]
    assert hash_tree(at.mlflow.folder("tiny", 3)) == before
    assert examine(at) == []


def test_an_alias_on_a_thin_version_gives_it_its_weights_back_with_the_next_watch(at, toml, thinned):
    from flows.watch import watch

    at.mlflow._client.set_registered_model_alias("tiny", "pinned", "2")
    assert [(each.code, each.where) for each in examine(at)] == [("E_THIN", "tiny v2")]
    watch("tiny", str(toml))
    assert hash_tree(at.mlflow.folder("tiny", 2)) == thinned[2]
    assert not weights_of(at, 3).exists()
    assert examine(at) == []


def test_an_alias_keeps_a_version_whole_and_the_doctor_tells_of_one_that_came_too_late(at):
    uri = tracking_uri(at.config)
    client = at.mlflow._client
    client.set_registered_model_alias("tiny", "pinned", "2")
    items, _ = collect(at, "tiny", POLICY, "room", "ann")
    assert [each.version for each in items if each.kind == "weights"] == [3]
    client.set_registered_model_alias("tiny", "pinned", "3")
    assert [(each.code, each.where) for each in examine(at)] == [("E_THIN", "tiny v3")]
    assert alias(uri, "tiny") == 5


@pytest.mark.parametrize("method", ["opcm", "average", "task_arithmetic", "magmax"])
def test_base_and_state_give_what_was_served(zoo, bare_line, method):
    line = bare_line(zoo / "base", method=method)
    for number in (1, 2):
        plan = line.fold(zoo / f"expert-{number}").plan
    folder, served = line.serve(plan)
    shutil.copytree(line.slots.folder, folder / STATE_FOLDER)
    memory = Memory(method, {}, "0" * 64, served.sha256, stats=line.stats)
    made = read_again(line.root / "again", line.settings, line.version, Version(2, folder, "", memory, True))
    assert made == served.files == {"model.safetensors": sha256_file(folder / "model.safetensors")}
    assert len(Checkpoint.open(line.root / "again")) > 0
