"""May this expert enter? Real folders, good and hostile."""

import json
import os
import pickle
import sys

import pytest
import torch

from registry.files import hash_tree
from registry.intake import Admitted, admit, architecture_differs, base_matches
from registry.records import Refusal
from registry.weights import Checkpoint, spec_of
from registry.writer import plan_layout, write_checkpoint

WHERE = "expert demo-experts v3"
CONFIG = {"model_type": "bert", "hidden_size": 4, "architectures": ["BertModel"], "torch_dtype": "float32"}


@pytest.fixture
def expert(tmp_path):
    folder = tmp_path / "expert"
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    write_checkpoint(folder, specs, tensors.__getitem__, layout=plan_layout(specs))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def refusal(expert, store) -> Refusal:
    answer = admit(expert, store, WHERE)
    assert isinstance(answer, Refusal), answer
    assert answer.where == WHERE
    assert not store.exists() or os.listdir(store) == []
    return answer


def test_a_sound_expert_is_copied_with_its_digests(expert, store):
    answer = admit(expert, store, WHERE)
    assert isinstance(answer, Admitted)
    assert answer.files_sha256 == hash_tree(answer.folder) == hash_tree(expert)
    assert answer.folder == store / answer.tree_sha256[:2] / answer.tree_sha256
    assert answer.ignored == ()
    assert len(Checkpoint.open(answer.folder)) == 2


def test_the_files_that_people_register_are_kept_and_the_rest_is_left(expert, store):
    kept = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt"]
    kept += ["spiece.model", "generation_config.json", "preprocessor_config.json", "README.md", "LICENSE.txt"]
    kept += ["suite.json", "gate.parquet", "data/tune.parquet", "modules.json", "1_Pooling/config.json"]
    left = ["MLmodel", "conda.yaml", "requirements.txt", "training_args.bin", "optimizer.pt", "notes\x1b.txt"]
    left += ["checkpoint-5/model.safetensors", ".hidden.json", "heads/config.json"]
    for name in kept + left:
        (expert / name).parent.mkdir(exist_ok=True)
        (expert / name).write_text("{}")
    answer = admit(expert, store, WHERE)
    assert isinstance(answer, Admitted)
    assert set(answer.files_sha256) == {*kept, "config.json", "model.safetensors"}
    assert set(answer.ignored) == {*left} - {"notes\x1b.txt"} | {"notes\\x1b.txt"}


class Canary:
    def __reduce__(self):
        return os.mkdir, (os.environ["CANARY"],)


SEEN: list[str] = []
_recorder_installed = False


def record_events():
    """Audit hooks cannot be removed, so one is installed once and its list emptied."""
    global _recorder_installed
    if not _recorder_installed:
        sys.addaudithook(lambda event, arguments: SEEN.append(event))
        _recorder_installed = True
    SEEN.clear()


@pytest.mark.parametrize(
    "name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "m.pkl", "m.joblib", "m.safetensors"]
)
def test_pickles_are_refused_and_never_loaded(expert, store, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    (expert / "model.safetensors").unlink()
    (expert / name).write_bytes(pickle.dumps({"weight": Canary()}))
    record_events()
    answer = refusal(expert, store)
    assert not {"pickle.find_class", "exec", "os.system", "subprocess.Popen"} & set(SEEN)
    assert (answer.code, answer.file) == ("E_FORMAT", name)
    assert "safetensors" in answer.remedy
    assert not (tmp_path / "canary").exists()


def test_pickles_beside_safetensors_are_left_and_reported(expert, store):
    (expert / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    answer = admit(expert, store, WHERE)
    assert isinstance(answer, Admitted)
    assert answer.ignored == ("pytorch_model.bin",)
    assert not (answer.folder / "pytorch_model.bin").exists()


def test_what_an_expert_must_have(expert, store):
    (expert / "config.json").unlink()
    assert refusal(expert, store).code == "E_CONFIG"
    (expert / "model.safetensors").unlink()
    assert (refusal(expert, store).code, refusal(expert, store).what) == ("E_FORMAT", "there are no weights")
    assert refusal(expert / "nowhere", store).code == "E_FILETYPE"


@pytest.mark.parametrize("name", ["modeling_bert.py", "code/x.PY", "fast.so"])
def test_code_is_refused(expert, store, name):
    (expert / name).parent.mkdir(exist_ok=True)
    (expert / name).write_text("raise SystemExit")
    assert (refusal(expert, store).code, refusal(expert, store).file) == ("E_REMOTE_CODE", name)


CODE = [
    {"auto_map": {"AutoModel": "modeling_x.X"}},
    {"trust_remote_code": True},
    {"text_config": {"auto_map": {"AutoModel": "org/repo--modeling.X"}}},
    {"parts": [{"trust_remote_code": "yes"}]},
    {"_attn_implementation": "org/kernel"},
    {"attn_implementation": "kernels-community/flash"},
    {"_attn_implementation_internal": "org/kernel:layer"},
    {"attn_implementation": {"text": "org/kernel"}},
    {"_experts_implementation": ["eager"]},
    {"use_kernels": True},
]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("fields", CODE, ids=str)
def test_fields_that_could_load_code_are_refused(expert, store, name, fields):
    (expert / name).write_text(json.dumps(CONFIG | fields))
    assert (refusal(expert, store).code, refusal(expert, store).file) == ("E_REMOTE_CODE", name)


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "sdpa", "_attn_implementation_autoset": True},
        {"trust_remote_code": False, "auto_map": None},
        {"attn_implementation": {"text": "eager", "vision": None}, "kernel_size": 3},
    ],
    ids=str,
)
def test_harmless_fields_are_accepted(expert, store, fields):
    (expert / "config.json").write_text(json.dumps(CONFIG | fields))
    assert isinstance(admit(expert, store, WHERE), Admitted)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1, "a": 2}', '{"a":' * 9000 + "1" + "}" * 9000, '{"a":' * 600 + "1" + "}" * 600]
)
def test_a_configuration_that_is_no_plain_object_is_refused_or_harmless(expert, store, text):
    (expert / "config.json").write_text(text)
    answer = admit(expert, store, WHERE)
    if text.endswith("}" * 600) and not text.endswith("}" * 601):
        assert isinstance(answer, Admitted)
    else:
        assert (refusal(expert, store).code, refusal(expert, store).file) == ("E_CONFIG", "config.json")


def test_weights_that_are_not_sound_are_refused_by_file_and_tensor(expert, store):
    path = expert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    answer = refusal(expert, store)
    assert (answer.code, answer.file, answer.tensor) == ("E_FORMAT", "model.safetensors", "b")
    assert str(answer).startswith("E_FORMAT expert demo-experts v3, file model.safetensors, tensor b: ")


@pytest.mark.timeout(5)
def test_links_and_pipes_are_refused(expert, store):
    os.mkfifo(expert / "suite.json")
    assert (refusal(expert, store).code, refusal(expert, store).file) == ("E_FILETYPE", "suite.json")
    (expert / "suite.json").unlink()
    (expert / "suite.json").symlink_to("/etc/passwd")
    assert refusal(expert, store).code == "E_FILETYPE"


def test_an_expert_over_its_byte_budget_is_refused(expert, store):
    answer = admit(expert, store, WHERE, max_bytes=50)
    assert isinstance(answer, Refusal)
    assert answer.code == "E_TOO_LARGE"


def test_weights_swapped_after_admission_do_not_reach_the_copy(expert, store):
    answer = admit(expert, store, WHERE)
    assert isinstance(answer, Admitted)
    (expert / "model.safetensors").write_bytes(b"swapped")
    assert hash_tree(answer.folder) == answer.files_sha256
    assert torch.equal(Checkpoint.open(answer.folder)["a"], torch.ones(3))


def test_the_same_expert_again_is_the_same_copy(expert, store):
    assert admit(expert, store, WHERE) == admit(expert, store, "another name")


ADAPTER_CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "auto_mapping": {"parent_library": "os"}}


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(1, 3),
        "base_model.model.q.lora_B.weight": torch.ones(2, 1),
    }
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    write_checkpoint(folder, specs, tensors.__getitem__, layout={"adapter_model.safetensors": list(tensors)})
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    return folder


def test_a_sound_adapter_is_copied_with_what_may_lie_beside_it(adapter, expert, store):
    kept = ["tokenizer.json", "suite.json", "gate.parquet", "data/tune.parquet", "README.md"]
    left = ["config.json", "training_args.bin", "optimizer.pt", "checkpoint-5/adapter_model.safetensors"]
    left += ["adapter_model.safetensors.index.json", "adapter_model.bin"]
    for name in kept + left:
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("{}")
    answer = admit(adapter, store, WHERE)
    assert isinstance(answer, Admitted)
    assert set(answer.files_sha256) == {*kept, "adapter_config.json", "adapter_model.safetensors"}
    assert set(answer.ignored) == set(left)
    assert answer.is_adapter
    assert len(Checkpoint.open(answer.folder)) == 2
    whole = admit(expert, store, WHERE)
    assert isinstance(whole, Admitted)
    assert not whole.is_adapter


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_a_full_checkpoint_is_refused(adapter, expert, store, name):
    (adapter / name).rename(expert / name)
    answer = refusal(expert, store)
    assert (answer.code, answer.file) == ("E_ADAPTER", "model.safetensors")
    assert answer.what == "the folder holds an adapter and a full checkpoint"


def test_a_pickled_adapter_is_refused_and_what_an_adapter_must_have(adapter, store):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    answer = refusal(adapter, store)
    assert (answer.code, answer.file, answer.what) == (
        "E_FORMAT",
        "adapter_model.bin",
        "there are only pickled weights",
    )
    (adapter / "adapter_config.json").unlink()
    assert (refusal(adapter, store).code, refusal(adapter, store).file) == ("E_FORMAT", "adapter_model.bin")
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    assert (refusal(adapter, store).code, refusal(adapter, store).file) == ("E_CONFIG", "adapter_config.json")
    (adapter / "config.json").write_text("{}")
    assert refusal(adapter, store).file == "adapter_config.json"


@pytest.mark.parametrize("fields", [*CODE, {"runtime_config": {"auto_map": {"x": "y"}}}], ids=str)
def test_fields_of_an_adapter_that_could_load_code_are_refused(adapter, store, fields):
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | fields))
    assert (refusal(adapter, store).code, refusal(adapter, store).file) == ("E_REMOTE_CODE", "adapter_config.json")


def test_an_adapter_that_cannot_be_folded_or_is_not_sound_is_refused(adapter, store):
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | {"peft_type": "IA3"}))
    assert (refusal(adapter, store).code, refusal(adapter, store).found) == ("E_ADAPTER", "IA3")
    (adapter / "adapter_config.json").write_text("[]")
    assert (refusal(adapter, store).code, refusal(adapter, store).file) == ("E_CONFIG", "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert (refusal(adapter, store).code, refusal(adapter, store).file) == ("E_FORMAT", "adapter_model.safetensors")
    path.write_bytes(pickle.dumps(Canary))
    assert refusal(adapter, store).code == "E_FORMAT"


@pytest.mark.parametrize("name", ["adapter.py", "code/x.so"])
def test_code_beside_an_adapter_is_refused(adapter, store, name):
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_text("raise SystemExit")
    assert (refusal(adapter, store).code, refusal(adapter, store).file) == ("E_REMOTE_CODE", name)


def test_another_architecture_is_named_by_field():
    base = CONFIG | {"vocab_size": 10}
    assert architecture_differs(base, CONFIG) is None
    assert architecture_differs(base, base | {"_name_or_path": "x", "id2label": {}}) is None
    assert architecture_differs(base, base | {"hidden_size": 8}) == ("hidden_size", "4", "8")
    assert architecture_differs(base, base | {"model_type": "vit\n", "hidden_size": 8}) == (
        "model_type",
        "bert",
        "vit\\n",
    )


def test_a_base_is_accepted_by_its_digest_or_twelve_digits_of_it():
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    for declared in (digest, digest[:12], digest.upper(), f" {digest}\n"):
        assert base_matches(declared, {digest, "00" * 32}, WHERE) is None
    for declared in (digest[:11], "", "0" * 64, digest[1:], f"{digest}00", "<b>", digest[:12] + "g"):
        answer = base_matches(declared, [digest], WHERE)
        assert answer is not None
        assert (answer.code, answer.expected, answer.where) == ("E_BASE", digest, WHERE)
    assert base_matches(digest, [], WHERE) is not None
