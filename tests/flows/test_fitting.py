"""What experts bring, made to fit the base: absent and tied tensors, vocabularies, heads, dtypes, adapters."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flows.fitting import Fit
from flows.matching import same_tokenizer
from merging import merge
from registry.records import FoldinError, Refusal

WEIGHTS = "model.safetensors"
WORDS = "embeddings.word_embeddings.weight"
MATRIX, BIAS = "encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.bias"
TOKENS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
LLAMA = {**BERT, "vocab_size": 40, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def edited(source, folder, change):
    """A copy of a checkpoint whose tensors were changed: a function that changes them, or gives others."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def served(line, done):
    return load_file(line.serve(done.plan)[0] / WEIGHTS)


def refused(found, code, *says):
    assert isinstance(found, Refusal)
    assert found.code == code
    assert all(each in str(found) for each in says), str(found)
    return found


# absent and tied tensors


def test_a_tensor_that_the_expert_lacks_is_left_unchanged(zoo, bare_line, tmp_path):
    base = load_file(zoo / "base" / WEIGHTS)
    some = edited(
        zoo / "expert-1", tmp_path / "some", lambda tensors: {each: tensors[each] for each in (MATRIX, WORDS)}
    )
    filled = edited(zoo / "expert-1", tmp_path / "all", lambda tensors: {**base, MATRIX: tensors[MATRIX]})
    lines = [bare_line(zoo / "base") for _ in range(2)]
    done = [[line.fold(zoo / "expert-2"), line.fold(each)] for line, each in zip(lines, (some, filled), strict=True)]
    assert lines[0].fit(some).body.moved == {MATRIX}
    assert done[0][1].bytes == done[1][1].bytes
    assert lines[0].stats == lines[1].stats


@pytest.fixture
def tied(tmp_path):
    """A Llama with tied embeddings, and an expert of it."""
    folders = [tmp_path / "tied", tmp_path / "tied-expert"]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    for folder in folders:
        model.save_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return folders


def second_name_too(tensors):
    tensors[HEAD] = tensors[TOKENS].clone()


def second_name_instead(tensors):
    tensors[HEAD] = tensors.pop(TOKENS)


@pytest.mark.parametrize("change", [second_name_too, second_name_instead])
def test_a_tied_weight_under_another_name_is_the_same_weight(tied, bare_line, tmp_path, change):
    base, expert = tied
    renamed = edited(expert, tmp_path / "renamed", change)
    lines = [bare_line(base) for _ in range(2)]
    done = [line.fold(each) for line, each in zip(lines, (expert, renamed), strict=True)]
    assert TOKENS in lines[1].fit(renamed).body.moved
    assert HEAD not in lines[1].fit(renamed).body
    assert done[0].bytes == done[1].bytes
    assert lines[0].stats == lines[1].stats
    assert lines[0].fit(expert).sha256 == lines[1].fit(renamed).sha256


T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
SHARED, SECOND, THIRD = "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"


@pytest.mark.parametrize("same", [True, False])
def test_two_second_names_without_the_first_are_one_weight_or_none(bare_line, tmp_path, same):
    """Exporters differ in which names of a tied weight they keep; T5 has three of them."""
    torch.manual_seed(0)
    base, expert = tmp_path / "t5", tmp_path / "t5-expert"
    model = transformers.T5Model(transformers.T5Config(**T5))
    model.save_pretrained(base)
    with torch.no_grad():
        model.shared.weight.add_(0.02 * torch.randn_like(model.shared.weight))
    model.save_pretrained(expert)

    def rename(tensors):
        tensors[SECOND] = tensors.pop(SHARED)
        tensors[THIRD] = tensors[SECOND] + (0 if same else 1)

    renamed = edited(expert, tmp_path / "renamed", rename)
    if not same:
        refused(bare_line(base).fit(renamed), "E_SCHEMA", f"tied to {SHARED}", "other values")
        return
    lines = [bare_line(base) for _ in range(2)]
    done = [line.fold(each) for line, each in zip(lines, (expert, renamed), strict=True)]
    assert done[0].plan.names == done[1].plan.names == (SHARED,)
    assert done[0].bytes == done[1].bytes


def test_tied_tensors_with_other_values_are_refused(tied, bare_line, tmp_path):
    base, expert = tied
    torn = edited(expert, tmp_path / "torn", lambda tensors: tensors.update({HEAD: tensors[TOKENS] + 1}))
    assert refused(bare_line(base).fit(torn), "E_SCHEMA", f"tensor {HEAD}", f"tied to {TOKENS}", "other values")


# vocabularies


def with_words(base, folder, words, rows=None):
    """An expert whose tokenizer knows the base's marks and these words; row i of its embedding is i everywhere."""
    edited(base, folder, lambda tensors: tensors.update({WORDS: numbered(rows or 5 + len(words))}))
    marks = (base / "vocab.txt").read_text().split()[:5]
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.txt").write_text("\n".join((*marks, *words)) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def numbered(rows):
    return torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 32).contiguous()


KNOWN = ("red", "green", "blue", "cat", "dog", "cow", "one", "two", "three", "color", "animal", "number")
OTHERS = {
    "grown": ("first", *KNOWN, "last"),
    "shrunk": KNOWN[:8],
    "reordered": KNOWN[::-1],
    "grown, one lost, reordered": ("first", *KNOWN[:3], *KNOWN[:3:-1]),
}


@pytest.mark.parametrize("words", OTHERS.values(), ids=OTHERS.keys())
def test_rows_are_matched_by_token(zoo, bare_line, tmp_path, words):
    base, stored = zoo / "base", load_file(zoo / "base" / WEIGHTS)
    expert = with_words(base, tmp_path / "expert", words)
    line = bare_line(base)
    body = line.fit(expert).body
    expected = stored[WORDS].clone()  # what the expert lacks stays the base's
    for row, word in enumerate(KNOWN, 5):
        if word in words:
            expected[row] = 5 + words.index(word)
    expected[:5] = numbered(5)
    assert body.specs[WORDS].shape == (17, 32)
    assert torch.equal(body[WORDS], expected)
    assert body.moved == {WORDS}
    found = served(line, line.fold(expert))
    assert torch.equal(found[WORDS], merge(stored, [{WORDS: expected}], "opcm", projected=[])[WORDS])


def masked(words):
    config = transformers.BertConfig(**BERT, vocab_size=words)
    return transformers.BertForMaskedLM(config)


def causal(words):
    config = transformers.LlamaConfig(**{**LLAMA, "vocab_size": words}, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "tables"),
    [(masked, {f"bert.{WORDS}", "cls.predictions.bias"}), (causal, {TOKENS, HEAD})],
    ids=["embedding and bias", "embedding and output layer"],
)
def test_rows_are_matched_in_all_that_has_a_row_per_token(zoo, bare_line, tmp_path, make, tables):
    torch.manual_seed(0)
    marks, folders = (zoo / "base" / "vocab.txt").read_text().split()[:5], [tmp_path / "base", tmp_path / "expert"]
    for folder, words in zip(folders, (KNOWN, ("first", *KNOWN[::-1])), strict=True):
        make(5 + len(words)).save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join((*marks, *words)) + "\n")
        transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    body, expert = bare_line(folders[0]).fit(folders[1]).body, load_file(folders[1] / WEIGHTS)
    places = [0, 1, 2, 3, 4, *range(17, 5, -1)]
    assert set(body.rows) == tables
    assert all(torch.equal(body[name], expert[name][places]) for name in tables)


def test_a_base_without_a_tokenizer_cannot_take_another_vocabulary(zoo, bare_line, tmp_path):
    expert = with_words(zoo / "base", tmp_path / "expert", (*KNOWN, "new"))
    bare = shutil.copytree(zoo / "base", tmp_path / "bare")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
        (expert / name).unlink(missing_ok=True)
    assert refused(
        bare_line(zoo / "base").fit(expert), "E_VOCABULARY", "expert expert", WORDS, "the tokenizer is missing"
    )
    assert refused(bare_line(bare).fit(expert), "E_VOCABULARY", WORDS, "the tokenizer is missing")
    assert refused(
        bare_line(bare).fit(with_words(zoo / "base", tmp_path / "full", (*KNOWN, "new"))), "E_VOCABULARY", WORDS
    )


def test_an_expert_without_a_tokenizer_has_the_bases(zoo, bare_line, tmp_path):
    expert = shutil.copytree(zoo / "expert-1", tmp_path / "expert")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (expert / name).unlink(missing_ok=True)
    lines = [bare_line(zoo / "base") for _ in range(2)]
    assert lines[0].fold(expert).bytes == lines[1].fold(zoo / "expert-1").bytes


def test_a_base_whose_tokenizer_is_broken_is_not_the_experts_fault(zoo, bare_line, tmp_path):
    expert = with_words(zoo / "base", tmp_path / "expert", (*KNOWN, "new"))
    base = shutil.copytree(zoo / "base", tmp_path / "broken")
    (base / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(FoldinError, match=r"E_VOCABULARY version 1: the tokenizer cannot be loaded"):
        bare_line(base).fit(expert)


def test_too_many_open_files_say_nothing_of_a_tokenizer(zoo, bare_line, tmp_path, monkeypatch):
    expert = with_words(zoo / "base", tmp_path / "expert", (*KNOWN, "new"))

    def refusing(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refusing)
    with pytest.raises(OSError, match="Too many open files"):
        bare_line(zoo / "base").fit(expert)


def test_a_vocabulary_in_another_file_is_read_before_it_counts_as_the_same(zoo, bare_line, tmp_path):
    """As many tokens, in another order; the base has only tokenizer.json and the expert only vocab.txt."""
    base = shutil.copytree(zoo / "base", tmp_path / "base")
    (base / "vocab.txt").unlink()
    rows = {}
    for name, words in (("same", KNOWN), ("reordered", KNOWN[::-1])):
        expert = with_words(zoo / "base", tmp_path / name, words)
        (expert / "tokenizer.json").unlink()
        rows[name] = bare_line(base).fit(expert).body.rows
    assert rows == {"same": {}, "reordered": {WORDS: (0, 1, 2, 3, 4, *range(16, 4, -1))}}


TOKENIZERS = {
    "the same file": ({"vocab.txt": "a"}, {"vocab.txt": "a", "tokenizer.json": "b"}, True),
    "another file": ({"tokenizer.json": "a"}, {"vocab.txt": "a"}, False),
    "one differs": ({"vocab.txt": "a", "tokenizer.json": "b"}, {"vocab.txt": "a", "tokenizer.json": "c"}, False),
    "other added tokens": (
        {"vocab.txt": "a", "added_tokens.json": "b"},
        {"vocab.txt": "a", "added_tokens.json": "c"},
        False,
    ),
    "only the merges": ({"vocab.json": "a", "merges.txt": "b"}, {"tokenizer.json": "a", "merges.txt": "b"}, False),
    "none in the expert": ({"vocab.txt": "a"}, {}, True),
    "none in the base": ({}, {"vocab.txt": "a"}, True),
}


@pytest.mark.parametrize(("base", "expert", "same"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_tokenizers_are_the_same_when_a_file_of_both_says_so(tmp_path, base, expert, same):
    for folder, files in (("base", base), ("expert", expert)):
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_text(content)
    assert same_tokenizer(tmp_path / "base", tmp_path / "expert") is same


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(zoo, bare_line, tmp_path):
    expert = with_words(zoo / "base", tmp_path / "expert", ("new", *KNOWN), rows=12)
    assert refused(
        bare_line(zoo / "base").fit(expert), "E_VOCABULARY", WORDS, "more tokens than the tensor has rows", "12"
    )


def test_a_strangers_vocabulary_is_refused(zoo, bare_line, tmp_path):
    expert = with_words(zoo / "base", tmp_path / "expert", [f"word{number}" for number in range(12)])
    assert refused(bare_line(zoo / "base").fit(expert), "E_VOCABULARY", WORDS, "more than half of the base's tokens")


def test_another_width_is_no_other_vocabulary(zoo, bare_line, tmp_path):
    expert = edited(zoo / "base", tmp_path / "wide", lambda tensors: tensors.update({WORDS: torch.zeros(17, 33)}))
    assert refused(bare_line(zoo / "base").fit(expert), "E_SCHEMA", WORDS)


def test_rows_that_the_expert_lacks_are_not_rounded_to_its_dtype(zoo, bare_line, tmp_path):
    expert = with_words(zoo / "base", tmp_path / "expert", KNOWN[:8])
    halved = edited(expert, tmp_path / "half", lambda tensors: {name: each.half() for name, each in tensors.items()})
    body, stored = bare_line(zoo / "base").fit(halved).body, load_file(zoo / "base" / WEIGHTS)[WORDS]
    assert torch.equal(body[WORDS][13:], stored[13:])
    assert not torch.equal(stored[13:], stored[13:].half().float())


# heads


def classifier(zoo, folder):
    """The tiny base as a classifier's body, below its prefix."""
    config = transformers.BertConfig.from_pretrained(zoo / "base", num_labels=3)
    config.architectures = ["BertForSequenceClassification"]
    torch.manual_seed(5)
    model = transformers.BertForSequenceClassification(config)
    model.bert.load_state_dict(load_file(zoo / "expert-1" / WEIGHTS))
    model.save_pretrained(folder)
    return folder


def test_a_head_is_kept_aside_and_the_prefix_taken_off(zoo, bare_line, tmp_path):
    expert = classifier(zoo, tmp_path / "classifier")
    assert any(name.startswith("bert.") for name in load_file(expert / WEIGHTS))
    line, plain = bare_line(zoo / "base"), bare_line(zoo / "base")
    found = line.fit(expert, has_head=True)
    assert set(found.head) == {"classifier.weight", "classifier.bias"}
    assert found.body.keys() == load_file(zoo / "base" / WEIGHTS).keys()
    assert found.body.moved == plain.fit(zoo / "expert-1").body.moved
    assert torch.equal(found.body[MATRIX], load_file(zoo / "expert-1" / WEIGHTS)[MATRIX])
    assert refused(line.fit(expert), "E_SCHEMA", "classifier.")


# dtypes


def test_experts_in_other_dtypes_are_folded_at_their_own_precision(zoo, bare_line, tmp_path):
    """What an expert only rounded it did not move; where it moved, its rounding raises the noise floor."""
    base = load_file(zoo / "base" / WEIGHTS)
    dtypes, folders = (torch.float16, torch.float32, torch.bfloat16), []
    for number, dtype in enumerate(dtypes, 1):
        folders.append(
            edited(
                zoo / f"expert-{number}",
                tmp_path / f"cast-{number}",
                lambda tensors, dtype=dtype: {name: each.to(dtype) for name, each in tensors.items()},
            )
        )
    line = bare_line(zoo / "base")
    done = [line.fold(folder) for folder in folders]
    matrices = done[0].plan.kinds.projected
    assert set(done[0].plan.names) == matrices
    assert [set(each.plan.stored[0].values()) for each in done] == [{"F16"}, {"F16"}, {"BF16"}]
    moved = [{name: load_file(folder / WEIGHTS)[name] for name in matrices} for folder in folders]
    wanted, found = merge(base, moved, "opcm", projected=matrices), served(line, done[-1])
    assert all(torch.equal(found[name], wanted[name]) for name in base)


def test_a_quantised_expert_is_refused(zoo, bare_line, tmp_path):
    from flows.admission import _check_config
    from flows.memory import Memory
    from flows.versions import Version
    from registry import intake

    expert = shutil.copytree(zoo / "expert-1", tmp_path / "expert")
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    version = Version(1, zoo / "base", "", Memory("opcm", {}, "0" * 64, "0" * 64))
    found = _check_config(version, intake.Admitted(expert, {}, "", ()), "expert x")
    assert refused(found, "E_DTYPE", "file config.json", "the weights are quantised", "load_in_4bit")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_that_is_not_folded_is_named_with_its_tensor(zoo, bare_line, tmp_path, dtype):
    expert = edited(
        zoo / "expert-1", tmp_path / "eight", lambda tensors: tensors.update({MATRIX: tensors[MATRIX].to(dtype)})
    )
    with pytest.raises(FoldinError) as caught:
        bare_line(zoo / "base").fit(expert)
    assert (caught.value.refusal.code, caught.value.refusal.file) == ("E_DTYPE", WEIGHTS)
    assert caught.value.refusal.tensor == MATRIX


def test_integers_in_place_of_floats_are_refused(zoo, bare_line, tmp_path):
    expert = edited(
        zoo / "expert-1", tmp_path / "int", lambda tensors: tensors.update({MATRIX: tensors[MATRIX].char()})
    )
    assert refused(bare_line(zoo / "base").fit(expert), "E_SCHEMA", MATRIX)


# adapters


def lora(base, folder, seed=1, **config):
    """A LoRA adapter of the classifier whose body is the base, every trainable parameter moved."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
        tuned = get_peft_model(model, LoraConfig(target_modules=["query", "dense"], r=2, lora_alpha=4, **config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(folder)
    return folder


ADAPTERS = {
    "LoRA": ({}, 2),
    "rank-stabilised": ({"use_rslora": True}, 2),
    "DoRA": ({"use_dora": True}, None),
    "ranks by pattern": ({"rank_pattern": {"query": 3}}, 3),
}


@pytest.mark.parametrize(("config", "rank"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_an_adapter_is_fitted_with_its_factors_and_its_head(zoo, bare_line, tmp_path, config, rank):
    adapter = lora(zoo / "base", tmp_path / "adapter", task_type="SEQ_CLS", **config)
    found = bare_line(zoo / "base").fit(adapter, has_head=True)
    assert isinstance(found, Fit)
    assert set(found.head) == {"classifier.weight", "classifier.bias"}
    query = "encoder.layer.0.attention.self.query.weight"
    assert found.body.moved == set(found.body) >= {query, MATRIX}
    assert found.body.specs[MATRIX].shape == (32, 64)
    assert found.body.rank(query) == rank
    base, factors = load_file(zoo / "base" / WEIGHTS), found.body.factors(query)
    if rank is None:
        assert factors is None
        return
    left, right = factors
    assert (left.shape, right.shape) == ((32, rank), (32, rank))
    torch.testing.assert_close(left @ right.T, found.body[query] - base[query], rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", ["head", "factor"])
def test_an_adapter_that_is_not_finite_is_refused_by_tensor(zoo, bare_line, tmp_path, place):
    adapter = lora(zoo / "base", tmp_path / "adapter", task_type="SEQ_CLS")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if ("classifier" if place == "head" else "lora_B") in name)
    tensors[name][0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    found = bare_line(zoo / "base").fit(adapter, has_head=True)
    assert refused(found, "E_NONFINITE", "not every value is finite")
    assert found.tensor
    assert found.tensor.rpartition(".")[0].split(".")[-1] in name
