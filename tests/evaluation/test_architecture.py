"""What each stored tensor is, told from the configuration alone, on tiny models that transformers wrote itself."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from evaluation.architecture import anatomy, linear_weights
from registry.records import FoldinError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 40}
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}
LLAMA = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 16}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
CLIP = {"text_config": {**LLAMA, "projection_dim": 16}, "vision_config": IMAGE, "projection_dim": 16}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
LEVIT = {"image_size": 32, "hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1]}
LEVIT = {**LEVIT, "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 2, 2, 2, 2]]}
MOBILENET = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4}


def model_of(name, **options):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options))


def written(folder, model, **options):
    """The tensors of a model as `save_pretrained` stores them."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    transformers.utils.logging.enable_progress_bar()
    return load_file(folder / "model.safetensors")


def kinds(found, stored):
    """The sizes of the sets, after checks that hold for every architecture."""
    sets = (found.linear, found.transposed, found.stacked, found.convolutions, found.vocabulary)
    assert set().union(*sets, found.derived, found.means, found.means.values()) <= set(stored)
    assert all(stored[name].ndim == 2 for name in found.linear)
    assert all(stored[name].ndim == 3 for name in found.stacked)
    assert all(stored[name].ndim >= 3 for name in found.convolutions)
    assert found.transposed <= found.linear
    assert not found.linear & found.stacked
    assert not found.convolutions & (found.linear | found.stacked)
    assert not set(found.aliases) & set(found.aliases.values())
    return tuple(map(len, sets))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Six matrices in each layer and the pooler; the word embeddings.
        ("BertModel", TEXT, (13, 0, 0, 0, 1)),
        # Embeddings and the bias of the head, whose weight is the embeddings.
        ("BertForMaskedLM", TEXT, (13, 0, 0, 0, 2)),
        ("GPT2LMHeadModel", GPT2, (8, 8, 0, 0, 1)),
        ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, (14, 0, 0, 0, 1)),
        # The head is a linear layer and has a row per token.
        ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}, (15, 0, 0, 0, 2)),
        ("ViTModel", IMAGE, (13, 0, 0, 1, 0)),
        ("CLIPModel", CLIP, (26, 0, 0, 1, 1)),
        # Four of attention and two of the MLP in the encoder, four more for the decoder's second attention.
        ("T5ForConditionalGeneration", T5, (16, 0, 0, 0, 1)),
        # Four of attention, the router and three experts of three matrices, twice; the head.
        ("MixtralForCausalLM", {**LLAMA, **EXPERTS}, (2 * (4 + 1 + 9) + 1, 0, 0, 0, 2)),
        # The same with the experts fused in two tensors.
        ("GptOssForCausalLM", {**LLAMA, **EXPERTS}, (2 * (4 + 1) + 1, 0, 4, 0, 2)),
        ("ResNetModel", RESNET, (0, 0, 0, 6, 0)),
        # Two of attention and two of the MLP in three stages, three and two between them.
        ("LevitModel", LEVIT, (3 * 4 + 2 * 5, 0, 0, 4, 0)),
        # Thirteen of its 27 convolutions are depthwise.
        ("MobileNetV1Model", MOBILENET, (0, 0, 0, 14, 0)),
    ],
)
def test_the_kinds_of_tensors(tmp_path, name, options, expected):
    stored = written(tmp_path, model_of(name, **options))
    found = anatomy(tmp_path, stored)
    assert kinds(found, stored) == expected


def test_bert_names(tmp_path):
    stored = written(tmp_path, model_of("BertForMaskedLM", **TEXT))
    found = anatomy(tmp_path, stored)
    words, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    assert found.vocabulary == {words, bias}
    assert found.aliases == {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": bias}
    assert "cls.predictions.transform.dense.weight" in found.linear
    assert not found.linear & {words, "bert.embeddings.position_embeddings.weight", *found.aliases}


def test_the_weights_of_gpt2_lie_transposed_and_are_no_linear_modules(tmp_path):
    stored = written(tmp_path, model_of("GPT2LMHeadModel", **GPT2))
    found = anatomy(tmp_path, stored)
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert "transformer.h.0.mlp.c_fc.weight" in found.transposed
    assert found.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert linear_weights(tmp_path, stored) == frozenset()


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_head_is_an_alias_or_a_linear_layer(tmp_path, tied):
    stored = written(tmp_path, model_of("LlamaForCausalLM", **LLAMA, tie_word_embeddings=tied))
    found = anatomy(tmp_path, stored)
    head, tokens = "lm_head.weight", "model.embed_tokens.weight"
    assert (found.aliases == {head: tokens}) is tied
    assert (head in found.linear) is not tied
    assert found.vocabulary == ({tokens} if tied else {head, tokens})
    both = anatomy(tmp_path, {**stored, head: stored[tokens]})
    assert (head in both.linear) is not tied
    assert both.vocabulary == {head, tokens}


def test_every_name_of_a_tensor_that_t5_shares(tmp_path):
    stored = written(tmp_path, model_of("T5ForConditionalGeneration", **T5))
    names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert anatomy(tmp_path, stored).aliases == dict.fromkeys(names, "shared.weight")
    # A checkpoint that has the tensor under two other names.
    others = [name for name in stored if name != "shared.weight"]
    two = [*others, "lm_head.weight", "encoder.embed_tokens.weight"]
    assert set(anatomy(tmp_path, two).aliases.values()) == {"lm_head.weight"}
    assert anatomy(tmp_path, two).aliases.keys() == names - {"lm_head.weight"} | {"shared.weight"}
    assert set(anatomy(tmp_path, [*two, "shared.weight"]).aliases.values()) == {"shared.weight"}


def test_the_projections_of_clip_are_linear_and_its_class_embedding_is_nothing(tmp_path):
    found = anatomy(tmp_path, written(tmp_path, model_of("CLIPModel", **CLIP)))
    assert {"visual_projection.weight", "text_projection.weight"} <= found.linear
    assert found.convolutions == {"vision_model.embeddings.patch_embedding.weight"}
    assert found.vocabulary == {"text_model.embeddings.token_embedding.weight"}
    assert not found.aliases


def test_experts_are_what_the_checkpoint_stores(tmp_path):
    model = model_of("MixtralForCausalLM", **LLAMA, **EXPERTS)
    stored = written(tmp_path / "single", model)
    found = anatomy(tmp_path / "single", stored)
    router, first = "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert {router, first, "lm_head.weight"} <= found.linear
    assert anatomy(tmp_path / "single") == found
    fused = written(tmp_path / "fused", model, save_original_format=False)
    found = anatomy(tmp_path / "fused", fused)
    assert kinds(found, fused) == (2 * (4 + 1) + 1, 0, 4, 0, 2)
    assert "model.layers.1.mlp.experts.gate_up_proj" in found.stacked
    assert "model.layers.1.mlp.gate.weight" in found.linear


def test_biases_of_fused_experts_are_no_matrices(tmp_path):
    stored = written(tmp_path, model_of("GptOssForCausalLM", **LLAMA, **EXPERTS))
    found = anatomy(tmp_path, stored)
    bias = "model.layers.0.mlp.experts.down_proj_bias"
    assert stored[bias].ndim == 2
    assert bias not in found.linear | found.stacked
    assert "model.layers.0.mlp.experts.down_proj" in found.stacked


@pytest.mark.parametrize(("name", "options"), [("ResNetModel", RESNET), ("LevitModel", LEVIT)])
def test_batch_norms_pair_a_mean_with_a_variance(tmp_path, name, options):
    stored = written(tmp_path, model_of(name, **options))
    found = anatomy(tmp_path, stored)
    assert found.means.keys() == {name for name in stored if name.endswith("running_mean")}
    assert set(found.means.values()) == {name for name in stored if name.endswith("running_var")}
    assert all(mean.rpartition(".")[0] == variance.rpartition(".")[0] for mean, variance in found.means.items())
    mean, variance = next(iter(found.means.items()))
    assert mean not in anatomy(tmp_path, set(stored) - {variance}).means


def test_computed_buffers_are_found_where_older_checkpoints_store_them(tmp_path):
    stored = written(tmp_path, model_of("LlamaForCausalLM", **LLAMA))
    assert not anatomy(tmp_path, stored).derived
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}
    assert anatomy(tmp_path, {*stored, *old}).derived == old
    assert not anatomy(tmp_path).derived


def test_a_computed_buffer_does_not_take_others_of_its_last_name_along(tmp_path):
    options = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "attention_types": [[["global"], 1]],
    }
    stored = written(tmp_path, model_of("GPTNeoModel", **options, max_position_embeddings=8))
    mask = "h.0.attn.attention.bias"  # older checkpoints store the causal mask
    assert "h.0.mlp.c_fc.bias" in stored
    assert anatomy(tmp_path, {*stored, mask}).derived == {mask}


def test_without_names_every_spelling_is_told(tmp_path):
    stored = written(tmp_path, model_of("CLIPVisionModel", **IMAGE))
    found, plain = anatomy(tmp_path), {name.removeprefix("vision_model.") for name in stored}
    for part in (plain, {f"vision_model.{name}" for name in plain}):
        own = anatomy(tmp_path, part)
        assert own.linear == found.linear & part
        assert own.convolutions == found.convolutions & part
        assert (len(own.linear), len(own.convolutions)) == (12, 1)


def test_frequencies_that_an_architecture_stores_are_computed_all_the_same(tmp_path):
    stored = written(tmp_path, model_of("EsmModel", **TEXT, pad_token_id=0, position_embedding_type="rotary"))
    found = anatomy(tmp_path, stored).derived
    assert found == {name for name in stored if name.endswith("inv_freq")}
    assert found
    assert found == anatomy(tmp_path).derived


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [("BertModel", TEXT, "bert."), ("GPT2LMHeadModel", GPT2, "transformer."), ("ViTModel", IMAGE, "vit.")],
)
def test_an_outer_prefix_changes_names_and_nothing_else(tmp_path, name, options, prefix):
    stored = written(tmp_path, model_of(name, **options))
    plain = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    prefixed = {prefix + name: tensor for name, tensor in plain.items()}
    bare, outer = anatomy(tmp_path, plain), anatomy(tmp_path, prefixed)
    assert kinds(bare, plain) == kinds(outer, prefixed) == kinds(anatomy(tmp_path, stored), stored)
    assert {prefix + name for name in bare.linear} == outer.linear
    assert {prefix + name for name in bare.aliases.values()} == set(outer.aliases.values())


def test_tensors_that_the_architecture_lacks_are_of_no_kind(tmp_path):
    stored = written(tmp_path, model_of("BertModel", **TEXT))
    assert anatomy(tmp_path, {*stored, "classifier.weight", "other.running_mean"}) == anatomy(tmp_path, stored)


def test_the_names_may_be_walked_only_once(tmp_path):
    stored = written(tmp_path, model_of("BertForMaskedLM", **TEXT))
    assert anatomy(tmp_path, iter(stored)) == anatomy(tmp_path, stored)


def test_no_memory_is_taken(tmp_path):
    config = transformers.LlamaConfig(vocab_size=200_000, hidden_size=65_536, num_hidden_layers=2, head_dim=128)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert "model.layers.1.mlp.down_proj.weight" in anatomy(tmp_path).linear  # 52 GB in its two embeddings alone


def test_a_configuration_that_may_not_be_used(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "m.Evil"}}')
    with pytest.raises(FoldinError, match="E_REMOTE_CODE"):
        anatomy(tmp_path)
