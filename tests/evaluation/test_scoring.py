"""Scoring on tiny models: the answers are the model's, whatever the batches, and what cannot be measured is NaN."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from evaluation.score import anchors, score, score_all
from evaluation.suites import load_suite, read_examples, write_suite
from registry.records import FoldinError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "red",
    "green",
    "blue",
    "apple",
    "leaf",
    "sky",
    "rose",
    "grass",
    "sea",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXTS = ["red apple", "leaf", "blue sky sea sky sea", "rose rose", "green grass green", "sea", "unknown word", ""]


@pytest.fixture(scope="module")
def text_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SIZES)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return base_in(folder, transformers.BertModel(config), tokenizer)


@pytest.fixture(scope="module")
def image_base(tmp_path_factory):
    torch.manual_seed(2)
    config = transformers.ViTConfig(**SIZES, image_size=4, patch_size=2, num_channels=1)
    return base_in(tmp_path_factory.mktemp("vit"), transformers.ViTModel(config), None)


def base_in(folder, model, tokenizer):
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    weights = load_file(folder / "model.safetensors")
    return SimpleNamespace(folder=folder, weights=weights, model=model.eval(), tokenizer=tokenizer)


@pytest.fixture
def colours(tmp_path):
    rows = [(text, row % 3, "gate") for row, text in enumerate(TEXTS)] + [("sky", 2, "tune")]
    labels = ["red", "green", "blue"]
    write_suite(tmp_path / "colours", kind="zero-shot-text", labels=labels, prompts=labels, rows=rows)
    return load_suite(tmp_path / "colours", task="colours", where="test")


@pytest.fixture
def kinds(tmp_path):
    rows = [(text, row % 2, "gate") for row, text in enumerate(TEXTS[:6])]
    write_suite(tmp_path / "kinds", kind="text-classification", labels=["a", "b"], rows=rows)
    return load_suite(tmp_path / "kinds", task="kinds", where="test")


@pytest.fixture
def squares(tmp_path):
    images = torch.rand(5, 16, generator=torch.Generator().manual_seed(3)).tolist()
    rows = [(image, row % 2, "gate") for row, image in enumerate(images)]
    write_suite(tmp_path / "squares", kind="image-classification", labels=["a", "b"], rows=rows, image_shape=(1, 4, 4))
    return load_suite(tmp_path / "squares", task="squares", where="test")


def head(outputs, seed=4):
    weight = torch.randn(outputs, 32, generator=torch.Generator().manual_seed(seed))
    return {"classifier.weight": weight, "classifier.bias": torch.zeros(outputs)}


def embedded_one_by_one(base, texts):
    """The oracle: each text alone, no padding, the plain mean of its tokens."""
    with torch.inference_mode():
        rows = [
            base.model(**base.tokenizer(text, return_tensors="pt", truncation=True, max_length=16)).last_hidden_state[0]
            for text in texts
        ]
    return torch.stack([torch.nn.functional.normalize(row.mean(0), dim=0) for row in rows])


def test_anchors_are_unit_vectors_of_the_mean_token(text_base, colours):
    rows = anchors(text_base.folder, text_base.weights, colours)
    assert rows.shape == (3, 32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(rows, embedded_one_by_one(text_base, colours.prompts))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_texts_answer_with_the_nearest_anchor(text_base, colours, batch_size):
    rows = anchors(text_base.folder, text_base.weights, colours)
    result = score(text_base.folder, text_base.weights, colours, anchors=rows, batch_size=batch_size)
    expected = (embedded_one_by_one(text_base, TEXTS) @ rows.T).argmax(1).tolist()
    assert list(result.predictions) == expected
    labels = read_examples(colours).labels
    assert list(result.correct) == [guess == label for guess, label in zip(expected, labels, strict=True)]
    assert result.value == sum(result.correct) / len(TEXTS)
    assert (result.task, result.suite_sha256, result.error) == ("colours", colours.sha256, "")


def test_a_prompt_is_its_own_nearest_anchor(text_base, tmp_path):
    labels = ["red apple", "green leaf", "blue sky"]
    rows = [(label, row, "gate") for row, label in enumerate(labels)]
    write_suite(tmp_path, kind="zero-shot-text", labels=labels, prompts=labels, rows=rows)
    suite = load_suite(tmp_path, task="t", where="test")
    rows = anchors(text_base.folder, text_base.weights, suite)
    assert score(text_base.folder, text_base.weights, suite, anchors=rows).value == 1.0


def test_long_texts_are_cut_to_what_the_model_can_read(text_base, tmp_path):
    rows = [("sea " * 500, 0, "gate"), ("sea " * 14, 1, "gate")]  # 16 positions: two marks and 14 words
    write_suite(tmp_path, kind="zero-shot-text", labels=["a", "b"], prompts=["red", "sea"], rows=rows)
    suite = load_suite(tmp_path, task="t", where="test")
    result = score(text_base.folder, text_base.weights, suite, anchors=torch.randn(2, 32))
    assert result.predictions[0] == result.predictions[1]


def test_images_are_scored_in_their_shape(image_base, squares):
    own = head(2)
    result = score(image_base.folder, image_base.weights, squares, head=own, batch_size=2)
    images = torch.tensor(read_examples(squares).inputs).view(-1, 1, 4, 4)
    with torch.inference_mode():
        state = image_base.model(pixel_values=images).last_hidden_state[:, 0]
    assert list(result.predictions) == (state @ own["classifier.weight"].T).argmax(1).tolist()


def test_text_classification_uses_the_head(text_base, kinds):
    first, second = ({**head(2), "classifier.bias": torch.tensor(bias)} for bias in ([99.0, 0.0], [0.0, 99.0]))
    assert score(text_base.folder, text_base.weights, kinds, head=first).predictions == (0,) * 6
    assert score(text_base.folder, text_base.weights, kinds, head=second).predictions == (1,) * 6


def test_weights_that_give_nan_are_not_measured(text_base, colours):
    weights = {**text_base.weights, "encoder.layer.1.output.dense.bias": torch.full((32,), math.nan)}
    result = score(text_base.folder, weights, colours, anchors=torch.randn(3, 32))
    assert math.isnan(result.value)
    assert (result.predictions, result.correct) == ((), ())
    assert result.error == "the model's outputs are not finite"


@pytest.mark.parametrize("kind", ["kinds", "squares"])
def test_weights_that_give_nan_are_not_measured_with_a_head_either(text_base, image_base, request, kind):
    base = text_base if kind == "kinds" else image_base
    own = {**head(2), "classifier.bias": torch.tensor([0.0, math.nan])}
    result = score(base.folder, base.weights, request.getfixturevalue(kind), head=own)
    assert math.isnan(result.value)
    assert (result.error, result.predictions) == ("the model's outputs are not finite", ())


@pytest.fixture
def many(tmp_path):
    words = WORDS[5:]
    texts = [" ".join((first, second, third)) for first in words for second in words for third in words[:3]]
    rows = [(text, row % 3, "tune" if row % 5 == 0 else "gate") for row, text in enumerate(texts)]
    labels = ["red", "green", "blue"]
    write_suite(tmp_path / "many", kind="zero-shot-text", labels=labels, prompts=labels, rows=rows, safety=True)
    return load_suite(tmp_path / "many", task="many", where="test", trusted=True)


def test_each_split_has_its_own_rows(text_base, many):
    rows = anchors(text_base.folder, text_base.weights, many)

    def found(split, sample=20):
        return score(text_base.folder, text_base.weights, many, anchors=rows, split=split, sample=sample)

    gate, tune, canary = (found(split) for split in ("gate", "tune", "canary"))
    assert (gate.split, tune.split, canary.split) == ("gate", "tune", "canary")
    assert (gate.examples, tune.examples, canary.examples) == (194, 49, 20)
    answers = dict(zip(read_examples(many).inputs, gate.predictions, strict=True))
    assert canary.predictions == tuple(answers[text] for text in read_examples(many, "canary", 20).inputs)
    assert replace(found("canary", 1000), split="gate") == gate
    assert gate.safety
    assert gate.seconds > 0


def test_batches_change_no_answer(text_base, many):
    rows = anchors(text_base.folder, text_base.weights, many)
    answers = {
        score(text_base.folder, text_base.weights, many, anchors=rows, batch_size=size).predictions
        for size in (1, 7, 64, 1000)
    }
    assert len(answers) == 1


def test_what_takes_longer_than_its_budget_is_not_measured(text_base, many, colours):
    rows = anchors(text_base.folder, text_base.weights, many)
    suites = {"many": many, "colours": colours}
    scores = score_all(text_base.folder, text_base.weights, suites, anchors=dict.fromkeys(suites, rows), seconds=1e-6)
    for task, result in scores.items():
        assert math.isnan(result.value)
        assert (result.task, result.error, result.predictions) == (
            task,
            "timed out after 1e-06 s (evaluation_seconds)",
            (),
        )
        assert result.safety == suites[task].safety
    done = []
    with pytest.MonkeyPatch.context() as patch:  # the time is over after the second batch
        patch.setattr("evaluation.clock.time.monotonic", lambda: float(len(done)))
        count = lambda *found: done.append(found)  # noqa: E731
        result = score(
            text_base.folder, text_base.weights, many, anchors=rows, batch_size=10, seconds=2.0, progress=count
        )
    assert [first for first, _ in done] == [10, 20]
    assert result.error == "timed out after 2 s (evaluation_seconds)"


def test_an_unmeasured_score_says_of_which_rows(text_base, colours):
    result = score_all(text_base.folder, text_base.weights, {"colours": colours}, split="canary")["colours"]
    assert "the anchors are missing" in result.error
    assert (result.split, result.metric) == ("canary", "accuracy")


def test_all_tasks_at_once_give_what_each_gives_alone(text_base, colours, kinds):
    rows, own = anchors(text_base.folder, text_base.weights, colours), head(2)
    seen = []
    together = score_all(
        text_base.folder,
        text_base.weights,
        {"colours": colours, "kinds": kinds},
        anchors={"colours": rows},
        heads={"kinds": own},
        progress=lambda done, count: seen.append((done, count)),
    )
    assert together["colours"] == score(text_base.folder, text_base.weights, colours, anchors=rows)
    assert together["kinds"] == score(text_base.folder, text_base.weights, kinds, head=own)
    assert seen == [(1, 2), (2, 2)]


def test_a_task_that_cannot_be_measured_does_not_stop_the_others(text_base, colours, kinds, squares):
    gone = replace(colours, task="gone", data=colours.data.with_name("gone.parquet"))
    suites = {"colours": colours, "gone": gone, "kinds": kinds, "squares": squares, "unanchored": colours}
    rows = anchors(text_base.folder, text_base.weights, colours)
    result = score_all(text_base.folder, text_base.weights, suites, anchors={"colours": rows, "gone": rows})
    assert result["colours"].error == ""
    assert "the data cannot be read as Parquet" in result["gone"].error
    assert "parameters stay unset" in result["kinds"].error
    assert "no model for image-classification" in result["squares"].error
    assert "the anchors are missing" in result["unanchored"].error
    assert all(math.isnan(result[task].value) for task in suites if task != "colours")


def test_anchors_of_another_suite_are_refused(text_base, colours):
    with pytest.raises(FoldinError, match=r"suite of task colours: the anchors do not fit. Expected \(3, dim\)"):
        score(text_base.folder, text_base.weights, colours, anchors=torch.randn(4, 32))


def test_only_zero_shot_suites_have_anchors(text_base, kinds):
    with pytest.raises(FoldinError, match="only zero-shot-text has anchors"):
        anchors(text_base.folder, text_base.weights, kinds)


def test_progress_counts_examples(text_base, colours):
    seen = []
    rows = anchors(text_base.folder, text_base.weights, colours)
    score(
        text_base.folder,
        text_base.weights,
        colours,
        anchors=rows,
        batch_size=3,
        progress=lambda done, count: seen.append((done, count)),
    )
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_nothing_is_printed(text_base, colours, capfd):
    anchors(text_base.folder, text_base.weights, colours)
    assert capfd.readouterr() == ("", "")
