"""The verbs that answer what is in a model: log with what was refused, show --expert, diff, the model card."""

import json
import re

import pytest
from transformers import AutoModel

from experiments.plain_client import register_expert
from flows.mermaid import mermaid
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri

HOSTILE = '"]; click v1 "javascript:alert(1)" <img src=x> [x](http://evil) #quot; \x1b[31m'


def nodes(**more):
    versions = [
        {"version": 1, "parent": None, "expert": None, "task": None, "in_champion": True},
        {"version": 2, "parent": 1, "expert": HOSTILE, "task": HOSTILE, "in_champion": True},
        {"version": 3, "parent": 2, "expert": "e v2", "task": "t", "in_champion": False},
    ]
    refused = {"name": HOSTILE, "task": HOSTILE, "state": "quarantined", "reason": HOSTILE, "into": 2}
    return {"line": "l", "champion": 2, "versions": versions, "experts": [refused], **more}


def test_a_flowchart_has_every_version_and_what_was_refused_and_obeys_no_name():
    drawn = mermaid(nodes())
    assert drawn.startswith("flowchart TD\n")
    assert [line for line in drawn.splitlines() if "-->" in line] == ["  v1 --> v2", "  v2 --> v3"]
    assert "  v2 -.-x x1" in drawn
    assert re.search(r'^  v2\["v2<br/>.*"\]:::champion$', drawn, re.MULTILINE)
    assert re.search(r'^  v3\["v3<br/>\+ t<br/>e v2"\]:::left$', drawn, re.MULTILINE)
    for line in drawn.splitlines():
        assert line.count('"') in (0, 2)
        assert "<img" not in line
        assert "\x1b" not in line


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish, prefect, zoo):
    """Two experts folded, one rejected by the gate, one set aside as a duplicate."""
    from flows.watch import watch

    path = furnish(tmp_path_factory.mktemp("asked")) / "foldin.toml"
    at, text = house(str(path)), path.read_text()

    def register(number, task):
        uri = tracking_uri(at.config)
        register_expert(uri, "tiny-experts", zoo / f"expert-{number}", task, artifact_root(at.config))

    register(1, "task-1")
    register(1, "task-1")
    watch("tiny", str(path))
    path.write_text(text.replace("min_expert_gain = -1.0", "min_expert_gain = 0.99"))
    register(3, "task-3")
    house.cache_clear()
    watch("tiny", str(path))
    path.write_text(text)
    house.cache_clear()
    register(2, "task-2")
    watch("tiny", str(path))
    yield path
    house(str(path)).ledger.close()
    house.cache_clear()


@pytest.fixture
def verb(toml, verbs):
    return verbs(toml)


@pytest.mark.integration
def test_the_log_shows_what_was_refused_where_it_was_refused(verb):
    code, out, _ = verb("log", "tiny")
    assert code == 0
    tree = [line.strip("│├└─ ") for line in out.splitlines()]
    place = {words: next(row for row, line in enumerate(tree) if words in line) for words in ("v2  +", "v3  +")}
    refused = [row for row, line in enumerate(tree) if line.startswith("x  ")]
    assert len(refused) == 2
    assert all(place["v2  +"] < row < place["v3  +"] for row in refused)
    assert "x  task-1  (tiny-experts v2)  quarantined: E_DUPLICATE" in out
    assert "x  task-3  (tiny-experts v3)  rejected: task-3: the expert alone" in out
    facts = json.loads(verb("log", "tiny", "--json")[1])
    assert [each["into"] for each in facts["experts"]] == [1, 2, 2, 2]
    assert verb("log", "tiny", "--mermaid")[1] == mermaid(facts) + "\n"


@pytest.mark.integration
def test_which_versions_hold_an_expert_and_since_when(verb):
    code, out, _ = verb("show", "tiny", "--expert", "task-1", "--json")
    assert code == 1  # there are two of that name
    code, out, _ = verb("show", "tiny", "--expert", "v1", "--json")
    facts = json.loads(out)
    assert (code, [each["version"] for each in facts["versions"]], facts["champion"]) == (0, [2, 3], 3)
    events = json.loads(verb("log", "tiny", "--json")[1])["events"]
    assert facts["in_champion_since"] == next(each["at"] for each in events if each["to"] == 2)
    assert "in the champion (v3) since" in verb("show", "tiny", "--expert", "v1")[1]
    verb("rollback", "tiny", "--to", "1", "--because", "a drill")
    assert "not in the champion" in verb("show", "tiny", "--expert", "v1")[1]
    verb("rollback", "tiny", "--to", "3", "--because", "forward")
    later = json.loads(verb("show", "tiny", "--expert", "v1", "--json")[1])["in_champion_since"]
    assert later > facts["in_champion_since"]
    assert json.loads(verb("show", "tiny", "--expert", "v3", "--json")[1])["versions"] == []


@pytest.mark.integration
def test_what_changed_between_two_versions(verb, toml):
    code, out, _ = verb("diff", "tiny", 2, 3, "--json")
    facts = json.loads(out)
    assert (code, facts["added"], facts["removed"]) == (0, [["tiny-experts", 4, "task-2"]], [])
    assert facts["tasks"]["task-2"]["before"] is None
    assert facts["tasks"]["task-1"]["before"] is not None
    at = house(str(toml))
    old, new = (open_version(at, "tiny", number).weights() for number in (2, 3))
    moved = {name for name in old if not old[name].equal(new[name])}
    assert set(facts["layers"]) == moved
    assert all("embeddings" not in name for name in moved)
    name = next(iter(facts["layers"]))
    share = float((new[name].double() - old[name].double()).norm() / old[name].double().norm())
    assert facts["layers"][name] == pytest.approx(share)
    assert list(facts["layers"].values()) == sorted(facts["layers"].values(), reverse=True)
    back = json.loads(verb("diff", "tiny", 3, 2, "--json")[1])
    assert (back["added"], back["removed"]) == ([], [["tiny-experts", 4, "task-2"]])
    shown = verb("diff", "tiny", 2, 3)[1]
    assert "+ task-2  (tiny-experts v4)" in shown
    assert name in shown
    assert json.loads(verb("diff", "tiny", 3, 3, "--json")[1])["layers"] == {}


@pytest.mark.integration
def test_the_report_of_a_rejected_expert(verb, tmp_path):
    code, _, _ = verb("report", "tiny", "--expert", "v3", "--to", tmp_path / "page.html")
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    assert "Rejected at the canary" in page
    assert "task-3: the expert alone" in page
    said = verb("report", "tiny", "--expert", "v2")[2]
    assert said.startswith("error: E_EXPERT expert tiny-experts v2: the expert was never judged")


@pytest.mark.integration
def test_a_versions_card_names_what_is_in_it_and_the_folder_loads_with_transformers(toml):
    at = house(str(toml))
    version = open_version(at, "tiny", 3)
    card = (version.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for each in version.memory.experts:
        assert f"| {each.model} v{each.version} | {each.task} |" in card
        assert each.weights_sha256[:16] in card
    assert version.memory.weights_sha256 in card
    assert "| task-1 | accuracy |" in card
    AutoModel.from_pretrained(version.folder)


@pytest.mark.integration
def test_everything_can_be_read_with_an_mlflow_client_alone(toml, tmp_path):
    """No ledger, no foldin: what a person with MLflow's client finds out about a version."""
    import mlflow
    from mlflow import MlflowClient

    at = house(str(toml))
    uri = tracking_uri(at.config)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version_by_alias("tiny", "champion")
    mlflow.set_tracking_uri(uri)
    folder = mlflow.artifacts.download_artifacts(f"models:/tiny/{version.version}", dst_path=str(tmp_path))
    manifest = json.loads((tmp_path / "foldin/manifest.json").read_text())
    assert folder
    held = [(each["model"], each["version"], each["task"]) for each in manifest["experts"]]
    assert held == [("tiny-experts", 1, "task-1"), ("tiny-experts", 4, "task-2")]
    assert manifest["parent"]["version"] == 2
    wanted = {"base_sha256", "weights_sha256", "method", "parameters", "suites", "verdict", "profile", "code"}
    assert wanted <= set(manifest)
    run = client.get_run(version.run_id)
    assert run.data.tags["foldin.verdict"] == "passed"
    inputs = {each.model_id for each in run.inputs.model_inputs}
    parent = client.get_model_version("tiny", "2").source.removeprefix("models:/")
    expert = client.get_model_version("tiny-experts", "4").source.removeprefix("models:/")
    assert inputs == {parent, expert}
    assert manifest["verdict"] == "passed"
