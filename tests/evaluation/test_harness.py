"""Tasks of lm-evaluation-harness on a tiny GPT-2: local tasks without network, and what cannot run is not measured."""

import json
import math
import shutil

import pytest
import torch

from evaluation.score import score, score_all
from evaluation.suites import load_suite, write_suite

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # the harness's and its libraries' own
]

# No text ends with a space: the harness counts such a space to the choice.
DOCUMENTS = [{"text": "ab" * (row % 3 + 1), "choices": ["c", "defgh"], "right": row % 2} for row in range(20)]
CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: right
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [" "], max_gen_toks: 3}
metric_list: [{metric: !function share.share, aggregation: mean, higher_is_better: HIGHER}]
"""
SHARE = "def share(references, predictions, **_):\n    return 0.25 if predictions[0] else 0.75\n"


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """As HF_HUB_OFFLINE and HF_DATASETS_OFFLINE set before the start, and a cache that nobody shares."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def suite_in(folder, yaml=CHOICE, task="letters", **more):
    (folder / "own").mkdir(parents=True)
    (folder / "own/letters.yaml").write_text(yaml)
    (folder / "own/again.yaml").write_text(yaml.replace("task: letters", "task: again"))
    (folder / "own/pair.yaml").write_text("group: pair\ntask: [letters, again]\n")
    (folder / "own/share.py").write_text(SHARE)
    (folder / "own/documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    write_suite(folder, kind="lm-eval", task=task, include="own", **more)
    return load_suite(folder, task="letters", where="test", trusted=True)


def by_hand(base, document, normed):
    """The index of the likelier choice, each letter's probability taken alone."""
    found = []
    for choice in document["choices"]:
        tokens = base.tokenizer(document["text"] + choice, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logs = base.model(torch.tensor([tokens])).logits[0].log_softmax(1)
        start = len(document["text"])
        total = sum(float(logs[at - 1, tokens[at]]) for at in range(start, len(tokens)))
        found.append(total / len(choice) if normed else total)
    return found.index(max(found))


@pytest.mark.parametrize("measure", ["", "acc", "acc_norm"])
def test_a_local_task_gives_each_documents_answer(gpt2, tmp_path, measure):
    suite = suite_in(tmp_path / "suite", **({"measure": measure} if measure else {}))
    result = score(gpt2.folder, gpt2.weights, suite)
    wanted = tuple(by_hand(gpt2, each, measure == "acc_norm") == each["right"] for each in DOCUMENTS)
    assert (result.error, result.metric) == ("", "accuracy")
    assert result.correct == wanted
    assert result.value == sum(wanted) / len(wanted)


def test_the_canary_is_the_first_documents(gpt2, tmp_path):
    suite = suite_in(tmp_path / "suite")
    whole = score(gpt2.folder, gpt2.weights, suite)
    few = score(gpt2.folder, gpt2.weights, suite, split="canary", sample=7)
    assert few.correct == whole.correct[:7]
    assert few.split == "canary"


def test_there_is_nothing_to_tune_on(gpt2, tmp_path):
    result = score(gpt2.folder, gpt2.weights, suite_in(tmp_path / "suite"), split="tune")
    assert math.isnan(result.value)
    assert "no rows kept for tuning" in result.error


def test_generated_text_is_scored_by_the_tasks_own_measure(gpt2, tmp_path):
    suite = suite_in(tmp_path / "suite", WRITING.replace("HIGHER", "true"), metric="score")
    result = score(gpt2.folder, gpt2.weights, suite)
    assert (result.error, result.metric, result.correct) == ("", "score", ())
    assert len(result.points) == len(DOCUMENTS)
    assert set(result.points) <= {0.25, 0.75}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"yaml": WRITING.replace("HIGHER", "true")}, 'set "metric": "score"'),
        ({"yaml": WRITING.replace("HIGHER", "false"), "metric": "score"}, "is better when it is smaller"),
        ({"measure": "f2"}, "has no measure f2, only acc, acc_norm"),
        ({"task": "nowhere_to_be_found"}, "lm-evaluation-harness has no task nowhere"),
        ({"task": "arc_easy"}, "lm-evaluation-harness failed with"),  # its documents are on the hub
        ({"task": "pair"}, "pair is several tasks; name one of them"),
    ],
)
def test_what_the_harness_cannot_run_is_not_measured(gpt2, tmp_path, changes, reason):
    result = score(gpt2.folder, gpt2.weights, suite_in(tmp_path / "suite", **changes))
    assert math.isnan(result.value)
    assert reason in result.error


def test_weights_that_give_nan_are_not_measured(gpt2, tmp_path):
    weights = {**gpt2.weights, "h.1.mlp.c_fc.bias": torch.full((128,), math.nan)}
    for name, yaml in (("choice", CHOICE), ("writing", WRITING.replace("HIGHER", "true"))):
        result = score(gpt2.folder, weights, suite_in(tmp_path / name, yaml, metric="score"))
        assert (result.error, result.points) == ("the model's outputs are not finite", ())


def test_a_base_that_is_no_language_model_is_not_measured(zoo, tmp_path):
    suite = suite_in(tmp_path / "suite")
    result = score_all(zoo / "base", {}, {"letters": suite})["letters"]
    assert math.isnan(result.value)
    assert result.error


def test_too_little_time_is_not_measured(gpt2, tmp_path):
    result = score(gpt2.folder, gpt2.weights, suite_in(tmp_path / "suite"), seconds=0.001)
    assert result.error == "timed out after 0.001 s (evaluation_seconds)"


def test_the_identity_covers_the_tasks_own_files_and_its_name(tmp_path):
    before = suite_in(tmp_path / "first").sha256
    assert suite_in(tmp_path / "again").sha256 == before
    assert suite_in(tmp_path / "measure", measure="acc_norm").sha256 != before
    assert suite_in(tmp_path / "other", CHOICE + "num_fewshot: 1\n").sha256 != before
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    (tmp_path / "moved/own/share.py").rename(tmp_path / "moved/own/shared.py")
    assert load_suite(tmp_path / "moved", task="letters", where="test", trusted=True).sha256 != before


def test_nothing_is_printed(gpt2, tmp_path, capfd):
    score(gpt2.folder, gpt2.weights, suite_in(tmp_path / "suite"))
    assert capfd.readouterr() == ("", "")
