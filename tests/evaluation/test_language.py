"""Perplexity and multiple choice on a tiny GPT-2, against likelihoods worked out token by token."""

import math
import random

import pytest
import torch
import transformers

from evaluation.models import build
from evaluation.score import score, score_all
from evaluation.suites import load_suite, write_suite
from registry.records import FoldinError

TEXTS = ["the cat sat on the mat and looked at the door for a long while", "a dog", "x", "once upon a time", "why not"]
QUESTIONS = [
    (("the cat ", ("sat", "ran off", "is")), 0),
    (("a dog", (" barks", " b")), 1),
    (("", ("yes", "no")), 0),
    (("far too long a context for sixteen tokens, ", ("end", "so")), 1),
]


@pytest.fixture
def texts(tmp_path):
    write_suite(tmp_path / "texts", kind="causal-lm", metric="perplexity", rows=[(text, "gate") for text in TEXTS])
    return load_suite(tmp_path / "texts", task="texts", where="test")


@pytest.fixture
def questions(tmp_path):
    return questions_in(tmp_path / "questions")


def questions_in(folder, **more):
    rows = [(question, label, "gate") for question, label in QUESTIONS]
    write_suite(folder, kind="causal-lm", metric="accuracy", rows=rows, **more)
    return load_suite(folder, task="questions", where="test")


def log_likelihood(base, tokens, predicted):
    """The oracle: the model alone with the tokens before each, one token at a time."""
    total = 0.0
    for at in range(len(tokens) - predicted, len(tokens)):
        with torch.inference_mode():
            logits = base.model(torch.tensor([tokens[:at]])).logits[0, -1].double()
        total += float(logits.log_softmax(0)[tokens[at]])
    return total


def ids(base, text):
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


def text_by_hand(base, text, context=16):
    """(log-likelihood, predicted tokens) of a text, window by window."""
    tokens, total = [0, *ids(base, text)], 0.0
    for start in range(0, len(tokens) - 1, context - 1):
        piece = tokens[start : start + context]
        total += log_likelihood(base, piece, len(piece) - 1)
    return total, len(tokens) - 1


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_perplexity_is_that_of_the_tokens_one_by_one(gpt2, texts, batch_size):
    result = score(gpt2.folder, gpt2.weights, texts, batch_size=batch_size)
    wanted = [text_by_hand(gpt2, text) for text in TEXTS]
    assert (result.error, result.metric, result.predictions, result.correct) == ("", "perplexity", (), ())
    assert result.weights == tuple(count for _, count in wanted)
    assert result.points == pytest.approx([total / count for total, count in wanted], abs=1e-4)
    mean = sum(total for total, _ in wanted) / sum(count for _, count in wanted)
    assert result.value == pytest.approx(math.exp(-mean), rel=1e-4)
    assert max(result.points) <= 0


def test_without_a_bos_token_the_first_token_is_read_and_not_predicted(language_base, tmp_path, texts):
    base = language_base(tmp_path / "base", bos=None)
    result = score(base.folder, base.weights, texts)
    assert "example 2 has no token that could be predicted" in result.error  # "x"
    write_suite(tmp_path / "two", kind="causal-lm", metric="perplexity", rows=[("ab", "gate")])
    result = score(base.folder, base.weights, load_suite(tmp_path / "two", task="two", where="test"))
    assert result.weights == (1.0,)
    assert result.points[0] == pytest.approx(log_likelihood(base, ids(base, "ab"), 1), abs=1e-4)


def choice_by_hand(base, text, choice, context=16):
    return log_likelihood(base, [0, *ids(base, text + choice)][-context:], len(ids(base, choice)))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("per_byte", [False, True])
def test_the_likeliest_choice_is_the_answer(gpt2, tmp_path, batch_size, per_byte):
    suite = questions_in(tmp_path, per_byte=True) if per_byte else questions_in(tmp_path)
    result = score(gpt2.folder, gpt2.weights, suite, batch_size=batch_size)
    wanted = []
    for (text, choices), _ in QUESTIONS:
        scores = [choice_by_hand(gpt2, text, each) / (len(each.encode()) if per_byte else 1) for each in choices]
        wanted.append(scores.index(max(scores)))
    assert list(result.predictions) == wanted
    assert list(result.correct) == [guess == label for guess, (_, label) in zip(wanted, QUESTIONS, strict=True)]
    assert (result.metric, result.value) == ("accuracy", sum(result.correct) / len(QUESTIONS))


def test_batches_change_no_answer(gpt2, tmp_path):
    draw = random.Random(3)
    word = lambda most: "".join(draw.choices("abcdefgh ", k=draw.randint(1, most)))  # noqa: E731
    rows = [((f"{number} {word(20)}", (f"a{word(6)}", f"b{word(6)}")), number % 2, "gate") for number in range(150)]
    write_suite(tmp_path, kind="causal-lm", metric="accuracy", rows=rows)
    suite = load_suite(tmp_path, task="t", where="test")
    answers = {score(gpt2.folder, gpt2.weights, suite, batch_size=size).predictions for size in (1, 7, 64)}
    assert len(answers) == 1
    assert set(answers.pop()) == {0, 1}


def test_a_choice_that_fills_the_context_cannot_be_measured(gpt2, tmp_path):
    rows = [(("a ", ("b" * 16, "c")), 0, "gate")]
    write_suite(tmp_path, kind="causal-lm", metric="accuracy", rows=rows)
    result = score(gpt2.folder, gpt2.weights, load_suite(tmp_path, task="t", where="test"))
    assert math.isnan(result.value)
    assert "example 0 has a choice that cannot be predicted" in result.error


def test_without_bos_a_choice_after_nothing_cannot_be_measured(language_base, tmp_path, questions):
    base = language_base(tmp_path / "base", bos=None)
    assert "example 2 has a choice that cannot be predicted" in score(base.folder, base.weights, questions).error


def test_a_tied_output_needs_no_tensor_of_its_own(gpt2):
    assert not [name for name in gpt2.weights if "lm_head" in name]
    model = build(gpt2.folder, gpt2.weights, kind="causal-lm")
    tokens = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, gpt2.model(tokens).logits)


def test_an_output_that_is_missing_is_not_made_up(language_base, tmp_path, texts):
    base = language_base(tmp_path / "base", bare=True, tied=False)
    with pytest.raises(FoldinError, match=r"tensor lm_head.weight: parameters stay unset"):
        score(base.folder, base.weights, texts)
    assert "parameters stay unset" in score_all(base.folder, base.weights, {"texts": texts})["texts"].error


def test_an_output_of_its_own_is_used(language_base, tmp_path, texts):
    base = language_base(tmp_path / "base", bare=False, tied=False)
    assert score(base.folder, base.weights, texts).points == pytest.approx(
        [total / count for total, count in (text_by_hand(base, text) for text in TEXTS)], abs=1e-4
    )


def test_an_encoder_that_sees_what_it_is_to_predict_is_refused(zoo, tmp_path, texts):
    config = transformers.AutoConfig.from_pretrained(zoo / "base")
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "base")
    transformers.BertTokenizerFast.from_pretrained(zoo / "base").save_pretrained(tmp_path / "base")
    transformers.utils.logging.enable_progress_bar()
    with pytest.raises(FoldinError, match="the base sees the tokens that it is to predict"):
        score(tmp_path / "base", model.state_dict(), texts)


def test_weights_that_give_nan_are_not_measured(gpt2, texts, questions):
    weights = {**gpt2.weights, "h.1.mlp.c_fc.bias": torch.full((128,), math.nan)}
    for result in score_all(gpt2.folder, weights, {"texts": texts, "questions": questions}).values():
        assert math.isnan(result.value)
        assert (result.error, result.points, result.predictions) == ("the model's outputs are not finite", (), ())


def test_progress_ends_at_all(gpt2, texts):
    seen = []
    score(gpt2.folder, gpt2.weights, texts, batch_size=2, progress=lambda done, count: seen.append((done, count)))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
