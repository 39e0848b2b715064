"""Adapters: what PEFT would merge is what is read; what cannot be folded exactly is refused by name."""

import json
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.bert.modeling_bert import BertForSequenceClassification

from registry.adapters import Adapter
from registry.records import FoldinError, TensorSpec
from registry.weights import Checkpoint, spec_of
from registry.writer import plan_layout, write_checkpoint

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **options))


def bert():
    return BertModel(BertConfig(**SIZES))


def gpt2():
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, **TOKEN_IDS, tie_word_embeddings=False))


class Convolutions(nn.Module):
    """A model of convolutions of every rank, pointwise and not, with a linear layer at the end."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(3, 5, 3)
        self.plane = nn.Conv2d(5, 4, (2, 3))
        self.point = nn.Conv2d(4, 6, 1)
        self.space = nn.Conv3d(6, 2, 2)
        self.linear = nn.Linear(2, 3)


def write_base(folder, tensors):
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    write_checkpoint(folder, specs, tensors.__getitem__, layout=plan_layout(specs))
    return Checkpoint.open(folder, "base")


@contextmanager
def peft_talk():
    """PEFT says when it corrects fan_in_fan_out or saves an embedding, and asks transformers a deprecated question."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def randomise(model):
    """Stands for training: every trainable parameter moves, so that no factor is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


class Trained(NamedTuple):
    base: Checkpoint
    folder: object  # of the adapter
    merged: dict  # name -> tensor after PEFT's merge_and_unload


def train(tmp_path, model, **config):
    """A base, an adapter that PEFT trained on it and saved, and what PEFT merges the two into."""
    torch.manual_seed(7)
    base = write_base(tmp_path / "base", model.state_dict())
    with peft_talk():
        adapted = get_peft_model(model, LoraConfig(**config))
        randomise(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        merged = adapted.float().merge_and_unload().state_dict()
    return Trained(base, tmp_path / "adapter", merged)


def assert_as_merged(trained, prefix="", tolerance=1e-6):
    """The adapter changes what PEFT changes, to what PEFT changes it to; all else is the base's."""
    adapter = Adapter.open(trained.folder, trained.base)
    for name in trained.base:
        expected, before = trained.merged[prefix + name], trained.base[name].float()
        if name not in adapter:
            assert torch.equal(expected, before), name
            continue
        torch.testing.assert_close(adapter[name], expected, rtol=0, atol=tolerance, msg=name)
        assert adapter.specs[name] == spec_of(adapter[name]) == TensorSpec("F32", tuple(before.shape))
        factors = adapter.factors(name)
        if factors:
            left, right = factors
            assert left.shape[1] == right.shape[1] < min(before.shape)
            torch.testing.assert_close(left @ right.T, expected - before, rtol=0, atol=tolerance, msg=name)
    return adapter


ATTENTION = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7}
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 5, r"layers\.1\..*(q|v)_proj": 2, "nothing": 4},
    "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 11, "v_proj": 2},
}
TOKENS = {**ATTENTION, "trainable_token_indices": [4, 1]}
CONVOLUTIONS = {"target_modules": ["line", "plane", "point", "space", "linear"], "r": 2, "lora_alpha": 3}
BLOCK = {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 2}
QUERY = {"target_modules": ["query"], "r": 2, "lora_alpha": 5}
WORDS = {"target_modules": ["embed_tokens", "q_proj"], "r": 2, "lora_alpha": 5}
MERGED = {  # model, configuration, how many tensors change, how many of them by a product
    "plain": (llama, ATTENTION, 4, 4),
    "rank-stabilised": (llama, {**ATTENTION, "use_rslora": True}, 4, 4),
    "patterns": (llama, ATTENTION | PATTERNS, 4, 4),
    "patterns, rank-stabilised": (llama, ATTENTION | PATTERNS | {"use_rslora": True}, 4, 4),
    "all linear": (llama, {"target_modules": "all-linear", "r": 2}, 14, 14),
    "gaussian start": (llama, {**ATTENTION, "init_lora_weights": "gaussian"}, 4, 4),
    "orthogonal start": (llama, {**ATTENTION, "r": 4, "init_lora_weights": "orthogonal"}, 4, 4),
    "DoRA": (llama, {**ATTENTION, "use_dora": True}, 4, 0),
    "saved modules": (llama, {**ATTENTION, "modules_to_save": ["lm_head", "norm"]}, 4 + 1 + 5, 4),
    "token rows": (llama, TOKENS, 5, 4),
    "token rows by module": (llama, {**TOKENS, "trainable_token_indices": {"embed_tokens": [0, 19]}}, 5, 4),
    "embedding": (llama, WORDS, 3, 3),
    "embedding, DoRA": (llama, {**WORDS, "use_dora": True}, 3, 0),
    "all biases": (bert, {**QUERY, "bias": "all"}, 2 + 18, 2),
    "biases of adapted layers": (bert, {**QUERY, "bias": "lora_only"}, 2 + 2, 2),
    "bias in B": (bert, {**QUERY, "lora_bias": True}, 2 + 2, 2),
    "biases twice": (bert, {**QUERY, "lora_bias": True, "bias": "lora_only"}, 2 + 2, 2),
    "Conv1D": (gpt2, {**BLOCK, "fan_in_fan_out": True}, 8, 8),
    "Conv1D, flag forgotten": (gpt2, BLOCK, 8, 8),
    "Conv1D, DoRA": (gpt2, {**BLOCK, "use_dora": True}, 8, 0),
    "Conv1D, embedding": (gpt2, {**BLOCK, "target_modules": ["c_proj", "c_attn", "wte"]}, 7, 7),
    "mixed, no square": (gpt2, {**BLOCK, "target_modules": ["c_attn", "lm_head"]}, 3, 3),
    "convolutions": (Convolutions, {**CONVOLUTIONS, "r": 1}, 5, 1),
    "convolutions, DoRA": (Convolutions, {**CONVOLUTIONS, "use_dora": True}, 5, 0),
    "convolutions, bias in B": (Convolutions, {**CONVOLUTIONS, "r": 1, "lora_bias": True}, 10, 1),
}


@pytest.mark.parametrize(("model", "config", "changed", "products"), MERGED.values(), ids=MERGED.keys())
def test_an_adapter_reads_as_what_peft_merges(tmp_path, model, config, changed, products):
    adapter = assert_as_merged(train(tmp_path, model(), **config))
    assert len(adapter) == len(adapter.specs) == len(list(adapter)) == changed
    assert sum(adapter.factors(name) is not None for name in adapter) == products
    assert len(adapter.head) == 0


def test_half_precision_is_added_up_in_float32(tmp_path):
    trained = train(tmp_path, llama().to(torch.bfloat16), **ATTENTION)
    assert {spec.dtype for spec in trained.base.specs.values()} == {"BF16"}
    assert_as_merged(trained)


def test_a_converted_pissa_adapter_fits_the_untouched_base(tmp_path):
    torch.manual_seed(3)
    model = llama()
    base = write_base(tmp_path / "base", model.state_dict())
    config = LoraConfig(**ATTENTION, init_lora_weights="pissa")
    with peft_talk():
        adapted = get_peft_model(model, config)
        adapted.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
        adapted.save_pretrained(tmp_path / "start")
        adapted.peft_config["default"].init_lora_weights = "pissa"
        randomise(adapted)
        adapted.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        adapted.save_pretrained(tmp_path / "unconverted")
        merged = adapted.merge_and_unload().state_dict()
    assert_as_merged(Trained(base, tmp_path / "adapter", merged), tolerance=1e-5)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An adapter with biases and a classification head, and the classifier that it was trained on."""
    folder = tmp_path_factory.mktemp("classifier")
    return train(folder, BertForSequenceClassification(BertConfig(**SIZES)), **QUERY, bias="all", task_type="SEQ_CLS")


def test_a_head_that_the_base_lacks_is_kept_aside_and_an_outer_prefix_is_taken_off(tmp_path, classifier):
    inner = {name.removeprefix("bert."): classifier.base[name] for name in classifier.base if "classifier" not in name}
    adapter = assert_as_merged(classifier._replace(base=write_base(tmp_path, inner)), prefix="bert.")
    assert len(adapter) == 2 + 18
    assert list(adapter.head) == ["classifier.bias", "classifier.weight"]
    for name in adapter.head:
        assert torch.equal(adapter.head[name], classifier.merged[name])
        assert not torch.equal(adapter.head[name], classifier.base[name])


def test_a_head_that_the_base_has_is_changed_like_any_tensor(classifier):
    adapter = assert_as_merged(classifier)
    assert len(adapter) == 2 + 18 + 2
    assert len(adapter.head) == 0


def test_an_outer_prefix_of_the_base_is_added(tmp_path, classifier):
    outer = {f"tower.{name}": tensor for name, tensor in classifier.base.items()}
    merged = {f"tower.{name}": tensor for name, tensor in classifier.merged.items()}
    assert len(assert_as_merged(Trained(write_base(tmp_path, outer), classifier.folder, merged))) == 2 + 18 + 2


def test_an_embedding_that_was_saved_whole_and_moved_is_no_product(tmp_path):
    trained = train(tmp_path, llama(), **WORDS)
    stored = load_file(trained.folder / "adapter_model.safetensors")
    whole = next(key for key in stored if key.endswith("embed_tokens.base_layer.weight"))
    assert Adapter.open(trained.folder, trained.base).factors("model.embed_tokens.weight") is not None
    stored[whole][3] += 1
    save_file(stored, trained.folder / "adapter_model.safetensors")
    adapter = Adapter.open(trained.folder, trained.base)
    assert adapter.factors("model.embed_tokens.weight") is None
    moved = adapter["model.embed_tokens.weight"] - trained.merged["model.embed_tokens.weight"]
    torch.testing.assert_close(moved.sum(dim=1), 16.0 * (torch.arange(20) == 3))


def test_a_square_matrix_in_a_mixed_model_is_refused_because_peft_keeps_one_flag_for_all(tmp_path):
    trained = train(tmp_path, gpt2(), **(BLOCK | {"target_modules": ["c_attn", "c_proj", "lm_head"]}))
    refusal = refused(trained.folder, trained.base)
    assert refusal.what == "it is not clear whether this square matrix is stored as (in, out)"
    assert refusal.tensor == "base_model.model.transformer.h.0.attn.c_proj.lora_A.weight"


def test_the_configuration_is_the_one_that_peft_reloads(tmp_path):
    """Patterns are tried in the order of the file, which PEFT sorts; a reload is what others see of the adapter."""
    config = ATTENTION | {"alpha_pattern": {"v_proj": 2, "self_attn.v_proj": 30}}
    trained = train(tmp_path, llama(), **config)
    fresh = llama()
    fresh.load_state_dict(dict(trained.base))
    with peft_talk():
        merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    assert_as_merged(trained._replace(merged=merged))


# What follows needs no model: one small base, and adapters for it written by hand.

BASE = {
    **{"model.q.weight": (4, 6), "model.q.bias": (4,), "model.square.weight": (4, 4), "model.norm.weight": (6,)},
    **{
        "model.embed.weight": (5, 6),
        "model.conv.weight": (4, 3, 2, 2),
        "model.count": (1,),
        "model.packed.weight": (4, 6),
    },
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
Q = "base_model.model.model.q"
PLAIN = {f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (4, 2)}


@pytest.fixture
def base(tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in BASE.items()}
    tensors["model.count"] = torch.tensor([3])
    tensors["model.packed.weight"] = torch.ones(4, 6, dtype=torch.uint8)
    return write_base(tmp_path / "base", tensors)


def write_adapter(folder, shapes, config, dtypes=None):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    tensors = {key: torch.randn(shape).to((dtypes or {}).get(key, torch.float32)) for key, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def written(tmp_path):
    return lambda shapes, config, **options: write_adapter(tmp_path / "adapter", shapes, config, **options)


def refused(folder, base):
    with pytest.raises(FoldinError) as caught:
        Adapter.open(folder, base, "expert e v1")
    refusal = caught.value.refusal
    assert (refusal.code, refusal.where) == ("E_ADAPTER", "expert e v1")
    assert refusal.file in {"adapter_config.json", "adapter_model.safetensors"}
    assert refusal.remedy
    return refusal


UNSUPPORTED = [
    {"peft_type": "LOHA"},
    {"peft_type": None},
    {"alora_invocation_tokens": [1, 2]},
    {"arrow_config": {"top_k": 3}},
    {"kasa_config": {"beta": 1}},
    {"layer_replication": [[0, 2], [1, 3]]},
    {"megatron_config": {"x": 1}},
    {"monteclora_config": {"num_samples": 8}},
    {"target_parameters": ["experts.gate_up_proj"]},
    {"use_bdlora": {"nblocks": 2}},
    {"use_qalora": True},
    {"velora_config": {"num_groups": 4}},
    {"use_something_new": 1},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": 3},
    {"init_lora_weights": []},
    {"use_dora": True, "lora_bias": True},
    {"use_rslora": "yes"},
    {"use_dora": 1},
    {"r": None},
    {"r": 0},
    {"r": 2.0},
    {"r": True},
    {"lora_alpha": None},
    {"lora_alpha": "3"},
    {"lora_alpha": float("nan")},
    {"lora_alpha": float("inf")},
    {"lora_alpha": 10**400},
    {"rank_pattern": ["q"]},
    {"rank_pattern": {"q": 0}},
    {"alpha_pattern": {"q": [1]}},
    {"alpha_pattern": {f"q{number}": 1 for number in range(4097)}},
    {"alpha_pattern": {f".*q{number}": 1 for number in range(257)}},
    {"modules_to_save": "head"},
    {"modules_to_save": [1]},
    {"modules_to_save": [""]},
    {"trainable_token_indices": [1, 1]},
    {"trainable_token_indices": [-1]},
    {"trainable_token_indices": {"embed": 3}},
    {"trainable_token_indices": "embed"},
]


@pytest.mark.parametrize("fields", UNSUPPORTED, ids=lambda fields: str(fields)[:60])
def test_configurations_that_cannot_be_folded_are_refused_by_field(written, base, fields):
    refusal = refused(written(PLAIN, CONFIG | fields), base)
    assert refusal.file == "adapter_config.json"
    named = f"{refusal.what} {refusal.expected}"
    assert any(field in named for field in fields), named


def test_fields_that_change_nothing_are_accepted(written, base):
    harmless = {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}, "megatron_core": "megatron.core"}
    harmless |= {"task_type": "CAUSAL_LM", "lora_dropout": 0.5, "target_parameters": [], "use_something_new": None}
    harmless |= {"loftq_config": {}, "layers_to_transform": [1], "bias": "none", "init_lora_weights": "EVA"}
    assert list(Adapter.open(written(PLAIN, CONFIG | harmless), base)) == ["model.q.weight"]


HOSTILE = [
    "(a*)*b",
    "(a|b)+",
    "(.+)?x",
    "a{9}{9}",
    "(?=a)",
    r"(a)\1",
    "[[a]",
    "(",
    "*",
    "a*a*a*",
    "(a)(b)(c)",
    "a" * 513,
]


@pytest.mark.parametrize("pattern", [*HOSTILE, "|".join("a" * 66)])
@pytest.mark.timeout(5)
def test_searches_that_could_take_for_ever_are_not_run(written, base, pattern):
    refusal = refused(written(PLAIN, CONFIG | {"alpha_pattern": {pattern: 1}}), base)
    assert refusal.what == "alpha_pattern holds a search that is not run"


@pytest.mark.parametrize(
    "pattern", ["q", "model.q", "^model.q", r"model\.q", "mod.*q", "(p|q)", "[pq]", "model.(?:p|q)"]
)
def test_searches_that_people_write_find_their_module(written, base, pattern):
    scaled = Adapter.open(written(PLAIN, CONFIG | {"alpha_pattern": {"x.*": 9, pattern: 30}}), base)["model.q.weight"]
    plain = Adapter.open(written(PLAIN, CONFIG), base)["model.q.weight"]
    start = base["model.q.weight"]
    torch.testing.assert_close(scaled - start, 10 * (plain - start), rtol=1e-4, atol=1e-5)


def test_a_module_whose_name_is_no_search_is_found_by_its_name(written, tmp_path):
    base = write_base(tmp_path / "odd", {"model.q+r.weight": torch.zeros(4, 6)})
    odd = {key.replace(".q.", ".q+r."): shape for key, shape in PLAIN.items()}
    scaled = Adapter.open(written(odd, CONFIG | {"alpha_pattern": {"model.q+r": 30}}), base)["model.q+r.weight"]
    plain = Adapter.open(written(odd, CONFIG), base)["model.q+r.weight"]
    torch.testing.assert_close(scaled, 10 * plain)


def test_saved_modules_are_found_by_the_end_of_their_path(written, base):
    shapes = PLAIN | {"base_model.model.text.my_head.deep.weight": (2,)}
    assert list(Adapter.open(written(shapes, CONFIG | {"modules_to_save": ["head"]}), base).head) == [
        "text.my_head.deep.weight"
    ]
    assert refused(written(shapes, CONFIG | {"modules_to_save": ["other"]}), base).what == "the base has no such tensor"


class Wrong(NamedTuple):
    what: str  # part of the message
    tensor: str  # the end of the name of the tensor at fault
    shapes: dict
    fields: dict = {}  # noqa: RUF012 - never changed


E = "base_model.model.model.embed"
C = "base_model.model.model.conv"
S = "base_model.model.model.square"
N = "base_model.model.model.norm"
EMBED = {f"{E}.lora_embedding_A": (2, 5), f"{E}.lora_embedding_B": (6, 2)}
DELTA = f"{E}.token_adapter.trainable_tokens_delta"
MAGNITUDE = f"{Q}.lora_magnitude_vector"
WRONG = {
    "no tensor at all": Wrong("changes no tensor", "", {}),
    "B is missing": Wrong("partner lora_B is missing", "q.lora_A.weight", {f"{Q}.lora_A.weight": (2, 6)}),
    "A is missing": Wrong("partner lora_A is missing", "q.lora_B.weight", {f"{Q}.lora_B.weight": (4, 2)}),
    "embedding B is missing": Wrong("lora_embedding_B is", "embedding_A", {f"{E}.lora_embedding_A": (2, 5)}),
    "unknown module": Wrong("no such tensor", "model.v.weight", {k.replace(".q.", ".v."): s for k, s in PLAIN.items()}),
    "one unknown module": Wrong(
        "no such tensor", "model.v.weight", PLAIN | {k.replace(".q.", ".v."): s for k, s in PLAIN.items()}
    ),
    "unknown whole tensor": Wrong("no such tensor", "model.gate.weight", PLAIN | {"model.gate.weight": (2,)}),
    "rank is another": Wrong("rank", "lora_A.weight", PLAIN, {"r": 3}),
    "rank pattern is another": Wrong("rank", "lora_A.weight", PLAIN, {"rank_pattern": {"q": 4}}),
    "A too wide": Wrong("shape", "lora_A.weight", PLAIN | {f"{Q}.lora_A.weight": (2, 7)}),
    "B too long": Wrong("shape", "lora_B.weight", PLAIN | {f"{Q}.lora_B.weight": (5, 2)}),
    "B of another rank": Wrong("shape", "lora_B.weight", PLAIN | {f"{Q}.lora_B.weight": (4, 3)}),
    "A of no rank": Wrong("rank", "lora_A.weight", PLAIN | {f"{Q}.lora_A.weight": ()}),
    "A with a kernel": Wrong("shape", "lora_A.weight", PLAIN | {f"{Q}.lora_A.weight": (2, 6, 1, 1)}),
    "base is a vector": Wrong("no matrix", "A.weight", {f"{N}.lora_A.weight": (2, 1), f"{N}.lora_B.weight": (6, 2)}),
    "embedding on a kernel": Wrong(
        "no matrix", "embedding_A", {f"{C}.lora_embedding_A": (2, 4), f"{C}.lora_embedding_B": (3, 2)}
    ),
    "embedding too short": Wrong("shape", "embedding_A", EMBED | {f"{E}.lora_embedding_A": (2, 4)}),
    "grouped convolution": Wrong(
        "shape", "lora_A.weight", {f"{C}.lora_A.weight": (2, 6, 2, 2), f"{C}.lora_B.weight": (4, 2, 1, 1)}
    ),
    "magnitude without DoRA": Wrong("use_dora", "lora_magnitude_vector", PLAIN | {MAGNITUDE: (4,)}),
    "DoRA without magnitude": Wrong("use_dora", "lora_A.weight", PLAIN, {"use_dora": True}),
    "magnitude too short": Wrong("shape", "magnitude_vector", PLAIN | {MAGNITUDE: (3,)}, {"use_dora": True}),
    "magnitude alone": Wrong("do not go together", "magnitude_vector", {MAGNITUDE: (4,)}, {"use_dora": True}),
    "bias in B unasked": Wrong("lora_bias", "lora_B.bias", PLAIN | {f"{Q}.lora_B.bias": (4,)}),
    "bias in B missing": Wrong("lora_bias", "lora_B.weight", PLAIN, {"lora_bias": True}),
    "bias in B too short": Wrong("shape", "B.bias", PLAIN | {f"{Q}.lora_B.bias": (3,)}, {"lora_bias": True}),
    "bias in B, none in the base": Wrong(
        "no such tensor",
        "model.square.bias",
        {f"{S}.lora_A.weight": (2, 4), f"{S}.lora_B.weight": (4, 2), f"{S}.lora_B.bias": (4,)},
        {"lora_bias": True},
    ),
    "bias in A": Wrong("do not go together", "lora_A.bias", PLAIN | {f"{Q}.lora_A.bias": (4,)}),
    "bias of another length": Wrong("shape", "q.base_layer.bias", PLAIN | {f"{Q}.base_layer.bias": (5,)}),
    "a bias twice": Wrong("twice", "q.bias", PLAIN | {f"{Q}.base_layer.bias": (4,), f"{Q}.bias": (4,)}),
    "a weight twice": Wrong("twice", "q.weight", PLAIN | {f"{Q}.weight": (4, 6)}),
    "two adapters": Wrong("several adapters", "", {f"{Q}.lora_A.a.weight": (2, 6), f"{Q}.lora_B.b.weight": (4, 2)}),
    "a part of another method": Wrong("no part of LoRA", "lora_diag", PLAIN | {f"{Q}.lora_diag": (2,)}),
    "a raw dump of saved modules": Wrong(
        "no part of LoRA",
        "default.weight",
        PLAIN | {"base_model.model.model.norm.modules_to_save.default.weight": (6,)},
    ),
    "a name beyond reason": Wrong("too long", "nnn...", PLAIN | {f"{'m' * 140}.{'n' * 70}.q.weight": (1,)}),
    "token rows unlisted": Wrong("trainable_token_indices", "tokens_delta", {DELTA: (2, 6)}),
    "token rows of another module": Wrong(
        "trainable_token_indices", "tokens_delta", {DELTA: (1, 6)}, {"trainable_token_indices": {"other": [1]}}
    ),
    "token rows beyond the end": Wrong(
        "trainable_token_indices", "tokens_delta", {DELTA: (1, 6)}, {"trainable_token_indices": [5]}
    ),
    "token rows too few": Wrong("shape", "tokens_delta", {DELTA: (1, 6)}, {"trainable_token_indices": [1, 2]}),
    "token rows and factors": Wrong(
        "do not go together", "lora_embedding_A", EMBED | {DELTA: (1, 6)}, {"trainable_token_indices": [1]}
    ),
    "quantised base": Wrong(
        "floating", "lora_A.weight", {key.replace(".q.", ".packed."): shape for key, shape in PLAIN.items()}
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_tensors_that_do_not_fit_are_refused_by_name(written, base, wrong):
    refusal = refused(written(wrong.shapes, CONFIG | wrong.fields), base)
    assert refusal.file == "adapter_model.safetensors"
    assert wrong.what in refusal.what
    assert refusal.tensor.endswith(wrong.tensor)
    assert bool(refusal.tensor) == bool(wrong.tensor)


def test_integer_factors_are_refused_and_integer_buffers_stay_the_bases(written, base):
    shapes = PLAIN | {"base_model.model.model.count": (1,)}
    saved = CONFIG | {"modules_to_save": ["model"]}
    folder = written(shapes, saved, dtypes={"base_model.model.model.count": torch.int64})
    assert list(Adapter.open(folder, base)) == ["model.q.weight"]
    refusal = refused(written(PLAIN, CONFIG, dtypes={f"{Q}.lora_B.weight": torch.int8}), base)
    assert (refusal.tensor, refusal.found) == (f"{Q}.lora_B.weight", "I8 on F32")


def test_two_prefixes_that_fit_are_an_error(written, tmp_path):
    twins = write_base(tmp_path / "twins", {f"{part}.model.q.weight": torch.ones(4, 6) for part in "ab"})
    refusal = refused(written(PLAIN, CONFIG), twins)
    assert (refusal.what, refusal.found) == ("several tensors of the base fit", "+a., +b.")


def test_one_prefix_must_fit_every_tensor(written, tmp_path):
    base = write_base(tmp_path / "base2", {"a.model.q.weight": torch.ones(4, 6), "b.model.norm.weight": torch.ones(6)})
    shapes = PLAIN | {"base_model.model.model.norm.weight": (6,)}
    assert refused(written(shapes, CONFIG), base).what == "the base has no such tensor"


def test_names_of_the_base_win_over_prefixes(written, tmp_path):
    tensors = {"model.q.weight": torch.zeros(4, 6), "a.model.q.weight": torch.ones(4, 6), "q.weight": torch.ones(4, 6)}
    assert list(Adapter.open(written(PLAIN, CONFIG), write_base(tmp_path / "base2", tensors))) == ["model.q.weight"]


SPELLINGS = {
    "adapter name": lambda key: key.replace(".weight", ".default.weight").replace("vector", "vector.default.weight"),
    "other adapter name": lambda key: key.replace(".weight", ".legal.weight").replace("vector", "vector.legal"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_other_spellings_of_the_keys_are_the_same_adapter(tmp_path, base, spell):
    shapes, config = PLAIN | {MAGNITUDE: (4,)}, CONFIG | {"use_dora": True}
    first = Adapter.open(write_adapter(tmp_path / "first", shapes, config), base)
    second = {spell(key): shape for key, shape in shapes.items()}
    again = Adapter.open(write_adapter(tmp_path / "second", second, config), base)
    assert set(first.stored) != set(again.stored)
    assert first.sha256 == again.sha256
    assert torch.equal(first["model.q.weight"], again["model.q.weight"])


def test_the_digest_sees_what_the_adapter_does_and_nothing_else(tmp_path, base):
    def digest(shapes, fields, base=base):
        return Adapter.open(write_adapter(tmp_path / "adapter", shapes, CONFIG | fields), base).sha256

    plain = digest(PLAIN, {})
    other_base = write_base(tmp_path / "base2", {name: tensor + 1 for name, tensor in base.items()})
    assert digest(PLAIN, {}, other_base) == plain
    for fields in ({"lora_dropout": 0.1}, {"alpha_pattern": {"q": 3, "v": 9}}, {"target_modules": ["q"]}):
        assert digest(PLAIN, fields) == plain
    square = {f"{S}.lora_A.weight": (2, 4), f"{S}.lora_B.weight": (4, 2)}
    different = [plain, digest(PLAIN, {"lora_alpha": 4}), digest(PLAIN, {"use_rslora": True}), digest(EMBED, {})]
    different += [digest(square, {}), digest(square, {"fan_in_fan_out": True})]
    different += [digest({DELTA: (1, 6)}, {"trainable_token_indices": [row]}) for row in (1, 2)]
    different += [digest(PLAIN | {"head.weight": (2,)}, {"modules_to_save": ["head"]})]
    assert len(set(different)) == len(different)


def test_tensors_that_the_adapter_leaves_alone_are_not_in_it(written, base):
    adapter = Adapter.open(written(PLAIN, CONFIG), base)
    assert "model.norm.weight" not in adapter
    for read in (adapter.__getitem__, adapter.factors):
        with pytest.raises(KeyError):
            read("model.norm.weight")


def test_reading_changes_neither_the_base_nor_the_adapter(written, base):
    adapter = Adapter.open(written(PLAIN, CONFIG), base)
    before = adapter["model.q.weight"]
    adapter["model.q.weight"].zero_()
    assert torch.equal(adapter["model.q.weight"], before)


def test_opening_reads_no_tensor_and_a_lost_file_is_named(written, base):
    adapter = Adapter.open(written(PLAIN, CONFIG), base, "expert e v1")
    (adapter.stored.folder / "adapter_model.safetensors").unlink()
    assert adapter.specs == {"model.q.weight": TensorSpec("F32", (4, 6))}
    with pytest.raises(FoldinError, match=r"E_FORMAT expert e v1, file adapter_model.safetensors, tensor .*lora_"):
        adapter["model.q.weight"]


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 1, "r": 2}'])
def test_a_configuration_that_is_no_json_object_is_refused(written, base, text):
    folder = written(PLAIN, CONFIG)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(FoldinError, match=r"E_FORMAT expert e v1, file adapter_config.json"):
        Adapter.open(folder, base, "expert e v1")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(written, base, name):
    folder = written(PLAIN, CONFIG)
    (folder / name).unlink()
    with pytest.raises(FoldinError, match=f"E_UNREACHABLE expert e v1, file {name}"):
        Adapter.open(folder, base, "expert e v1")
