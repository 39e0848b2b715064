"""What a line adds to the gate: guards, functions of its own, a time budget, fallbacks; and what a weight does."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.answers import read_answers
from experiments.plain_client import register_expert
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import sha256_file
from registry.records import FoldinError
from registry.verdicts import Outcome

pytestmark = pytest.mark.integration

FUNCTIONS = '''
import time

def small(model, examples):
    """One number an example, that falls as the weights grow: noise on them always makes them grow."""
    squares = sum(float((tensor ** 2).sum()) for name, tensor in model.weights.items() if "output.dense.weight" in name)
    return [1 / (1 + squares) for _ in examples]

def slow(model, examples):
    time.sleep(60)
'''


class Line:
    """The line `tiny` with more settings."""

    def __init__(self, folder):
        self.toml = folder / "foldin.toml"
        self.at = house(str(self.toml))

    def register(self, folder, task, **tags):
        """Register an expert and look; what became of it."""
        from flows.watch import watch

        uri = tracking_uri(self.at.config)
        number = register_expert(uri, "tiny-experts", folder, task, artifact_root(self.at.config))
        for key, value in tags.items():
            self.at.mlflow._client.set_model_version_tag("tiny-experts", str(number), f"foldin.{key}", value)
        return watch("tiny", str(self.toml))[-1]


@pytest.fixture
def tiny(workshop, prefect, monkeypatch):
    """A function that opens the line with more settings: TOML rows of the line, gate rules over the lenient ones."""
    (workshop / f"{workshop.name}_checks.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(workshop))

    def made(rows="", **rules):
        toml = workshop / "foldin.toml"
        text = toml.read_text().replace("interval = 3600.0", f"interval = 3600.0\n{rows}")
        kept = [line for line in text.splitlines() if line.partition(" = ")[0] not in rules]
        toml.write_text("\n".join([*kept, *(f"{key} = {value}" for key, value in rules.items())]) + "\n")
        return Line(workshop)

    return made


@pytest.fixture
def guard(workshop):
    """A function that writes a guard of one of FUNCTIONS; the line's row that names it."""

    def made(function, safety=False):
        folder = workshop / "guards" / function
        folder.mkdir(parents=True)
        rows = [{"text": f"row {number}", "split": "gate"} for number in range(20)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        document = {"kind": "python", "function": f"{workshop.name}_checks:{function}", "safety": safety}
        data = {"data": "rows.parquet", "data_sha256": sha256_file(folder / "rows.parquet")}
        (folder / "suite.json").write_text(json.dumps({**document, **data}))
        return f"guards = {{ {function} = {json.dumps(str(folder))} }}"

    return made


def test_a_guard_is_measured_on_every_candidate(tiny, guard, zoo):
    line = tiny(guard("small"))
    assert line.register(zoo / "expert-1", "task-1")["state"] == "folded"
    version = open_version(line.at, "tiny", 2)
    answers = read_answers(version.folder / "foldin/predictions/small.parquet")
    assert (answers.metric, answers.examples) == ("score", 20)
    assert version.memory.tasks == ("task-1",)
    assert line.register(zoo / "expert-2", "small")["state"] == "quarantined"  # an expert cannot take its name
    assert "E_TASK" in line.at.ledger.experts("tiny")[1].reason


def test_a_candidate_that_falls_on_a_guard_is_rejected_with_its_name(tiny, guard, zoo):
    line = tiny(guard("small"), max_task_drop=0.02)
    outcome = line.register(zoo / "expert-1", "task-1")
    assert outcome["state"] == "rejected"
    assert "small: 0." in outcome["reason"]
    assert "at most 2.0 down allowed, and chance does not explain it (p < 0.001, significant" in outcome["reason"]


def test_a_safety_guard_rejects_however_lenient_the_rules_and_nobody_is_asked(tiny, guard, zoo):
    line = tiny(guard("small", safety=True) + '\napproval = "on-reject"')
    outcome = line.register(zoo / "expert-1", "task-1")
    assert outcome["state"] == "rejected"
    assert "small (safety): 0." in outcome["reason"]
    assert line.at.ledger.merges("tiny")[-1].verdict.outcome is Outcome.REJECTED


def test_a_guard_that_takes_too_long_keeps_the_line_where_it_is(tiny, guard, zoo):
    line = tiny(guard("slow") + '\napproval = "always"\nevaluation_seconds = 1.0')
    with pytest.raises(
        FoldinError, match=r"E_MEASURE line tiny, task slow: the champion could not be measured.* timed out after 1"
    ):
        line.register(zoo / "expert-1", "task-1")
    (expert,) = line.at.ledger.experts("tiny")
    assert (str(expert.state), expert.attempts) == ("pending", 0)  # it is no expert's fault
    assert line.at.ledger.line("tiny").champion == 1


def test_a_guard_that_is_not_there_is_said_before_any_work(tiny, zoo):
    line = tiny('guards = { city = "nowhere" }')
    with pytest.raises(FoldinError, match=r"E_SUITE suite of task city in \[lines.tiny.guards\]"):
        line.register(zoo / "expert-1", "task-1")


@pytest.mark.chaos
def test_a_weight_multiplies_what_is_folded_and_is_remembered(tiny, zoo):
    line = tiny()
    assert line.register(zoo / "expert-1", "task-1")["state"] == "folded"
    assert line.register(zoo / "expert-2", "task-2", weight="0.5")["state"] == "folded"
    first, second = open_version(line.at, "tiny", 3).memory.experts
    assert (first.weight, second.weight) == (1.0, 0.5)
    assert second.delta_norm == pytest.approx(0.5 * first.delta_norm, rel=0.05)  # both have noise of the same size
    assert open_version(line.at, "tiny", 3).memory.stats[0] == 1.5


@pytest.mark.parametrize("weight", ["0", "-1", "1e3", "nan", "half", "1000"])
def test_a_weight_that_is_no_plain_number_is_refused(tiny, zoo, weight):
    outcome = tiny().register(zoo / "expert-1", "task-1", weight=weight)
    assert outcome["state"] == "quarantined"
    assert outcome["reason"].startswith("E_WEIGHT")


@pytest.mark.chaos
def test_another_method_is_a_fallback_for_one_version(tiny, zoo):
    search = 'search = { strengths = [], weights = [], energies = [], methods = ["average"] }'
    line = tiny(f"parameters = {{ strength = 6.0 }}\n{search}", min_gain=0.0)  # six times is too strong for these
    assert line.register(zoo / "expert-1", "task-1")["state"] == "folded"
    version = open_version(line.at, "tiny", 2)
    assert (version.memory.method, dict(version.memory.parameters)) == ("average", {})
    line.register(zoo / "expert-2", "task-2")
    merge = line.at.ledger.merges("tiny")[-1]
    run = line.at.mlflow._client.get_run(merge.run_id)
    children = line.at.mlflow._client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{merge.run_id}'"
    )
    configured = next(each for each in children if each.info.run_name == "as configured")
    assert configured.data.params["method"] == "opcm"  # the line's own again, on the same sum


def test_a_guard_may_not_have_the_name_of_a_known_task(tiny, guard, zoo, workshop):
    line = tiny()
    assert line.register(zoo / "expert-1", "small")["state"] == "folded"
    toml = workshop / "foldin.toml"
    toml.write_text(toml.read_text().replace("interval = 3600.0", "interval = 3600.0\n" + guard("small")))
    house.cache_clear()
    with pytest.raises(FoldinError, match="E_CONFIG line tiny, guard small: a guard has the name of a task"):
        Line(workshop).register(zoo / "expert-2", "task-2")
