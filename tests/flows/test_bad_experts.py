"""What strangers register, and what breaks around a line: said in one message, and the next expert is folded."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from flows.versions import head_of, open_version
from flows.wiring import house, tracking_uri
from registry.records import ExpertState, FoldinError, Refusal

pytestmark = pytest.mark.integration

WEIGHTS = "model.safetensors"
MATRIX = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """MLflow's default experiment keeps its files where the process stands."""
    monkeypatch.chdir(tmp_path)


def look(at):
    from flows.watch import watch

    return watch("tiny", str(at.config.folder / at.config.file))


def client_of(at):
    mlflow.set_tracking_uri(tracking_uri(at.config))  # by which MLflow finds what models:/m-… names
    return MlflowClient()


def register(at, folder, tags, *, status="READY", model="tiny-experts"):
    """The number of a new version, and the folder its files are in, as a client makes it that knows only MLflow."""
    client = client_of(at)
    experiment = client.get_experiment_by_name("teams")
    number = experiment.experiment_id if experiment else client.create_experiment("teams")
    made = client.create_logged_model(number, name="expert")
    client.log_model_artifacts(made.model_id, str(folder))
    if status:
        client.finalize_logged_model(made.model_id, status)
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    version = client.create_model_version(model, f"models:/{made.model_id}", model_id=made.model_id, tags=dict(tags))
    return int(version.version), Path(client.get_logged_model(made.model_id).artifact_location.removeprefix("file://"))


def experts(at):
    return at.ledger.experts("tiny")


def states(at):
    return [str(expert.state) for expert in experts(at)]


# What is done to the files of an expert.


def same(folder):
    pass


def edit_weights(change):
    """A mutation that loads the weights, changes the dictionary, and saves it."""

    def mutate(folder):
        weights = load_file(folder / WEIGHTS)
        save_file(change(weights) or weights, folder / WEIGHTS, {"format": "pt"})

    return mutate


def edit_json(name, **changes):
    def mutate(folder):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, **changes}))

    return mutate


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def set_value(value, dtype=torch.float32):
    def change(weights):
        weights[MATRIX] = weights[MATRIX].to(dtype)
        weights[MATRIX][3, 5] = value

    return edit_weights(change)


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def truncated(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])


def linked(folder):
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


@dataclass(frozen=True)
class Bad:
    """One bad expert: zoo/expert-N after one mutation, and what must be said about it."""

    code: str
    says: tuple[str, ...]
    files: Callable[[Path], object] = same  # before it is registered
    stored: Callable[[Path], object] = same  # in MLflow's folder, afterwards
    tags: Mapping[str, str] = field(default_factory=dict)
    status: str = "READY"


BAD = {
    "no task": Bad("E_TASK", ("no tag foldin.task", "Expected the name of"), tags={"foldin.task": ""}),
    "task not plain": Bad(
        "E_TASK",
        ("the task's name is not plain", "Expected letters, digits", r"Found ../\x1b[31mcity\u202e."),
        tags={"foldin.task": "../\x1b[31mcity\u202e"},
    ),
    "other base": Bad(
        "E_BASE",
        ("declares another base", "Expected ", f"Found {'0' * 64}.", "Fine-tune from this line's base"),
        tags={"foldin.base_sha256": "0" * 64},
    ),
    "no safetensors": Bad("E_FORMAT", ("there are no weights", "Expected *.safetensors"), files=remove(WEIGHTS)),
    "pickle only": Bad(
        "E_FORMAT", ("only pickled weights", "file pytorch_model.bin", "save_pretrained"), files=pickled
    ),
    "truncated": Bad(
        "E_FORMAT", (f"file {WEIGHTS}", "the file is cut off", "bytes of tensors", "Found "), files=truncated
    ),
    "not safetensors": Bad(
        "E_FORMAT", (f"file {WEIGHTS}", "not a safetensors file", "Found a zip archive"), files=put(WEIGHTS, b"PK" * 99)
    ),
    "a link": Bad("E_FILETYPE", (f"file {WEIGHTS}", "is a link", "Expected a regular file"), stored=linked),
    "extra tensor": Bad(
        "E_SCHEMA",
        ("tensor classifier.weight", "the base has no such tensor", "Found F32 (3, 32)", "Fine-tune it from"),
        files=edit_weights(lambda weights: {**weights, "classifier.weight": torch.ones(3, 32)}),
    ),
    "other names": Bad(
        "E_SCHEMA",
        ("the expert has no tensor of the base", "Expected F32 (32,)", "Found none", "Fine-tune it from"),
        files=edit_weights(lambda weights: {f"other.{name}": each for name, each in weights.items()}),
    ),
    "quantised": Bad(
        "E_DTYPE",
        ("file config.json", "the weights are quantised", "Found {'load_in_8bit': True}"),
        files=edit_json("config.json", quantization_config={"load_in_8bit": True}),
    ),
    "misshapen tensor": Bad(
        "E_SCHEMA",
        (f"tensor {MATRIX}", "the shapes differ", "Expected (32, 32)", "Found (16, 32)"),
        files=edit_weights(lambda weights: {**weights, MATRIX: weights[MATRIX][:16].clone()}),
    ),
    "integers": Bad(
        "E_SCHEMA",
        (f"tensor {MATRIX}", "the kinds of number differ", "Expected float, as F32", "Found I64"),
        files=edit_weights(lambda weights: {**weights, MATRIX: weights[MATRIX].long()}),
    ),
    "NaN": Bad(
        "E_NONFINITE",
        (f"tensor {MATRIX}", "Expected finite values", "1 of 1024 not finite, the first at flat index 101: nan"),
        files=set_value(float("nan")),
    ),
    "Inf": Bad("E_NONFINITE", (f"tensor {MATRIX}", "flat index 101: -inf"), files=set_value(float("-inf"))),
    "too large for float32": Bad(
        "E_NONFINITE", (f"tensor {MATRIX}", "flat index 101: inf"), files=set_value(1e300, torch.float64)
    ),
    "other architecture": Bad(
        "E_SCHEMA",
        (
            "file config.json",
            "another num_hidden_layers",
            "Expected 2.",
            "Found 3.",
            "Fine-tune it from this line's base",
        ),
        files=edit_json("config.json", num_hidden_layers=3),
    ),
    "no configuration": Bad("E_CONFIG", ("file config.json", "is missing"), files=remove("config.json")),
    "broken configuration": Bad(
        "E_CONFIG", ("file config.json", "not valid", "Expected a JSON object"), files=put("config.json", b"{")
    ),
    "code by name": Bad(
        "E_REMOTE_CODE",
        ("file config.json", "auto_map", "Found {'AutoModel': 'evil.Model'}"),
        files=edit_json("config.json", auto_map={"AutoModel": "evil.Model"}),
    ),
    "code": Bad("E_REMOTE_CODE", ("file modeling.py", "carries code"), files=put("modeling.py", b"import os\n")),
    "no suite": Bad("E_SUITE", ("file suite.json", "is missing", "Put suite.json beside"), files=remove("suite.json")),
    "changed data": Bad(
        "E_SUITE",
        ("file suite.json", "the data has another digest", f"Expected {'0' * 64}.", "Found "),
        files=edit_json("suite.json", data_sha256="0" * 64),
    ),
    "suite that runs": Bad(
        "E_SUITE",
        ("the kind python runs code, and an expert may not bring code", "Found python"),
        files=lambda folder: (folder / "suite.json").write_text('{"kind": "python", "function": "os:getcwd"}'),
    ),
    "failed upload": Bad("E_SOURCE", ("not ready", "Expected status READY", "Found status FAILED"), status="FAILED"),
    "vanished": Bad("E_SOURCE", ("no artifacts at the version's source", "Found "), stored=shutil.rmtree),
}


@pytest.fixture(scope="module")
def aftermath(zoo, tmp_path_factory, furnish, prefect):
    """A line after one watch over every bad expert, with good ones first, between and last: house, name -> version."""
    from _pytest.monkeypatch import MonkeyPatch

    from flows import merge

    folder = furnish(tmp_path_factory.mktemp("aftermath"))
    with MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(merge, "TAG_PATIENCE", 0.0)
        at = house(str(folder / "foldin.toml"))
        versions = {"good": register(at, zoo / "expert-1", {"foldin.task": "task-1"})[0]}
        for number, (name, bad) in enumerate(BAD.items()):
            if number == len(BAD) // 2:
                versions["good between"] = register(at, zoo / "expert-2", {"foldin.task": "task-2"})[0]
            made = folder / f"made-{number}"
            shutil.copytree(zoo / "expert-3", made)
            bad.files(made)
            tags = {key: value for key, value in {"foldin.task": "bad", **bad.tags}.items() if value}
            versions[name], stored = register(at, made, tags, status=bad.status)
            bad.stored(stored)
        huge = folder / "huge"
        shutil.copytree(zoo / "expert-3", huge)
        set_value(3e38)(huge)
        versions["huge"] = register(at, huge, {"foldin.task": "huge"})[0]
        versions["good again"] = register(at, zoo / "expert-4", {"foldin.task": "task-4"})[0]
        outcomes = look(at)
        yield at, versions, outcomes
        at.ledger.close()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_expert_is_set_aside_with_one_message(aftermath, name):
    at, versions, _ = aftermath
    bad, expert = BAD[name], experts(at)[versions[name] - 1]
    assert (expert.state, expert.code) == (ExpertState.QUARANTINED, bad.code), expert.reason
    assert expert.reason.startswith(f"{bad.code} expert tiny-experts v{versions[name]}")
    for part in bad.says:
        assert part in expert.reason, expert.reason
    assert "\n" not in expert.reason
    assert expert.reason.isprintable()
    assert len(expert.reason.rstrip(".").split(". ")) >= 2, "what is wrong, and then what to do"


def test_the_good_ones_among_them_were_folded_and_nothing_waits(aftermath):
    at, versions, outcomes = aftermath
    good = [versions[name] for name in ("good", "good between", "good again")]
    assert [each["version"] for each in outcomes if each["state"] == "folded"] == [2, 3, 4]
    assert [expert.version for expert in experts(at) if expert.state is ExpertState.FOLDED] == good
    assert states(at).count("quarantined") == len(BAD)
    assert "pending" not in states(at)
    assert at.mlflow.champion("tiny") == at.ledger.line("tiny").champion == 4
    assert [each.task for each in open_version(at, "tiny", 4).memory.experts] == ["task-1", "task-2", "task-4"]


def test_finite_values_that_no_model_can_compute_with_are_rejected_by_the_gate(aftermath):
    at, versions, _ = aftermath
    expert = experts(at)[versions["huge"] - 1]
    assert (expert.state, expert.code) == (ExpertState.REJECTED, "E_GATE")
    assert "the expert could not be measured: the model's outputs are not finite" in expert.reason


def test_nothing_a_stranger_wrote_reaches_a_terminal_as_a_command(aftermath, capsys):
    from flows.printing import print_log, print_status
    from flows.reading import log, status

    at, _, _ = aftermath
    print_status([status(at, "tiny")])
    print_log(log(at, "tiny"))
    printed = capsys.readouterr().out
    assert r"..\x1b".replace("..", "../") in printed
    assert all(mark == "\n" or mark.isprintable() for mark in printed)


# What is unusual and fine.


def spelt_as_in_a_task_model(folder):
    edit_weights(lambda weights: {f"bert.{name}": each for name, each in weights.items()})(folder)


def without_a_tokenizer(folder):
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "special_tokens")):
            path.unlink()


def with_a_head(folder):
    """A classifier as transformers saves one, on the expert's encoder, with a suite that needs the head."""
    from transformers import BertForSequenceClassification

    from evaluation.suites import write_suite

    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder)
    rows = [(text, label, "gate") for label, text in enumerate(("red", "cat", "one")) for _ in range(4)]
    write_suite(folder, kind="text-classification", labels=("color", "animal", "number"), rows=rows)


@pytest.mark.chaos
def test_unusual_experts_are_folded(at, zoo, tmp_path):
    kinds = {
        "prefixed": spelt_as_in_a_task_model,
        "bare": without_a_tokenizer,
        "headed": with_a_head,
        "partial": edit_weights(lambda weights: {name: each for name, each in weights.items() if name != MATRIX}),
        "again": same,
    }
    look(at)
    whole = at.ledger.line("tiny").base_sha256
    for number, (name, mutate) in enumerate(kinds.items(), 1):
        shutil.copytree(zoo / f"expert-{number}", tmp_path / name)
        mutate(tmp_path / name)
        tags = {"foldin.task": "prefixed" if name == "again" else name}
        declared = {"prefixed": whole, "bare": f" {whole[:16].upper()}"}.get(name)
        register(at, tmp_path / name, {**tags, "foldin.base_sha256": declared} if declared else tags)
    assert [(each["state"], each["reason"]) for each in look(at)] == [("folded", "")] * 5
    served = open_version(at, "tiny", 6)
    assert set(served.weights()) == set(load_file(zoo / "base" / WEIGHTS)), "the base's names, and no head among them"
    assert set(head_of(served.folder, "headed")) == {"classifier.weight", "classifier.bias"}
    assert [path.name for path in (served.folder / "heads").iterdir()] == ["headed.safetensors"]
    stored = load_file(tmp_path / "headed" / WEIGHTS)["classifier.weight"]
    assert head_of(served.folder, "headed")["classifier.weight"].equal(stored)
    assert served.memory.tasks == ("prefixed", "bare", "headed", "partial")
    assert [expert.version for expert in served.memory.experts] == [1, 2, 3, 4, 5]
    assert served.memory.owner("prefixed").version == 1, "the first suite goes on measuring the task"
    assert (served.folder / "tokenizer.json").read_bytes() == (zoo / "base/tokenizer.json").read_bytes()
    plain = load_file(zoo / "expert-1" / WEIGHTS)
    moved = [name for name in plain if not plain[name].equal(load_file(zoo / "base" / WEIGHTS)[name])]
    assert all(f"{name}:total" in served.slots() for name in moved), "what it moved was folded under the base's names"


# What is on its way, or gone.


def configure(at, old, new):
    """The house after a change of its foldin.toml."""
    toml = at.config.folder / at.config.file
    assert old in toml.read_text()
    toml.write_text(toml.read_text().replace(old, new))
    at.ledger.close()
    house.cache_clear()
    return house(str(toml))


def test_an_upload_that_never_ends_holds_the_line_for_its_patience_and_no_longer(at, zoo):
    register(at, zoo / "expert-1", {"foldin.task": "task-1"}, status="")
    register(at, zoo / "expert-2", {"foldin.task": "task-2"})
    assert look(at) == []
    assert states(at) == ["pending", "pending"]
    hasty = configure(at, "interval = 3600.0", "interval = 3600.0\nupload_patience = 0.0")
    assert [each["state"] for each in look(hasty)] == ["quarantined", "folded"]
    assert "E_SOURCE expert tiny-experts v1: the model behind the version is not ready" in experts(hasty)[0].reason
    assert "Found status PENDING" in experts(hasty)[0].reason


@pytest.mark.parametrize(
    "seen",
    [
        False,
        True,
    ],
    ids=["before it was seen", "while it waited"],
)
def test_a_logged_model_that_was_deleted_does_not_stop_the_line(at, zoo, seen):
    look(at)
    register(at, zoo / "expert-1", {"foldin.task": "task-1"}, status="")
    if seen:
        assert look(at) == []
    client = client_of(at)
    client.delete_logged_model(client.get_model_version("tiny-experts", "1").source.removeprefix("models:/"))
    register(at, zoo / "expert-2", {"foldin.task": "task-2"})
    first, second = look(at)
    assert first["state"] in ("quarantined", "withdrawn")
    assert second["state"] == "folded"


# What is not the expert's fault: it stays pending, no attempt is counted, and it is folded when the trouble is over.


def enrolled(at, folder, task="task-1"):
    """Register an expert that a watch has seen and could not fold yet."""
    number, stored = register(at, folder, {"foldin.task": task}, status="")
    assert look(at) == []
    client = client_of(at)
    client.finalize_logged_model(
        client.get_model_version("tiny-experts", str(number)).source[len("models:/") :], "READY"
    )
    return stored


def waits(at):
    (expert,) = experts(at)
    return (expert.state, expert.attempts, at.ledger.line("tiny").champion) == (ExpertState.PENDING, 0, 1)


def test_an_mlflow_that_cannot_be_reached_costs_no_expert(at, zoo, foldin, monkeypatch):
    enrolled(at, zoo / "expert-1")
    configure(at, "[registry]\n", '[registry]\ntracking_uri = "http://127.0.0.1:9"\n')
    begun = time.monotonic()
    ended = foldin(at.config.folder, "status", "tiny")
    assert time.monotonic() - begun < 20
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: E_MLFLOW MLflow at http://127.0.0.1:9: ")
    assert line.endswith("Check that it runs and that tracking_uri in foldin.toml is right, then try again.")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(FoldinError, match="E_MLFLOW"):
        look(at)
    assert waits(at)
    back = configure(at, '[registry]\ntracking_uri = "http://127.0.0.1:9"\n', "[registry]\n")
    assert [each["state"] for each in look(back)] == ["folded"]


def test_an_mlflow_that_goes_away_in_mid_merge_counts_no_attempt(at, zoo, monkeypatch):
    enrolled(at, zoo / "expert-1")

    def gone(found):
        raise FoldinError(Refusal("E_MLFLOW", "gone away"))

    monkeypatch.setattr(at.mlflow, "fetch", gone)
    with pytest.raises(FoldinError, match="gone away"):
        look(at)
    assert waits(at)
    monkeypatch.undo()
    assert [each["state"] for each in look(at)] == ["folded"]


def test_a_damaged_copy_in_our_own_store_is_not_the_experts_fault(at, zoo, tmp_path):
    from registry import intake

    stored = enrolled(at, zoo / "expert-1")
    copy = intake.admit(stored, at.experts, "test")
    whole = (copy.folder / WEIGHTS).read_bytes()
    (copy.folder / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FoldinError, match=r"E_DIGEST .*the stored copy was changed.*Remove this folder from the store"):
        look(at)
    assert waits(at)
    shutil.rmtree(copy.folder)
    assert [each["state"] for each in look(at)] == ["folded"]


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-5000])


def broken(path):
    path.write_bytes(b"{")


def other_architecture(path):
    path.write_text(path.read_text().replace("BertModel", "BertModell"))


@pytest.mark.parametrize(
    ("file", "spoil", "says"),
    [
        (WEIGHTS, cut_off, rf"E_FORMAT line tiny, version 1, file {WEIGHTS}, tensor \S+: the file is cut off"),
        ("config.json", broken, "E_FORMAT line tiny, version 1, file config.json: the JSON is not valid"),
        (
            "config.json",
            other_architecture,
            "E_CONFIG line tiny, version 1, file config.json: the architecture is unknown",
        ),
        ("foldin/manifest.json", broken, "E_FORMAT line tiny, version 1, file manifest.json: the JSON is not valid"),
    ],
    ids=["weights", "configuration", "architecture", "manifest"],
)
def test_a_spoilt_file_of_the_base_is_not_the_experts_fault(at, zoo, monkeypatch, file, spoil, says):
    """Each is checked when a merge begins; this happens after."""
    from flows import merge

    look(at)
    register(at, zoo / "expert-1", {"foldin.task": "task-1", "foldin.base_sha256": at.ledger.line("tiny").base_sha256})
    path, admit = open_version(at, "tiny", 1).folder / file, merge.admit
    sound = path.read_bytes()

    def spoiling(*arguments):
        spoil(path)
        return admit(*arguments)

    monkeypatch.setattr(merge, "admit", spoiling)
    with pytest.raises(FoldinError, match=rf"^{says}.* Restore the version's artifacts"):
        look(at)
    monkeypatch.undo()
    path.write_bytes(sound)
    assert waits(at)
    assert [each["state"] for each in look(at)] == ["folded"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('method = "opcmm"', r"E_CONFIG \[lines.tiny\] method: there is no method 'opcmm'.* Did you mean 'opcm'"),
        ('suites = { task-1 = "nowhere" }', r"E_SUITE suite of task task-1 in \[lines.tiny.suites\].*is missing"),
    ],
)
def test_a_wrong_setting_costs_no_expert(at, zoo, wrong, message):
    enrolled(at, zoo / "expert-1")
    broken = configure(at, "interval = 3600.0", f"interval = 3600.0\n{wrong}")
    with pytest.raises(FoldinError, match=message):
        look(broken)
    assert waits(broken)
    mended = configure(broken, f"\n{wrong}", "")
    assert [each["state"] for each in look(mended)] == ["folded"]


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_ledger_that_another_process_holds_costs_no_expert(at, zoo, monkeypatch):
    from registry import ledger

    enrolled(at, zoo / "expert-1")
    patient = ledger.Ledger
    monkeypatch.setattr(ledger, "Ledger", lambda url, patience: patient(url, 0.5))
    command = [sys.executable, "-c", HOLD, str(at.config.home / "ledger.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        at.ledger.close()
        house.cache_clear()
        with pytest.raises(FoldinError) as caught:
            look(at)
        other.stdin.close()
    assert str(caught.value).startswith("E_LOCKED ledger sqlite:///")
    assert "is locked by another process. Found database is locked. Wait for the other process" in str(caught.value)
    assert waits(at)
    assert [each["state"] for each in look(at)] == ["folded"]


# The base of a line.


def test_a_base_that_cannot_be_used_starts_no_line(at, zoo, tmp_path):
    from flows.starting import start

    settings = at.config.line("tiny")
    broken = tmp_path / "broken"
    shutil.copytree(zoo / "base", broken)
    set_value(float("nan"))(broken)
    bare = tmp_path / "bare"
    shutil.copytree(zoo / "base", bare)
    (bare / WEIGHTS).unlink()
    cases = {
        "E_BASE base of line tiny: there is no such folder. Expected a folder with config.json": {"base": "nowhere"},
        "E_BASE base of line tiny: the base has another digest than foldin.toml names. Expected 0000": {
            "base_sha256": "0" * 64
        },
        f"E_NONFINITE base of line tiny, tensor {MATRIX}: not every value is finite.": {"base": str(broken)},
        "E_FORMAT base of line tiny: there are no weights. Expected *.safetensors.": {"base": str(bare)},
    }
    for message, changes in cases.items():
        with pytest.raises(FoldinError) as caught:
            start(at, "tiny", replace(settings, **changes))
        assert str(caught.value).startswith(message)
        assert caught.value.refusal.remedy
        assert at.ledger.lines() == []
    assert start(at, "tiny", settings) == 1
