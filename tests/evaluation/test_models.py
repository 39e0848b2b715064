"""Models come from checkpoints as data: names, heads and refusals, on tiny models of real architectures."""

import json
import sys

import pytest
import torch
import transformers

from evaluation.architecture import linear_weights
from evaluation.models import base_prefix, build, check_config
from evaluation.tokens import tokenizer_of
from registry.records import FoldinError

BERT = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT = {**VIT, "image_size": 8, "patch_size": 4, "num_channels": 1}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


def saved(folder, model):
    """Saves a model and returns its tensors under the names of the file."""
    bars = transformers.utils.logging
    bars.disable_progress_bar()
    model.save_pretrained(folder)
    bars.enable_progress_bar()
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def model_of(name, **options):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options))


def test_linear_weights_are_stored_names_of_linear_modules(tmp_path):
    stored = saved(tmp_path, model_of("ViTModel", **VIT))
    linear = linear_weights(tmp_path)
    assert linear <= set(stored)
    # Six matrices in each of two layers (query, key, value, output, two in the MLP) and the pooler.
    assert len(linear) == 2 * 6 + 1
    assert "encoder.layer.0.attention.attention.query.weight" in linear
    assert not [name for name in linear if "embeddings" in name or "layernorm" in name or name.endswith("bias")]


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("BertModel", BERT, 13),
        ("BertForMaskedLM", BERT, 13),  # no pooler, one transform; the decoder is tied to the embedding
        ("GPT2LMHeadModel", GPT2, 0),  # Conv1D throughout, and a tied output
        ("CLIPVisionModel", {key: value for key, value in VIT.items() if key != "num_channels"}, 12),
    ],
)
def test_linear_weights_of_other_architectures(tmp_path, name, options, count):
    stored = saved(tmp_path, model_of(name, **options))
    linear = linear_weights(tmp_path, stored)
    assert len(linear) == count
    assert linear == linear_weights(tmp_path) & set(stored)


@pytest.mark.parametrize(("name", "options"), [("BertForMaskedLM", BERT), ("GPT2LMHeadModel", GPT2)])
def test_an_output_tied_to_an_embedding_is_not_linear(tmp_path, name, options):
    saved(tmp_path, model_of(name, **options))
    assert not [weight for weight in linear_weights(tmp_path) if "decoder" in weight or "lm_head" in weight]


def test_a_language_model_without_padding_token_classifies_batches(tmp_path):
    base = saved(tmp_path, model_of("GPT2Model", **GPT2))
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    model = build(tmp_path, base, kind="text-classification", head={"score.weight": weight}, labels=3)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 0]])  # 0 ends and pads
    with torch.inference_mode():
        alone = model(tokens[1:, :2]).logits
        together = model(tokens, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])).logits
    torch.testing.assert_close(together[1:], alone)


def test_an_outer_prefix_is_found_in_either_spelling(tmp_path):
    options = {key: value for key, value in VIT.items() if key != "num_channels"}
    stored = saved(tmp_path, model_of("CLIPVisionModel", **options))
    plain = {name.removeprefix("vision_model.") for name in stored}
    prefixed = {f"vision_model.{name}" for name in plain}
    assert len(linear_weights(tmp_path, plain)) == len(linear_weights(tmp_path, prefixed)) == 12


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("ViTModel", VIT, "vit."),
        ("BertModel", BERT, "bert."),
        ("BertForMaskedLM", BERT, ""),
        ("GPT2Model", GPT2, "transformer."),
    ],
)
def test_the_prefix_of_task_models(tmp_path, name, options, prefix):
    stored = saved(tmp_path, model_of(name, **options))
    assert base_prefix(tmp_path) == base_prefix(tmp_path, stored) == prefix


def test_the_names_of_a_checkpoint_decide_over_its_config(tmp_path):
    # The gpt2 checkpoint declares the language model and stores its tensors without the prefix.
    stored = saved(tmp_path, model_of("GPT2LMHeadModel", **GPT2))
    assert base_prefix(tmp_path, {name.removeprefix("transformer.") for name in stored}) == "transformer."


def test_an_image_classifier_answers_as_the_one_it_came_from(tmp_path):
    base = saved(tmp_path / "base", model_of("ViTModel", **VIT))
    task = model_of("ViTForImageClassification", **VIT, num_labels=3).eval()
    stored = saved(tmp_path / "task", task)
    weights = {name: stored.get(f"vit.{name}", tensor) for name, tensor in base.items()}
    head = {name: tensor for name, tensor in stored.items() if name.startswith("classifier")}
    model = build(tmp_path / "base", weights, kind="image-classification", head=head, labels=3)
    images = torch.rand(4, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model(pixel_values=images).logits, task(pixel_values=images).logits)
    assert not model.training


def test_a_text_classifier_answers_as_the_one_it_came_from_and_leaves_its_inputs_alone(tmp_path):
    base = saved(tmp_path / "base", model_of("BertModel", **BERT))
    task = model_of("BertForSequenceClassification", **BERT, num_labels=5).eval()
    stored = saved(tmp_path / "task", task)
    weights = {name: stored[f"bert.{name}"] for name in base}
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    head = {name: tensor.bfloat16() for name, tensor in stored.items() if name.startswith("classifier")}
    model = build(tmp_path / "base", weights, kind="text-classification", head=head, labels=5)
    tokens = torch.randint(0, 40, (3, 7))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, task(tokens).logits, rtol=0.05, atol=0.01)
    assert all(torch.equal(weights[name], copies[name]) for name in copies)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_weights_stored_with_the_prefix_load_too(tmp_path):
    base = saved(tmp_path, model_of("BertModel", **BERT))
    plain = build(tmp_path, base, kind="zero-shot-text").state_dict()
    prefixed = build(tmp_path, {f"bert.{name}": tensor for name, tensor in base.items()}, kind="zero-shot-text")
    assert all(torch.equal(plain[name], tensor) for name, tensor in prefixed.state_dict().items())


def test_an_encoder_without_pooler_is_enough_for_texts(tmp_path):
    stored = saved(tmp_path, model_of("BertForMaskedLM", **BERT))
    model = build(tmp_path, stored, kind="zero-shot-text")
    assert torch.equal(model.embeddings.word_embeddings.weight, stored["bert.embeddings.word_embeddings.weight"])


HEAD = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "head", "message"),
    [
        ({}, {}, "tensor classifier.bias, classifier.weight: parameters stay unset"),
        ({"layernorm.weight": None}, HEAD, "tensor vit.layernorm.weight: parameters stay unset"),
        ({"layernorm.weight": torch.ones(7)}, HEAD, "the tensor has another shape. Expected (32,). Found (7,)"),
        ({}, {**HEAD, "clasifier.bias": torch.zeros(3)}, "tensor clasifier.bias: the head's tensor has no free place"),
        (
            {},
            {**HEAD, "classifier.bias": torch.zeros(4)},
            "the head's tensor has another shape. Expected (3,). Found (4,)",
        ),
    ],
)
def test_what_does_not_make_a_model_is_refused(tmp_path, change, head, message):
    base = saved(tmp_path, model_of("ViTModel", **VIT))
    weights = {name: tensor for name, tensor in {**base, **change}.items() if tensor is not None}
    with pytest.raises(FoldinError) as caught:
        build(tmp_path, weights, kind="image-classification", head=head, labels=3)
    assert caught.value.refusal.code == "E_SCHEMA"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name", ["layernorm.weight", "vit.layernorm.weight", "vit.layers.0.mlp.fc1.bias", "layers.0.mlp.fc1.bias"]
)
def test_a_head_can_never_replace_a_merged_tensor(tmp_path, name):
    base = saved(tmp_path, model_of("ViTModel", **VIT))
    size = 48 if "fc1" in name else 32
    with pytest.raises(FoldinError, match="the head's tensor has no free place"):
        build(tmp_path, base, kind="image-classification", head={**HEAD, name: torch.ones(size)}, labels=3)


def test_a_kind_that_the_architecture_lacks_is_refused(tmp_path):
    base = saved(tmp_path, model_of("BertModel", **BERT))
    with pytest.raises(FoldinError, match=r"no model for image-classification. Found bert"):
        build(tmp_path, base, kind="image-classification")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    saved(tmp_path, model_of("BertModel", **BERT))
    with pytest.raises(FoldinError, match=r"E_CONFIG base .*: the tokenizer is missing. Expected tokenizer.json"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FoldinError, match=r"E_CONFIG base .*: the tokenizer cannot be loaded"):
        tokenizer_of(tmp_path)


def config_folder(folder, file="config.json", **keys):
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    document = {**config, **keys} if file == "config.json" else keys
    (folder / file).write_text(json.dumps(document))
    return folder


def test_a_plain_config_is_accepted(tmp_path):
    keys = {"attn_implementation": "sdpa", "auto_map": None, "use_kernels": False}
    assert check_config(config_folder(tmp_path, **keys), "expert v1") is None


@pytest.mark.parametrize(
    ("keys", "code", "message"),
    [
        ({"auto_map": {"AutoModel": "m.Evil"}}, "E_REMOTE_CODE", "the key 'auto_map' names code to run"),
        ({"text_config": {"x": [{"auto_map": {"a": "b"}}]}}, "E_REMOTE_CODE", "the key 'auto_map' names code to run"),
        (
            {"_attn_implementation": "evil/kernel"},
            "E_REMOTE_CODE",
            "names an implementation that transformers does not",
        ),
        ({"_attn_implementation_internal": "evil/k:f"}, "E_REMOTE_CODE", "Found evil/k:f"),
        ({"attn_implementation": {"text": "evil/k"}}, "E_REMOTE_CODE", "Found evil/k"),
        ({"use_kernels": True}, "E_REMOTE_CODE", "the key 'use_kernels' names code to run"),
        ({"model_type": "brt"}, "E_CONFIG", "the model type is unknown to transformers"),
        ({"model_type": None}, "E_CONFIG", "the model type is unknown to transformers"),
        ({"model_type": ["bert"]}, "E_CONFIG", "the model type is unknown to transformers"),
        ({"architectures": ["BertModle"]}, "E_CONFIG", "Found 'BertModle'. Did you mean 'BertModel'."),
        ({"architectures": ["Trainer"]}, "E_CONFIG", "the architecture is unknown to transformers"),
        ({"architectures": ["ViTModel"]}, "E_CONFIG", "the architecture belongs to another model type"),
        ({"architectures": "BertModel"}, "E_CONFIG", "the architectures are not a list of names"),
    ],
)
def test_a_config_that_may_not_be_used(tmp_path, keys, code, message):
    refusal = check_config(config_folder(tmp_path, **keys), "expert v1")
    assert refusal is not None
    assert refusal.code == code
    assert message in str(refusal)
    assert "expert v1, file config.json" in str(refusal)


def test_other_json_files_need_not_be_objects(tmp_path):
    (config_folder(tmp_path) / "data_config.json").write_text('[{"name": "sentences"}]')  # as all-MiniLM-L6-v2 has
    assert check_config(tmp_path, "expert v1") is None
    (tmp_path / "data_config.json").write_text('[{"auto_map": "m.Evil"}]')
    assert "names code to run" in str(check_config(tmp_path, "expert v1"))


def test_code_beside_the_config_is_refused_and_never_imported(tmp_path):
    folder = config_folder(tmp_path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    refusal = check_config(folder, "expert v1")
    assert refusal is not None
    assert (refusal.code, refusal.file) == ("E_REMOTE_CODE", "tokenizer_config.json")
    (folder / "tokenizer_config.json").unlink()
    (folder / "evil.py").write_text("raise SystemExit")
    refusal = check_config(folder, "expert v1")
    assert refusal is not None
    assert (refusal.code, refusal.file) == ("E_REMOTE_CODE", "evil.py")
    with pytest.raises(FoldinError, match="E_REMOTE_CODE"):
        build(folder, {}, kind="zero-shot-text")
    assert "evil" not in sys.modules


@pytest.mark.parametrize(("text", "message"), [(None, "missing"), ("{", "not valid JSON"), ("[]", "a JSON object")])
def test_a_config_that_cannot_be_read(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    refusal = check_config(tmp_path, "expert v1")
    assert refusal is not None
    assert refusal.code == "E_CONFIG"
    assert message in refusal.what


def test_a_config_whose_values_make_no_model_is_refused(tmp_path):
    with pytest.raises(FoldinError, match=r"E_CONFIG base .*: the configuration cannot be loaded"):
        linear_weights(config_folder(tmp_path, hidden_size="many"))
