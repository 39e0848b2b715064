"""A second chance on the digits: an expert that the gate rejects as it is configured is folded in a way that passes."""

import json
import shutil

import pytest
import torch
from transformers import ViTForImageClassification

from evaluation.answers import read_answers
from experiments import digit_zoo
from experiments.plain_client import register_expert
from flows.versions import REPORT_FILE, open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import read_json
from registry.records import FoldinError, Refusal

pytestmark = pytest.mark.integration

SMALL = digit_zoo.Settings(width=32, layers=2, pretraining_steps=400, pretraining_rate=1e-3, expert_steps=100)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small base; an expert that moved a little, one that moved far, and one that learnt from shuffled labels."""
    out, splits = tmp_path_factory.mktemp("digits"), digit_zoo.split_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = ViTForImageClassification(digit_zoo._config(SMALL))
        digit_zoo._train(base, splits.train, SMALL.pretraining_steps, SMALL.pretraining_rate, SMALL.batch)
        digit_zoo._save_base(base, out / "base")
        near, far = SMALL._replace(expert_rate=3e-4), SMALL._replace(expert_rate=1e-3, expert_steps=150)
        digit_zoo.make_expert(base, splits, "plain", out / "near", near)
        digit_zoo.make_expert(base, splits, "rotated", out / "far", far)
    return out


@pytest.fixture
def line(digits, tmp_path, prefect):
    """A function that starts a line on the digits: settings as TOML -> house, look, register."""

    def started(extra=""):
        from flows.watch import watch

        text = f'[lines.digits]\nbase = "{digits / "base"}"\nexperts = ["digit-experts"]\n{extra}\n'
        # The base knows plain digits already.
        text += "gate = { min_expert_gain = -1.0, min_gain = -1.0, max_norm_ratio = 10.0 }\n"
        (tmp_path / "foldin.toml").write_text(text)
        at = house(str(tmp_path / "foldin.toml"))

        def register(name, task):
            uri, root = tracking_uri(at.config), artifact_root(at.config)
            register_expert(uri, "digit-experts", digits / name, task, root)
            return watch("digits", str(tmp_path / "foldin.toml"))

        return at, register

    return started


def children(at, run_id):
    client = at.mlflow._client
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.info.run_name: run for run in found}


def test_an_expert_that_fails_as_configured_is_folded_at_the_strength_that_passes(line):
    at, register = line()
    outcomes = register("near", "plain")
    assert [each["state"] for each in outcomes] == ["folded"], outcomes
    outcomes = register("far", "rotated")
    assert [each["state"] for each in outcomes] == ["folded"], outcomes
    version = open_version(at, "digits", 3)
    factor = version.memory.factor
    assert factor < 1
    assert version.memory.parameters["strength"] == factor
    # Both tries can be seen, with what they were and what came of them.
    merge = at.ledger.merges("digits")[-1]
    tries = children(at, merge.run_id)
    failed, chosen = tries["as configured"], tries[f"strength x {factor:g}"]
    assert (failed.data.tags["foldin.passed"], chosen.data.tags["foldin.passed"]) == ("false", "true")
    assert "plain" in failed.data.tags["foldin.reason"]
    assert chosen.data.params["strength"] == str(factor)
    assert (failed.data.metrics["chosen"], chosen.data.metrics["chosen"]) == (0.0, 1.0)
    # The parameters are in the lineage: of the version, of the run, and of the next fold.
    manifest = read_json(version.folder / "foldin/manifest.json")
    assert manifest["parameters"] == {"energy": 0.5, "strength": factor, "variant": "fusionbench"}
    run = at.mlflow._client.get_run(merge.run_id)
    assert json.loads(run.data.tags["foldin.parameters"]) == manifest["parameters"]
    assert f"strength x {factor:g} is best" in run.data.tags["foldin.search"]
    # The gate decided on other rows than the search, and passed.
    assert merge.verdict.passed
    answers = read_answers(version.folder / "foldin/predictions/plain.parquet")
    assert (answers.split, answers.examples) == ("gate", digit_zoo.GATE)
    report = json.loads((version.folder / REPORT_FILE).read_text())
    assert [each["name"] for each in report["tries"] if each["chosen"]] == [f"strength x {factor:g}"]
    assert report["seconds"] == {}  # a version's files are the same however long it took
    assert {"seconds.canary", "seconds.full", "seconds.search"} <= set(run.data.metrics)


@pytest.mark.chaos
def test_without_a_search_the_same_expert_is_rejected(line):
    at, register = line('search = { when = "never" }')
    register("near", "plain")
    (outcome,) = register("far", "rotated")
    assert outcome["state"] == "rejected"
    assert "plain: " in outcome["reason"]
    assert at.ledger.line("digits").champion == 2


@pytest.fixture
def tiny(workshop, prefect, zoo):
    """A house whose line reads six times too strongly and searches always, with one expert that waits; and its look."""
    from flows.watch import watch

    toml = workshop / "foldin.toml"
    rows = 'parameters = { strength = 6.0 }\nsearch = { when = "always", strengths = [0.2] }'
    toml.write_text(toml.read_text().replace("interval = 3600.0", f"interval = 3600.0\n{rows}"))
    at = house(str(toml))
    register_expert(tracking_uri(at.config), "tiny-experts", zoo / "expert-1", "task-1", artifact_root(at.config))
    return at, lambda: watch("tiny", str(toml))


@pytest.mark.parametrize(
    ("died", "strength"),
    [
        ("record_verdict", 6.0),  # nothing of the first choice was published: it is forgotten
        ("commit", 1.2),  # the first choice is a registered version: it stands
    ],
)
def test_a_search_that_chooses_otherwise_after_a_crash_never_mixes_verdict_and_weights(
    tiny, monkeypatch, died, strength
):
    from flows import merge

    at, look = tiny
    original = getattr(at.ledger, died)

    def dying(*arguments, **options):
        if died == "record_verdict":
            original(*arguments, **options)
        raise FoldinError(Refusal("E_LEDGER", "died here"))

    look_at_base(at)
    monkeypatch.setattr(at.ledger, died, dying)
    with pytest.raises(FoldinError, match="died here"):
        look()
    monkeypatch.undo()
    shutil.rmtree(at.work("tiny"))  # another machine, which has no time to search
    monkeypatch.setattr(merge, "wanted", lambda when, judged: False)
    assert [each["state"] for each in look()] == ["folded"]
    version = open_version(at, "tiny", 2)
    assert version.memory.parameters["strength"] == strength
    assert at.ledger.merges("tiny")[-1].verdict.weights_sha256 == version.memory.weights_sha256
    assert at.mlflow.champion("tiny") == 2


def look_at_base(at):
    """Start the line, so that what dies later is the expert's merge."""
    from flows.starting import start

    start(at, "tiny", at.config.line("tiny"))
