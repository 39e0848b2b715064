"""The loop in one process: experts registered by a plain MLflow client, folded by real Prefect flow runs."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.plain_client import champion, move_alias, register_expert
from flows import memory, versions
from flows.archives import archives
from flows.archiving import archive
from flows.faults import blamed, with_room
from flows.memory import STATE_FILE, STATE_FORMAT
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry import weights
from registry.files import hash_tree, read_json
from registry.records import ExpertState, FoldinError, Refusal

pytestmark = pytest.mark.integration


def look(at):
    from flows.watch import watch

    return watch("tiny", str(at.config.folder / "foldin.toml"))


def failing(what):
    """A stand-in for a call that needs an MLflow which is away."""

    def call(*arguments, **named):
        raise FoldinError(Refusal("E_MLFLOW", what))

    return call


def register(at, folder, task):
    return register_expert(tracking_uri(at.config), "tiny-experts", folder, task, artifact_root(at.config))


def seen(at):
    return champion(tracking_uri(at.config), "tiny")


def states(at):
    return [str(expert.state) for expert in at.ledger.experts("tiny")]


def test_experts_are_folded_in_order_once_and_their_lineage_is_in_mlflow(at, zoo):
    for number in (1, 2):
        register(at, zoo / f"expert-{number}", f"task-{number}")
    assert [(each["expert"], each["version"]) for each in look(at)] == [("tiny-experts v1", 2), ("tiny-experts v2", 3)]
    assert look(at) == []  # the same trigger again
    assert seen(at) == at.ledger.line("tiny").champion == 3
    third = open_version(at, "tiny", 3)
    assert [expert.task for expert in third.memory.experts] == ["task-1", "task-2"]
    assert third.memory.stats[0] == 2
    # What an MLflow client alone can read of the lineage.
    client = at.mlflow._client
    version = client.get_model_version("tiny", "3")
    run = client.get_run(version.run_id)
    sources = [
        client.get_model_version(*each).source.removeprefix("models:/")
        for each in (("tiny", "2"), ("tiny-experts", "2"))
    ]
    assert {each.model_id for each in run.inputs.model_inputs} == set(sources)
    assert [each.model_id for each in run.outputs.model_outputs] == [version.source.removeprefix("models:/")]
    assert version.tags["foldin.manifest_sha256"] == third.manifest_sha256
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    for metrics in (run.data.metrics, {each.key for each in model.metrics}):
        assert set(metrics) >= {"accuracy.task-1", "accuracy.task-2"}
    assert {each.path for each in client.list_artifacts(version.run_id, "plots")} == {
        *("plots/accuracy_matrix.png", "plots/overlap.png", "plots/tasks.png", "plots/versions.png"),
    }
    answers = {each.path for each in client.list_artifacts(version.run_id, "predictions")}
    assert answers == {"predictions/task-1.parquet", "predictions/task-2.parquet"}


def test_the_merged_weights_are_those_of_a_plain_merge_in_memory(at, zoo):
    from merging import merge

    for number in (1, 2, 3):
        register(at, zoo / f"expert-{number}", f"task-{number}")
    look(at)
    served = open_version(at, "tiny", 4)
    base, *experts = (
        load_file(zoo / name / "model.safetensors") for name in ("base", "expert-1", "expert-2", "expert-3")
    )
    wanted = merge(base, experts, "opcm", projected=served.memory.projected)
    assert len(served.memory.projected) == 13  # six matrices in each of two layers, and the pooler
    for name, tensor in served.weights().items():
        assert tensor.equal(wanted[name]), name


def test_the_same_weights_registered_twice_give_one_merge(at, zoo):
    register(at, zoo / "expert-1", "task-1")
    register(at, zoo / "expert-1", "task-1")
    first, second = look(at)
    assert (first["state"], second["state"]) == ("folded", "quarantined")
    assert "E_DUPLICATE" in second["reason"]
    assert "tiny-experts v1, which is folded" in second["reason"]
    assert seen(at) == 2


def test_a_moved_alias_is_adopted_and_the_next_fold_starts_there(at, zoo):
    for number in (1, 2, 3):
        register(at, zoo / f"expert-{number}", f"task-{number}")
    look(at)
    move_alias(tracking_uri(at.config), "tiny", 2)
    look(at)
    assert at.ledger.line("tiny").champion == 2
    assert states(at) == ["folded", "rolled-back", "rolled-back"]
    assert at.ledger.events("tiny")[-1].kind == "adopted"
    register(at, zoo / "expert-4", "task-4")
    assert [each["version"] for each in look(at)] == [5]
    branch = open_version(at, "tiny", 5)
    assert [expert.task for expert in branch.memory.experts] == ["task-1", "task-4"]
    assert states(at) == ["folded", "rolled-back", "rolled-back", "folded"]


def test_an_alias_on_a_version_that_never_passed_blocks_the_line_until_it_is_moved(at, zoo):
    register(at, zoo / "expert-1", "task-1")
    look(at)
    stranger = register_expert(tracking_uri(at.config), "tiny", zoo / "expert-2", "x", artifact_root(at.config))
    move_alias(tracking_uri(at.config), "tiny", stranger)
    register(at, zoo / "expert-3", "task-3")
    assert look(at) == []
    assert f"moved by hand to version {stranger}" in at.ledger.line("tiny").blocked
    assert states(at) == ["folded", "pending"]
    assert seen(at) == stranger  # foldin does not fight people
    move_alias(tracking_uri(at.config), "tiny", 2)
    assert [each["state"] for each in look(at)] == ["folded"]
    assert at.ledger.line("tiny").blocked == ""


def test_a_moved_alias_is_not_judged_while_mlflow_cannot_be_asked(at, zoo, monkeypatch):
    for number in (1, 2):
        register(at, zoo / f"expert-{number}", f"task-{number}")
    look(at)
    move_alias(tracking_uri(at.config), "tiny", 2)

    gone = failing("gone away")
    monkeypatch.setattr(at.mlflow, "folder", gone)
    with pytest.raises(FoldinError, match="gone away"):
        look(at)
    monkeypatch.undo()
    assert (at.ledger.line("tiny").champion, at.ledger.line("tiny").blocked) == (3, "")
    look(at)
    assert at.ledger.line("tiny").champion == 2


def test_rollback_verifies_its_target_and_leaves_the_champion_when_it_is_damaged(at, zoo):
    from flows.rollback import rollback

    config = str(at.config.folder / "foldin.toml")
    for number in (1, 2):
        register(at, zoo / f"expert-{number}", f"task-{number}")
    look(at)
    state = next((open_version(at, "tiny", 2).folder / versions.STATE_FOLDER).glob("*.safetensors"))
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FoldinError, match=r"E_DIGEST .*file foldin/state/"):
        rollback("tiny", "a test", 2, "ann", config)
    assert seen(at) == 3
    state.write_bytes(whole)
    assert rollback("tiny", "a test", None, "ann", config) == {"from": 3, "to": 2}
    assert seen(at) == 2
    assert [(e.kind, e.who, e.because) for e in at.ledger.events("tiny")][-1] == ("rollback", "ann", "a test")
    with pytest.raises(FoldinError, match=r"E_VERSION tiny v9: foldin did not register this version.*one of 1, 2, 3"):
        rollback("tiny", "a test", 9, "ann", config)


def test_a_fold_that_began_before_a_rollback_can_never_promote(at, zoo, monkeypatch):
    from flows import recording
    from flows.rollback import rollback

    config = str(at.config.folder / "foldin.toml")
    register(at, zoo / "expert-1", "task-1")
    look(at)
    register(at, zoo / "expert-2", "task-2")
    original = recording.register

    def rolled_back_meanwhile(*arguments):
        version = original(*arguments)
        rollback("tiny", "meanwhile", 1, "ann", config)
        return version

    monkeypatch.setattr(recording, "register", rolled_back_meanwhile)
    with pytest.raises(FoldinError, match="E_FENCED"):
        look(at)
    monkeypatch.undo()
    assert seen(at) == at.ledger.line("tiny").champion == 1
    assert states(at) == ["rolled-back", "pending"]
    assert [each["version"] for each in look(at)] == [4]  # version 3 stays, complete and never promoted


def test_a_run_that_died_after_the_ledger_and_before_the_alias_is_finished_by_the_next(at, zoo, monkeypatch):
    from flows import merge

    register(at, zoo / "expert-1", "task-1")

    died = failing("gone away")
    monkeypatch.setattr(merge, "follow", died)
    with pytest.raises(FoldinError, match="gone away"):
        look(at)
    monkeypatch.undo()
    assert at.ledger.line("tiny").champion == 2
    assert seen(at) == 1
    look(at)
    assert seen(at) == 2
    assert all(event.done for event in at.ledger.events("tiny"))


def test_the_gate_rejects_and_the_next_expert_is_folded_all_the_same(at, zoo, tmp_path):
    toml = at.config.folder / "foldin.toml"
    toml.write_text(toml.read_text().replace("min_expert_gain = -1.0", "min_expert_gain = 0.9"))
    house.cache_clear()
    strict = house(str(toml))
    register(strict, zoo / "expert-1", "task-1")
    (outcome,) = look(strict)
    assert outcome["state"] == "rejected"
    assert "task-1" in outcome["reason"]
    assert seen(strict) == 1
    runs = strict.mlflow._client.search_runs(
        [strict.mlflow._link.experiment("tiny")], "tags.`foldin.verdict` = 'rejected'"
    )
    assert len(runs) == 1
    assert "task-1" in runs[0].data.tags["foldin.reason"]
    toml.write_text(toml.read_text().replace("min_expert_gain = 0.9", "min_expert_gain = -1.0"))
    house.cache_clear()
    register(house(str(toml)), zoo / "expert-2", "task-2")
    assert [each["state"] for each in look(house(str(toml)))] == ["folded"]


def test_a_rejected_expert_that_is_registered_again_is_judged_anew(at, zoo):
    toml = at.config.folder / "foldin.toml"
    toml.write_text(toml.read_text().replace("min_expert_gain = -1.0", "min_expert_gain = 0.9"))
    house.cache_clear()
    strict = house(str(toml))
    for _ in range(2):
        register(strict, zoo / "expert-1", "task-1")
    assert [each["state"] for each in look(strict)] == ["rejected", "rejected"]


def test_nothing_is_left_in_scratch_and_versions_are_self_contained(at, zoo):
    register(at, zoo / "expert-1", "task-1")
    look(at)
    assert not at.work("tiny").exists()  # a watch ends with a look that finds nothing to fold, and tidies
    files = set(hash_tree(open_version(at, "tiny", 2).folder))
    assert files >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "foldin/manifest.json",
        "foldin/state.json",
        "foldin/state/model.safetensors",
        "foldin/report.json",
        "foldin/report.html",
        "foldin/plots/accuracy_matrix.png",
        "foldin/plots/tasks.png",
    }


def test_a_withdrawn_expert_is_skipped_and_says_so(at, zoo):
    first = register(at, zoo / "expert-1", "task-1")
    register(at, zoo / "expert-2", "task-2")
    from flows.discovery import discover
    from flows.leasing import held
    from flows.starting import start

    settings = at.config.line("tiny")
    start(at, "tiny", settings)
    with held(at, "tiny") as lease:
        assert discover(at, lease, settings) == 2
    at.mlflow._client.delete_model_version("tiny-experts", str(first))
    assert [each["state"] for each in look(at)] == ["withdrawn", "folded"]
    assert at.ledger.experts("tiny")[0].state is ExpertState.WITHDRAWN


def test_a_model_that_kills_its_worker_is_set_aside_after_three_tries(at, zoo, monkeypatch):
    from flows import merge

    register(at, zoo / "expert-1", "task-1")
    register(at, zoo / "expert-2", "task-2")
    original = merge.fold

    def poisonous(scratch, settings, recipe, base, parent, experts, progress):
        if experts[0].name[1] == 1:
            raise RuntimeError("out of something")
        return original(scratch, settings, recipe, base, parent, experts, progress)

    monkeypatch.setattr(merge, "fold", poisonous)
    outcomes = look(at)
    assert [(each["state"]) for each in outcomes] == ["quarantined", "folded"]
    assert "3 runs ended" in outcomes[0]["reason"]
    assert at.ledger.experts("tiny")[0].code == "Q_CRASH"


def test_an_expert_that_moves_nothing_is_judged_like_any_other(at, zoo, expert_maker):
    same = expert_maker(9, size=0.0)
    register(at, same, "task-1")
    assert [each["state"] for each in look(at)] == ["folded"]
    base, served = load_file(zoo / "base/model.safetensors"), open_version(at, "tiny", 2).weights()
    assert all(served[name].equal(tensor) for name, tensor in base.items())


def test_a_half_precision_expert_is_folded_and_its_precision_is_remembered(at, zoo, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(zoo / "expert-1", half)
    weights = load_file(half / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()}, half / "model.safetensors", {"format": "pt"}
    )
    register(at, half, "task-1")
    assert [each["state"] for each in look(at)] == ["folded"]
    stored = open_version(at, "tiny", 2).memory.stored
    assert set(stored.values()) == {"BF16"}
    assert set(stored) >= set(open_version(at, "tiny", 2).memory.projected)


LOAD = """
import sys
# An editable install is found by a finder of its own; without it and the working folder there is no foldin.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [entry for entry in sys.path if entry and "__editable__" not in entry]
for name in ("flows", "merging", "evaluation", "registry"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported, so this shows nothing")
import mlflow
from transformers import AutoModel
mlflow.set_tracking_uri(sys.argv[1])
model = AutoModel.from_pretrained(mlflow.artifacts.download_artifacts("models:/tiny@champion"))
print(repr(float(model.pooler.dense.weight.double().sum())))
"""


def test_the_champion_loads_with_transformers_where_foldin_cannot_be_imported(at, zoo, tmp_path):
    register(at, zoo / "expert-1", "task-1")
    look(at)
    found = subprocess.run(
        [sys.executable, "-c", LOAD, tracking_uri(at.config)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert found.returncode == 0, found.stderr
    served = open_version(at, "tiny", 2).weights()
    assert float(found.stdout) == float(served["pooler.dense.weight"].double().sum())


def test_a_late_move_of_an_overtaken_run_is_put_back_once_and_then_a_person_is_believed(at, zoo, monkeypatch):
    from flows import merge
    from flows.rollback import rollback

    config = str(at.config.folder / "foldin.toml")
    register(at, zoo / "expert-1", "task-1")

    paused = failing("paused before the alias")
    monkeypatch.setattr(merge, "follow", paused)
    with pytest.raises(FoldinError, match="paused"):
        look(at)
    monkeypatch.undo()
    rollback("tiny", "it was taken over", 1, "ann", config)
    move_alias(tracking_uri(at.config), "tiny", 2)  # what the paused run does when it wakes
    look(at)
    assert seen(at) == at.ledger.line("tiny").champion == 1
    assert at.ledger.events("tiny")[-1].kind == "repaired"
    move_alias(tracking_uri(at.config), "tiny", 2)
    look(at)
    assert seen(at) == at.ledger.line("tiny").champion == 2
    assert at.ledger.events("tiny")[-1].kind == "adopted"


def test_a_ledger_that_does_not_know_the_model_moves_nothing(at, zoo):
    register(at, zoo / "expert-1", "task-1")
    look(at)
    at.ledger.close()
    for file in at.config.home.glob("ledger.db*"):
        file.unlink()
    house.cache_clear()
    empty = house(str(at.config.folder / "foldin.toml"))
    with pytest.raises(FoldinError, match=r"E_ALIAS line tiny: .*this ledger does not know"):
        look(empty)
    assert seen(empty) == 2


def test_a_version_registered_under_another_numerics_profile_is_committed_as_it_is(at, zoo, monkeypatch):
    from flows import first_pass, plan, planning

    look(at)
    register(at, zoo / "expert-1", "task-1")

    died = failing("died after registering")
    monkeypatch.setattr(at.ledger, "commit", died)
    with pytest.raises(FoldinError, match="died after"):
        look(at)
    monkeypatch.undo()
    other = {**plan.numerics_profile("cpu"), "threads": "999"}
    for module in (plan, planning, first_pass):
        monkeypatch.setattr(module, "numerics_profile", lambda device: other)
    shutil.rmtree(at.work("tiny"))
    assert [(each["state"], each["version"]) for each in look(at)] == [("folded", 2)]
    assert open_version(at, "tiny", 2).memory.profile["threads"] != "999"


@pytest.mark.chaos
def test_a_rollback_and_a_fold_that_were_both_cut_off_end_where_the_rollback_wanted(at, zoo, monkeypatch):
    from flows import champion as alias
    from flows import merge
    from flows.rollback import rollback

    died = failing("died before the alias")
    for number in (1, 2):
        register(at, zoo / f"expert-{number}", f"task-{number}")
        if number == 2:
            monkeypatch.setattr(merge, "follow", died)
            with pytest.raises(FoldinError, match="died before"):
                look(at)
        else:
            look(at)
    monkeypatch.setattr(alias, "follow", died)
    with pytest.raises(FoldinError, match="died before"):
        rollback("tiny", "a test", 1, "ann", str(at.config.folder / "foldin.toml"))
    monkeypatch.undo()
    assert (seen(at), at.ledger.line("tiny").champion) == (2, 1)
    look(at)
    assert seen(at) == at.ledger.line("tiny").champion == 1


def test_a_version_whose_source_nobody_serves_is_set_aside_and_the_next_is_folded(at, zoo):
    client = at.mlflow._client
    client.create_registered_model("tiny-experts")
    client.create_model_version("tiny-experts", "s3x://nowhere/model", tags={"foldin.task": "task-0"})
    register(at, zoo / "expert-1", "task-1")
    first, second = look(at)
    assert (first["state"], second["state"]) == ("quarantined", "folded")
    assert "E_SOURCE expert tiny-experts v1: there are no artifacts" in first["reason"]


def test_a_full_disk_is_not_the_experts_fault(at, zoo, monkeypatch):
    from flows import recording

    def full(*arguments):
        raise OSError(28, "No space left on device")

    register(at, zoo / "expert-1", "task-1")
    monkeypatch.setattr(recording, "write_report", full)
    for _ in range(4):
        with pytest.raises(FoldinError, match=r"E_SYSTEM .*No space left on device"):
            look(at)
    monkeypatch.undo()
    assert at.ledger.experts("tiny")[0].attempts == 0
    assert [each["state"] for each in look(at)] == ["folded"]


@pytest.fixture
def no_files_left(monkeypatch):
    """A function that lets safetensors open its files only when this process may open no more."""
    opened, (soft, hard) = weights.safe_open, resource.getrlimit(resource.RLIMIT_NOFILE)

    def starved(*arguments, **options):
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            return opened(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return lambda: monkeypatch.setattr(weights, "safe_open", starved)


def test_too_many_open_files_are_not_the_experts_fault(at, zoo, monkeypatch, no_files_left):
    look(at)
    register(at, zoo / "expert-1", "task-1")
    no_files_left()
    with pytest.raises(FoldinError, match=r"E_SYSTEM line tiny: the system refused something"):
        look(at)
    monkeypatch.undo()
    assert at.ledger.experts("tiny")[0].attempts == 0
    assert [each["state"] for each in look(at)] == ["folded"]


def test_too_little_memory_is_not_the_experts_fault_wherever_it_shows(at, zoo, monkeypatch):
    from flows import judging

    look(at)
    register(at, zoo / "expert-1", "task-1")
    monkeypatch.setattr(judging, "score", lambda *arguments: torch.empty(2**46))
    with pytest.raises(FoldinError, match=r"E_MEMORY .*DefaultCPUAllocator: can't allocate memory"):
        look(at)
    monkeypatch.undo()
    assert at.ledger.experts("tiny")[0].attempts == 0
    assert [each["state"] for each in look(at)] == ["folded"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("unable to mmap 96 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    ],
    ids=str,
)
def test_too_little_memory_has_many_spellings(error):
    from flows.sparing import surroundings

    for block in (surroundings(), blamed("a.weight")):
        with pytest.raises(FoldinError, match="E_MEMORY"), block:
            raise error


def test_a_tensor_that_finds_a_gpu_full_is_tried_once_more_with_what_was_kept_given_back(monkeypatch):
    told, full = [], torch.OutOfMemoryError("CUDA out of memory")

    def after(*answers):
        """Raises or returns what is given, one a call."""
        left = list(answers)

        def work():
            told.append("tried")
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return work

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("emptied"))
    assert with_room("cuda:0", after(full, "folded")) == "folded"
    assert told == ["tried", "emptied", "tried"]
    for device, answers, error in (
        ("cuda:0", (full, full), torch.OutOfMemoryError),
        ("cpu", (full,), torch.OutOfMemoryError),
        ("cuda:0", (RuntimeError("shapes"),), RuntimeError),
    ):
        with pytest.raises(error):
            with_room(device, after(*answers))


def test_an_error_that_says_nothing_of_memory_is_left_as_it_is():
    from flows.sparing import surroundings

    for block in (surroundings(), blamed("a.weight")):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"), block:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)")


def test_a_memory_in_another_format_is_refused_and_blocks_nothing_else(at, zoo, monkeypatch):
    look(at)
    register(at, zoo / "expert-1", "task-1")
    assert read_json(open_version(at, "tiny", 1).folder / STATE_FILE)["format"] == STATE_FORMAT
    monkeypatch.setattr(memory, "STATE_FORMAT", STATE_FORMAT + 1)
    found = f"Expected format {STATE_FORMAT + 1}. Found format {STATE_FORMAT}. Start a new line"
    with pytest.raises(FoldinError, match=rf"E_FORMAT tiny v1, file foldin/state.json: .* {found}"):
        look(at)
    assert versions.verified(at, "tiny", 1)[0].is_dir()
    monkeypatch.undo()
    assert at.ledger.experts("tiny")[0].attempts == 0
    assert [each["state"] for each in look(at)] == ["folded"]
    assert read_json(open_version(at, "tiny", 2).folder / STATE_FILE)["format"] == STATE_FORMAT


def test_a_change_too_large_to_fold_is_the_experts_fault_and_names_the_tensor(at, zoo, tmp_path):
    for number in (1, 2):  # each is finite; their sum is not
        huge = tmp_path / f"huge-{number}"
        shutil.copytree(zoo / f"expert-{number}", huge)
        weights = load_file(huge / "model.safetensors")
        weights["pooler.dense.bias"] = torch.full_like(weights["pooler.dense.bias"], 3e38)
        save_file(weights, huge / "model.safetensors", {"format": "pt"})
        register(at, huge, f"task-{number}")
    register(at, zoo / "expert-3", "task-3")
    outcomes = look(at)
    assert [each["state"] for each in outcomes] == ["folded", "quarantined", "folded"]
    assert "E_FOLD expert tiny-experts v2, tensor pooler.dense.bias" in outcomes[1]["reason"]


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")  # peft asks for a name that is going away
def test_a_lora_adapter_is_folded_by_its_factors_and_scored_like_any_expert(at, zoo, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(
            BertModel.from_pretrained(zoo / "base"), LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        folder = tmp_path / f"adapter-{seed}"
        model.save_pretrained(folder)
        for path in (zoo / "expert-1").glob("*.parquet"):
            shutil.copy(path, folder)
        shutil.copy(zoo / "expert-1" / "suite.json", folder)
        register(at, folder, f"task-{seed}")
    assert [each["state"] for each in look(at)] == ["folded", "folded"]
    served, base = open_version(at, "tiny", 3), load_file(zoo / "base/model.safetensors")
    slots, weights = served.slots(), served.weights()
    name = "encoder.layer.0.attention.self.query.weight"
    assert (slots[f"{name}:total.left"].shape, slots[f"{name}:total.right"].shape) == ((32, 8), (32, 8))
    moved = {name for name in base if not weights[name].equal(base[name])}
    assert moved == {
        f"encoder.layer.{layer}.attention.self.{part}.weight" for layer in (0, 1) for part in ("query", "value")
    }
    # Small as they are, they are not archived.
    rows = archive(at, "tiny", [], 0.01, "ann")
    assert [(row["expert"], row["state"], row["after"]) for row in rows] == [
        (f"tiny-experts v{number}", "an adapter, kept as it is", None) for number in (1, 2)
    ]
    assert archives(at) == []
