"""A line rebuilt without some experts is the line that never saw them, to the byte; and nothing else changes."""

import json
import shutil

import pytest

from experiments.plain_client import champion as alias
from experiments.plain_client import register_expert
from flows.doctor import check_line
from flows.versions import STATE_FOLDER, open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import hash_tree
from registry.records import FoldinError

pytestmark = pytest.mark.integration


def run(toml, zoo, line, numbers):
    """A line with these experts folded, in this order."""
    from flows.watch import watch

    at = house(str(toml))
    for number in numbers:
        root, model = artifact_root(at.config), f"{line}-experts"
        register_expert(tracking_uri(at.config), model, zoo / f"expert-{number}", f"task-{number}", root)
    watch(line, str(toml))
    return at


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish, prefect, zoo):
    """Lines in one house: `tiny` has experts 1, 2, 3; each other one never saw one of them, or saw them otherwise."""
    path = furnish(tmp_path_factory.mktemp("replays")) / "foldin.toml"
    text = path.read_text()
    table = text[text.index("[lines.tiny]") :]
    others = ("without1", "without2", "without3", "turned", "only1")
    path.write_text("\n".join([text, *(table.replace("tiny", name) for name in others)]))
    run(path, zoo, "tiny", (1, 2, 3))
    yield path
    house.cache_clear()


@pytest.fixture
def at(reopened):
    return reopened


def replayed(at, toml, **wanted):
    from flows.replay import replay

    return replay("tiny", "a test", who="ann", config_file=str(toml), **wanted)


def bytes_of(at, line, number):
    """Weights, slots and what the state remembers of numbers; not the names of the line's experts."""
    version = open_version(at, line, number)
    weights = {name: digest for name, digest in hash_tree(version.folder).items() if name.endswith(".safetensors")}
    memory = version.memory
    assert any(name.startswith(STATE_FOLDER) for name in weights) == bool(memory.experts)
    return weights, memory.stats, memory.parameters, memory.cast_loss, [each.task for each in memory.experts]


@pytest.mark.parametrize(
    ("wanted", "twin", "numbers", "start"),
    [
        pytest.param({"without": ["tiny-experts v1"]}, "without1", (2, 3), 1, marks=pytest.mark.chaos),
        pytest.param({"without": ["task-2"]}, "without2", (1, 3), 2, marks=pytest.mark.chaos),
        ({"without": ["v3"]}, "without3", (1, 2), 3),
        pytest.param({"without": ["2", "tiny-experts:3"]}, "only1", (1,), 2, marks=pytest.mark.chaos),
        pytest.param({"order": ["v3", "v1", "v2"]}, "turned", (3, 1, 2), 1, marks=pytest.mark.chaos),
    ],
    ids=["the first", "a middle one", "the last", "two", "another order"],
)
def test_a_replay_is_the_line_that_never_saw_the_expert(at, toml, zoo, wanted, twin, numbers, start):
    run(toml, zoo, twin, numbers)
    before = at.ledger.experts("tiny")
    facts = replayed(at, toml, **wanted)
    assert (facts["start"], facts["promoted"], facts["champion"]) == (start, False, 4)
    assert bytes_of(at, "tiny", facts["version"]) == bytes_of(at, twin, at.ledger.line(twin).champion)
    assert facts["verdict"] == "passed"
    assert set(facts["scores"]) == {each.task for each in open_version(at, "tiny", facts["version"]).memory.experts}
    # The champion, its experts and the alias are as they were.
    assert (at.ledger.line("tiny").champion, alias(tracking_uri(at.config), "tiny")) == (4, 4)
    assert at.ledger.experts("tiny") == before
    assert at.ledger.events("tiny")[-1].kind == "replayed"
    assert replayed(at, toml, **wanted)["version"] == facts["version"]  # found again
    assert list(check_line(at, "tiny")) == []


@pytest.mark.chaos
def test_a_replay_that_is_promoted_takes_the_expert_out_and_the_next_one_is_folded_into_it(at, toml, zoo, verbs):
    verb = verbs(toml)
    code, out, _ = verb("replay", "tiny", "--without", "task-2", "--because", "poisoned", "--promote", "--json")
    facts = json.loads(out)
    assert (code, facts["promoted"], facts["without"]) == (0, True, ["tiny-experts v2"])
    at = house(str(toml))
    assert alias(tracking_uri(at.config), "tiny") == at.ledger.line("tiny").champion == facts["version"]
    assert [str(each.state) for each in at.ledger.experts("tiny")] == ["folded", "rolled-back", "folded"]
    assert "without tiny-experts v2: poisoned" in at.ledger.experts("tiny")[1].reason
    assert list(check_line(at, "tiny")) == []
    run(toml, zoo, "tiny", (4,))
    memory = open_version(at, "tiny", at.ledger.line("tiny").champion).memory
    assert [each.task for each in memory.experts] == ["task-1", "task-3", "task-4"]
    # Back to where everything was, with all of them.
    assert verb("rollback", "tiny", "--to", 4, "--because", "it was fine")[0] == 0
    at = house(str(toml))
    assert [str(each.state) for each in at.ledger.experts("tiny")] == ["folded", "folded", "folded", "rolled-back"]
    code, out, _ = verb("requeue", "tiny", "v4", "--because", "once more")
    assert (code, out) == (0, "tiny-experts v4: pending\n")
    code, out, _ = verb("watch", "tiny")
    assert (code, out.partition(" as ")[0]) == (0, "tiny-experts v4: folded")
    at = house(str(toml))
    assert [str(each.state) for each in at.ledger.experts("tiny")] == ["folded"] * 3 + ["rolled-back", "folded"]
    assert list(check_line(at, "tiny")) == []
    assert verb("requeue", "tiny", "v4", "--because", "again")[2].startswith(
        "error: E_EXPERT expert tiny-experts v4: the champion holds"
    )
    assert verb("rollback", "tiny", "--to", 4, "--because", "as it was")[0] == 0


def test_the_table_for_people(toml, verbs):
    code, out, said = verbs(toml)("replay", "tiny", "--without", "v3", "--because", "a look")
    assert code == 0
    assert "is not the champion" in out
    assert "replaying 0 of 2 experts from v3" in said


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"without": ["v9"]}, "E_EXPERT tiny v4: there is no such expert. Expected one of tiny-experts v1"),
        ({"without": ["v1"], "order": ["v2"]}, "the order does not name every expert that is kept once"),
        ({"order": ["v1", "v2", "v2"]}, "the order does not name every expert"),
    ],
)
def test_what_cannot_be_replayed_is_said(at, toml, wanted, words):
    with pytest.raises(FoldinError, match=words):
        replayed(at, toml, **wanted)
    assert at.ledger.line("tiny").champion == 4


def test_an_expert_that_was_changed_meanwhile_is_not_folded_again(at, toml, zoo):
    (source,) = [at.mlflow.fetch(each) for each in at.mlflow.newer("tiny-experts", 2) if each.version == 3]
    aside = toml.parent / "expert-aside"
    shutil.copytree(source, aside)
    shutil.copyfile(zoo / "expert-5/model.safetensors", source / "model.safetensors")
    try:
        with pytest.raises(FoldinError, match=r"E_DIGEST expert tiny-experts v3: the expert's weights are not those"):
            replayed(at, toml, without=["v1", "v2"])
    finally:
        shutil.rmtree(source)
        shutil.move(aside, source)
    assert at.ledger.line("tiny").champion == 4
    assert list(check_line(at, "tiny")) == []
