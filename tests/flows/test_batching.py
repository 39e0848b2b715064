"""Nightly: several experts in one pass, judged once; who is to blame ends up alone; what the morning hears."""

import json
import signal
from datetime import datetime

import pytest

from experiments.plain_client import move_alias, register_expert
from flows import merge, nightly
from flows.batching import together
from flows.blackout import blackout_at, window_of
from flows.doctor import examine
from flows.naming import listed
from flows.options import LineConfig, SearchConfig
from flows.reading import holders, log, status
from flows.rebuilding import rebuild
from flows.starting import start
from flows.versions import STATE_FOLDER, open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import hash_tree
from registry.records import FoldinError, Refusal


class Night:
    """A line of the night, and what can be asked of it."""

    def __init__(self, folder, **settings):
        self.toml = folder / "foldin.toml"
        rows = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        text = self.toml.read_text().replace("interval = 3600.0", f'interval = 3600.0\ntrigger = "nightly"\n{rows}')
        self.toml.write_text(text)
        self.at = house(str(self.toml))

    def register(self, folder, task):
        config = self.at.config
        return register_expert(tracking_uri(config), "tiny-experts", folder, task, artifact_root(config))

    def fold(self):
        """A nightly round."""
        return nightly.nightly("tiny", str(self.toml))

    def one_by_one(self):
        """A look, as by day."""
        from flows.watch import watch

        return watch("tiny", str(self.toml))

    def version(self, number):
        return open_version(self.at, "tiny", number)

    def bytes_of(self, number):
        """What a version holds: serving weights, state."""
        version = self.version(number)
        return version.memory.weights_sha256, hash_tree(version.folder / STATE_FOLDER), version.memory.stats

    @property
    def states(self):
        return [str(each.state) for each in self.at.ledger.experts("tiny")]


@pytest.fixture
def night(workshop, prefect):
    """A function that opens the line with more settings."""
    opened = []

    def made(folder=workshop, **settings):
        opened.append(Night(folder, **settings))
        return opened[-1]

    yield made
    for each in opened:
        each.at.ledger.close()


def rule(line, **rules):
    """Gate rules in place of the lenient ones."""
    rows = [row for row in line.toml.read_text().splitlines() if row.partition(" = ")[0] not in rules]
    line.toml.write_text("\n".join([*rows, *(f"{key} = {value}" for key, value in rules.items())]) + "\n")
    house.cache_clear()
    line.at = house(str(line.toml))


@pytest.mark.integration
def test_a_night_is_one_version_with_the_bytes_of_one_fold_after_the_other(night, zoo, tmp_path, furnish):
    (tmp_path / "day").mkdir()
    line, day = night(), Night(furnish(tmp_path / "day"))
    for number in (1, 2, 3):
        for each in (line, day):
            each.register(zoo / f"expert-{number}", f"task-{number}")
    facts = line.fold()
    assert [(each["expert"], each["state"], each["version"]) for each in facts["outcomes"]] == [
        (f"tiny-experts v{number}", "folded", 2) for number in (1, 2, 3)
    ]
    assert facts["champion"] == [None, 2]
    assert set(facts["tasks"]) == {"task-1", "task-2", "task-3"}
    assert (line.states, facts["trouble"]) == (["folded"] * 3, [])
    assert line.fold()["outcomes"] == []
    assert [each["version"] for each in day.one_by_one()] == [2, 3, 4]
    assert line.bytes_of(2) == day.bytes_of(4)
    assert line.version(2).memory.experts == day.version(4).memory.experts

    # Its lineage, in the ledger and in MLflow.
    assert [each["expert"] for each in log(line.at, "tiny")["versions"]] == [
        None,
        "tiny-experts v1, tiny-experts v2, tiny-experts v3",
    ]
    held = holders(line.at, "tiny", "tiny-experts v1")
    assert [each["version"] for each in held["versions"]] == [2]
    client = line.at.mlflow._client
    version = client.get_model_version("tiny", "2")
    assert version.tags["foldin.expert"] == "tiny-experts v1, tiny-experts v2, tiny-experts v3"
    assert version.description.startswith("adds task-1 (tiny-experts v1), task-2 (tiny-experts v2), task-3")
    sources = [
        client.get_model_version(*each).source for each in (("tiny", "1"), *(("tiny-experts", n) for n in "123"))
    ]
    inputs = client.get_run(version.run_id).inputs.model_inputs
    assert {each.model_id for each in inputs} == {each.removeprefix("models:/") for each in sources}
    assert examine(line.at) == []

    # A lost ledger comes back; a rollback takes all of them back; a replay without one is what a day without it gives.
    told = log(line.at, "tiny")
    line.at.ledger.close()
    (line.at.config.home / "ledger.db").rename(line.at.config.home / "lost.db")
    house.cache_clear()
    line.at = house(str(line.toml))
    assert rebuild(line.at) == ["tiny"]
    assert log(line.at, "tiny") == told
    move_alias(tracking_uri(line.at.config), "tiny", 1)
    line.fold()
    assert line.states == ["rolled-back"] * 3
    move_alias(tracking_uri(line.at.config), "tiny", 2)
    line.fold()
    assert line.states == ["folded"] * 3


@pytest.mark.integration
@pytest.mark.chaos
def test_a_night_without_one_of_its_experts_is_built_again_from_the_version_before(night, zoo, furnish, tmp_path):
    from flows.replay import replay

    (tmp_path / "never").mkdir()
    line, never = night(), Night(furnish(tmp_path / "never"))
    for number in (1, 2, 3):
        line.register(zoo / f"expert-{number}", f"task-{number}")
        if number != 2:
            never.register(zoo / f"expert-{number}", f"task-{number}")
    line.fold()
    facts = replay("tiny", "poisoned", ["tiny-experts v2"], config_file=str(line.toml))
    assert (facts["start"], facts["version"]) == (1, 4)
    never.one_by_one()  # last: MLflow's client knows one registry a process
    assert line.bytes_of(4) == never.bytes_of(3)


@pytest.mark.integration
def test_who_spoils_a_night_ends_alone_and_the_others_are_folded_in_order(night, zoo, expert_maker):
    line = night()
    rule(line, max_norm_ratio=3)
    loud = expert_maker(7, size=0.2)
    for number, folder in enumerate((zoo / "expert-1", zoo / "expert-2", zoo / "expert-3", loud, zoo / "expert-4"), 1):
        line.register(folder, f"task-{number}")
    outcomes = line.fold()["outcomes"]
    assert [(each["expert"][-1], each["state"], each["version"]) for each in outcomes] == [
        ("1", "folded", 2),
        ("2", "folded", 2),
        ("3", "folded", 2),
        ("4", "rejected", None),
        ("5", "folded", 3),
    ]
    assert "the expert's change has norm" in outcomes[3]["reason"]
    assert [each.task for each in line.version(3).memory.experts] == ["task-1", "task-2", "task-3", "task-5"]
    assert not list(line.at.config.home.glob("work/tiny/*"))
    assert examine(line.at) == []


@pytest.mark.integration
def test_the_same_task_and_the_same_weights_are_not_in_one_pass_and_damage_is_set_aside(night, zoo, expert_maker):
    line = night(batch=8)
    for folder, task in (
        (zoo / "expert-1", "a"),
        (zoo / "expert-2", "a"),
        (zoo / "expert-2", "b"),
        (zoo / "expert-3", "c"),
    ):
        line.register(folder, task)
    outcomes = line.fold()["outcomes"]
    assert [(each["state"], each["version"]) for each in outcomes] == [
        ("folded", 2),
        ("folded", 3),
        ("quarantined", None),
        ("folded", 4),
    ]
    assert "E_DUPLICATE" in outcomes[2]["reason"]
    assert {each.attempts for each in line.at.ledger.experts("tiny")} <= {0, 1}


@pytest.mark.integration
@pytest.mark.parametrize(
    "point",
    [
        pytest.param(("registry.ledger", "Ledger.record_verdict", "after", 1), marks=pytest.mark.chaos),
        ("registry.mlflow_store", "MlflowStore.publish", "after", 1),
        pytest.param(("flows.merge", "follow", "before", 1), marks=pytest.mark.chaos),
    ],
    ids=lambda point: point[1],
)
def test_a_night_that_was_killed_is_finished_with_the_same_version(night, zoo, forge, workshop, own_prefect, point):
    line = night()
    start(line.at, "tiny", line.at.config.line("tiny"))
    for number in (1, 2, 3):
        line.register(zoo / f"expert-{number}", f"task-{number}")
    line.at.ledger.close()
    _, ended = forge.life(workshop, signal.SIGKILL, point, ("nightly", "tiny"))
    assert ended == -signal.SIGKILL
    _, ended = forge.life(workshop, verb=("nightly", "tiny"))
    assert ended == 0
    assert (line.states, line.at.ledger.line("tiny").champion) == (["folded"] * 3, 2)
    assert len(line.at.mlflow.versions("tiny")) == 2
    assert len([each for each in line.at.ledger.merges("tiny") if each.also]) == 1
    assert examine(line.at) == []


@pytest.mark.integration
def test_what_a_pass_has_no_room_for_is_tried_with_fewer(night, zoo, monkeypatch):
    line, fold = night(), merge.fold

    def small(scratch, settings, recipe, base, parent, experts, progress):
        if len(experts) > 1:
            raise FoldinError(Refusal("E_MEMORY", "there is too little memory for the tensor"))
        return fold(scratch, settings, recipe, base, parent, experts, progress)

    monkeypatch.setattr(merge, "fold", small)
    for number in (1, 2):
        line.register(zoo / f"expert-{number}", f"task-{number}")
    assert [(each["state"], each["version"]) for each in line.fold()["outcomes"]] == [("folded", 2), ("folded", 3)]


@pytest.mark.integration
def test_a_night_that_fails_half_way_tells_what_was_done_and_fails(night, zoo, monkeypatch):
    line, told = night(), []
    folded = nightly.fold_all

    def then_away(name, config_file, merge):
        folded(name, config_file, merge)
        raise FoldinError(Refusal("E_S3", "the store is away"))

    monkeypatch.setattr(nightly, "fold_all", then_away)
    monkeypatch.setattr(nightly, "send", lambda settings, subject, text: told.append((subject, text)))
    line.register(zoo / "expert-1", "task-1")
    with pytest.raises(FoldinError, match="E_S3 the store is away"):
        line.fold()
    ((subject, text),) = told
    assert subject == "foldin: tiny: 1 folded; TROUBLE"
    assert "tiny-experts v1 | folded | v2" in text
    assert "the store is away" in text


@pytest.mark.integration
def test_a_champion_that_was_damaged_is_told_of_and_the_round_fails(night, zoo):
    line = night()
    line.register(zoo / "expert-1", "task-1")
    line.fold()
    weights = next(line.at.mlflow.folder("tiny", 2).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(FoldinError, match="E_DIGEST"):
        line.fold()


@pytest.mark.integration
def test_in_a_blackout_the_line_looks_and_folds_nothing(night, zoo):
    line = night(blackout=["Mon-Sun 00:00-24:00"])
    line.register(zoo / "expert-1", "task-1")
    assert (line.fold()["outcomes"], line.one_by_one(), line.states) == ([], [], ["pending"])
    assert status(line.at, "tiny")["blackout"] == "Mon-Sun 00:00-24:00"


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("Mon-Fri 08:00-18:00", ["2026-11-23 08:00", "2026-11-27 17:59"], ["2026-11-23 18:00", "2026-11-22 12:00"]),
        ("22:00-06:00", ["2026-11-22 23:00", "2026-11-23 05:59"], ["2026-11-23 06:00", "2026-11-23 21:59"]),
        ("Sat,Sun 00:00-24:00", ["2026-11-21 00:00", "2026-11-22 23:59"], ["2026-11-23 00:00"]),
        ("sun 22:00-02:00", ["2026-11-22 22:00", "2026-11-23 01:59"], ["2026-11-22 01:00", "2026-11-24 01:00"]),
        ("Fri-Mon 12:00-13:00", ["2026-11-23 12:30", "2026-11-20 12:30"], ["2026-11-24 12:30"]),
    ],
)
def test_the_hours_of_a_window(window, inside, outside):
    assert all(blackout_at(datetime.fromisoformat(each), ["01:00-01:01", window]) == window for each in inside)
    assert not any(blackout_at(datetime.fromisoformat(each), [window]) for each in outside)


@pytest.mark.parametrize(
    "text", ["", "Mon", "8:00-9:00", "08:00", "Foo 08:00-09:00", "08:60-09:00", "24:00-25:00", "24:00-01:00"]
)
def test_what_is_no_window(text):
    with pytest.raises(ValueError, match=r"\S|^$"):  # the text itself, which may be none
        window_of(text)


def test_many_names_are_cut_at_a_name():
    names = [f"support-experts v{number}" for number in range(1, 33)]
    told = listed(names)
    assert told.startswith("support-experts v1, support-experts v2, ")
    assert told.endswith("support-experts v8 and 24 more")
    assert listed(names[:2]) == "support-experts v1, support-experts v2"
    assert listed(["x" * 200, "y"]) == f"{'x' * 160} and 1 more"


def test_lines_that_search_or_ask_for_each_expert_fold_one_at_a_time():
    line = {"base": "base", "experts": ("experts",), "batch": 5.0}
    assert together(LineConfig(**line)) == 5
    assert together(LineConfig(**line, approval="on-reject")) == 5
    assert together(LineConfig(**line, approval="always")) == 1
    assert together(LineConfig(**line, search=SearchConfig(when="always"))) == 1


def test_the_digest_of_a_night_is_markdown_that_strangers_cannot_write_in():
    outcome = {"expert": "evil](http://x) | v1", "state": "rejected", "version": None, "reason": "<script>"}
    facts = {"line": "tiny", "champion": [2, 2], "outcomes": [outcome], "tasks": {"a|b": (None, 0.5)}, "waits": None}
    text = nightly.digest({**facts, "collected": [], "trouble": ["E_BLOCKED *x*"]})
    assert "The champion is v2, as before." in text
    assert "| evil\\]\\(http://x\\) \\| v1 | rejected |  | \\<script\\> |" in text
    assert "| a\\|b |  | 0.500 |" in text
    assert "**E\\_BLOCKED \\*x\\*" in text
