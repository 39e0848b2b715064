"""What suites of each kind may say, which of them experts may bring, and which rows each split has."""

import hashlib
import json
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import tables
from evaluation.kinds import KINDS
from evaluation.suites import Question, input_digests, load_suite, read_examples, write_suite
from registry.records import FoldinError

WHERE = "expert demo v3"
TEXTS = [("Paris", "gate"), ("Tokyo", "gate"), ("Lyon", "tune")]
QUESTIONS = [(("2 + 2 = ", ("4", "5")), 0, "gate"), (("2 + 3 = ", ("4", "5", "6")), 1, "tune")]
PLACES = [("Paris", 0, "gate"), ("Tokyo", 1, "gate"), ("Lyon", 0, "tune")]
IMAGE = {"kind": "image-classification", "labels": ["a", "b"], "image_shape": (1, 1, 2)}


def labelled(folder, rows=PLACES, **more):
    write_suite(folder, kind="text-classification", labels=["Europe", "Asia"], rows=rows, **more)
    return folder


def language(folder, metric="perplexity", rows=TEXTS, **more):
    write_suite(folder, kind="causal-lm", metric=metric, rows=rows, **more)
    return folder


def function(folder, rows=(), **more):
    write_suite(folder, kind="python", function="package.module:judge", rows=rows, **more)
    return folder


def edit(folder, **changes):
    path = folder / "suite.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "REMOVED"}))
    return folder


def loaded(folder, trusted=True):
    return load_suite(folder, task="t", where=WHERE, trusted=trusted)


def problem(folder, trusted=True):
    with pytest.raises(FoldinError) as caught:
        loaded(folder, trusted)
    assert caught.value.refusal.code == "E_SUITE"
    assert WHERE in str(caught.value)
    return str(caught.value)


def test_suites_of_language_come_back_as_written(tmp_path):
    texts = loaded(language(tmp_path / "texts"), trusted=False)
    assert (texts.kind, texts.metric, texts.labels, texts.safety) == ("causal-lm", "perplexity", (), False)
    assert read_examples(texts) == (["Paris", "Tokyo"], [])
    questions = loaded(language(tmp_path / "questions", "accuracy", QUESTIONS, per_byte=True, safety=True))
    assert (questions.metric, questions.per_byte, questions.safety) == ("accuracy", True, True)
    assert read_examples(questions) == ([Question("2 + 2 = ", ("4", "5"))], [0])
    assert read_examples(questions, "tune") == ([Question("2 + 3 = ", ("4", "5", "6"))], [1])


def test_a_function_may_have_rows_or_none(tmp_path):
    bare = loaded(function(tmp_path / "bare"))
    assert (bare.kind, bare.metric, bare.function, bare.data) == ("python", "score", "package.module:judge", None)
    assert read_examples(bare) == ([], [])
    rows = [{"a": 1, "b": None, "split": "gate"}, {"a": 2, "b": [0.5], "split": "tune"}]
    assert read_examples(loaded(function(tmp_path / "rows", rows)), "tune").inputs == [rows[1]]


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.trusted])
def test_an_expert_may_not_name_code(tmp_path, kind):
    folder = function(tmp_path)
    keys = {"function": "REMOVED", "metric": "accuracy", "task": "arc_easy"} if kind == "lm-eval" else {}
    edit(folder, kind=kind, **keys)
    assert f"the kind {kind} runs code, and an expert may not bring code" in problem(folder, trusted=False)
    assert "[suites]" in problem(folder, trusted=False)


def test_a_harness_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "suite.json").write_text('{"kind": "lm-eval", "task": "arc_easy"}')
    monkeypatch.setattr("evaluation.suites.find_spec", lambda name: None)
    assert "Install foldin[lm-eval]" in problem(tmp_path)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_harness_task_is_read_without_importing_the_harness(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/task.yaml").write_text("task: mine\n")
    write_suite(tmp_path, kind="lm-eval", task="mine", include="own", measure="acc", metric="score")
    suite = loaded(tmp_path)
    assert (suite.harness_task, suite.measure, suite.metric, suite.data) == ("mine", "acc", "score", None)
    assert suite.include == (tmp_path / "own").resolve()
    assert "the folder to include is missing or empty" in problem(edit(tmp_path, include="gone"))
    assert "include leaves the suite's folder" in problem(edit(tmp_path, include=".."))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (language, {"metric": "REMOVED"}, "the key 'metric' is missing"),
        (language, {"metric": "score"}, "the metric is unknown. Expected one of perplexity, accuracy"),
        (language, {"labels": ["a", "b"]}, "the key 'labels' does not belong to kind causal-lm"),
        (language, {"per_byte": True}, "per_byte belongs to the metric accuracy"),
        (language, {"per_byte": 1}, "per_byte is neither true nor false"),
        (language, {"safety": "yes"}, "safety is neither true nor false"),
        (language, {"metric": "accuracy"}, "the column 'choices' does not fit"),
        (labelled, {"per_byte": True}, "the key 'per_byte' does not belong to kind text-classification"),
        (labelled, {"function": "a:b"}, "the key 'function' does not belong to kind text-classification"),
        (function, {"function": "judge"}, "function does not name a function"),
        (function, {"function": "a.b:c d"}, "function does not name a function"),
        (function, {"function": ""}, "function is not a name"),
        (function, {"data_sha256": "0"}, "data is not a path"),
        (function, {"metric": "accuracy"}, "the metric is unknown. Expected one of score"),
    ],
)
def test_what_suite_json_may_not_say(tmp_path, make, changes, message):
    assert message in problem(edit(make(tmp_path), **changes))


@pytest.mark.parametrize(
    ("choices", "label", "message"),
    [
        (("4",), 0, "the choices do not fit"),
        (("4", ""), 0, "the choices do not fit"),
        (("4", "4"), 0, "the choices do not fit"),
        (("4", None), 0, "the choices do not fit"),
        (("4", "5"), 2, "a label index is out of range. Expected 0 to 1. Found 2 in row 0"),
    ],
)
def test_what_a_question_may_not_be(tmp_path, choices, label, message):
    with pytest.raises(FoldinError, match="E_SUITE") as caught:
        language(tmp_path, "accuracy", [(("2 + 2 = ", choices), label, "gate")])
    assert message in str(caught.value)


def test_the_identity_of_a_suite_without_new_keys_is_as_before(tmp_path):
    folder = labelled(tmp_path)
    document = json.loads((folder / "suite.json").read_text())
    assert list(document) == ["kind", "data", "data_sha256", "labels", "prompts", "metric", "image_shape"]
    del document["data"]
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert loaded(folder).sha256 == hashlib.sha256(canonical.encode()).hexdigest()
    assert loaded(edit(folder, safety=False)).sha256 == loaded(labelled(tmp_path / "b")).sha256


def test_an_expert_may_not_make_its_own_suite_a_hard_rule(tmp_path):
    language(tmp_path, safety=True)
    assert loaded(tmp_path).safety
    assert "an expert may not make its own suite a hard rule" in problem(tmp_path, trusted=False)


def test_a_small_file_of_one_text_many_times_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "UNPACKED_BYTES", 2**20)
    with pytest.raises(FoldinError, match="the data is too large"):
        language(tmp_path, rows=[("y" * 2**14, "gate")] * 80)
    assert (tmp_path / "examples.parquet").stat().st_size < 2**14


def test_the_order_of_choices_does_not_hide_that_two_questions_are_one(tmp_path):
    with pytest.raises(FoldinError, match="the same input is in both splits"):
        language(tmp_path, "accuracy", [(("2 + 2 =", ("4", "5")), 0, "gate"), (("2 + 2 =", ("5", "4")), 1, "tune")])


def test_the_identity_covers_every_key_that_changes_a_score(tmp_path):
    variants = [
        language(tmp_path / "1"),
        language(tmp_path / "2", safety=True),
        language(tmp_path / "3", "accuracy", QUESTIONS),
        language(tmp_path / "4", "accuracy", QUESTIONS, per_byte=True),
        language(tmp_path / "5", rows=[*TEXTS, ("Rome", "gate")]),
        function(tmp_path / "6"),
        edit(function(tmp_path / "7"), function="package.module:other"),
        function(tmp_path / "8", [{"a": 1, "split": "gate"}]),
    ]
    assert len({loaded(folder).sha256 for folder in variants}) == len(variants)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ({"kind": "text-classification", "labels": ["a", "b"]}, ("Paris", 0), ("Paris", 1)),
        ({"kind": "causal-lm", "metric": "perplexity"}, ("Paris",), ("Paris",)),
        ({"kind": "causal-lm", "metric": "accuracy"}, (("2 + 2 = ", ("4", "5")), 0), (("2 + 2 = ", ("4", "5")), 1)),
        (IMAGE, ([0.0, 0.5], 0), ([-0.0, 0.5], 1)),
    ],
    ids=["text", "perplexity", "choice", "image"],
)
def test_an_input_may_not_be_in_both_splits(tmp_path, kind, first, second):
    rows = [(*first, "gate"), (*first, "gate"), (*second, "tune")]
    with pytest.raises(FoldinError, match="the same input is in both splits") as caught:
        write_suite(tmp_path, **kind, rows=rows)
    assert caught.value.refusal.found == "rows 0 (gate) and 2 (tune)"


def test_rows_of_a_function_are_told_apart_without_their_label(tmp_path):
    rows = [{"text": "one", "label": label, "split": split} for label, split in ((0, "gate"), (1, "tune"))]
    with pytest.raises(FoldinError, match=r"rows 0 \(gate\) and 1 \(tune\)"):
        function(tmp_path, rows)
    function(tmp_path, [{**row, "text": row["split"]} for row in rows])


def test_the_first_of_many_shared_inputs_are_named(tmp_path):
    rows = [(f"text {row}", split) for split in ("gate", "tune") for row in range(5)]
    with pytest.raises(FoldinError, match=r"rows 0 \(gate\) and 5 \(tune\), rows 1 .* and 2 more"):
        language(tmp_path, rows=rows)


def test_equal_inputs_have_equal_digests_across_suites(tmp_path):
    first, second = loaded(language(tmp_path / "1")), loaded(labelled(tmp_path / "2"))
    assert input_digests(first) == input_digests(second)
    assert input_digests(first, "tune") == input_digests(second, "tune")
    assert not input_digests(first) & input_digests(first, "tune")
    assert {len(digest) for digest in input_digests(first)} == {16}
    assert input_digests(loaded(language(tmp_path / "3", rows=TEXTS[:2])), "tune") == frozenset()
    assert input_digests(loaded(function(tmp_path / "4"))) == frozenset()


def test_an_image_has_one_digest_whatever_holds_its_numbers(tmp_path):
    write_suite(tmp_path, **IMAGE, rows=[([0.1, 0.5], 0, "gate")])
    before = input_digests(loaded(tmp_path))
    images = pa.array([pa.scalar(0.1, pa.float32()).as_py(), 0.5], pa.float64())
    column = pa.FixedSizeListArray.from_arrays(images, 2)
    data = tmp_path / "examples.parquet"
    pq.write_table(pa.table({"image": column, "label": [0], "split": ["gate"]}), data)
    edit(tmp_path, data_sha256=hashlib.sha256(data.read_bytes()).hexdigest())
    assert input_digests(loaded(tmp_path)) == before


@settings(max_examples=25, deadline=None)
@given(
    splits=st.lists(st.sampled_from(["gate", "gate", "gate", "tune"]), min_size=1, max_size=40).filter(
        lambda splits: "gate" in splits
    ),
    sample=st.integers(1, 50),
)
def test_a_canary_is_a_fixed_sample_of_the_gate_in_its_order(tmp_path_factory, splits, sample):
    folder = language(tmp_path_factory.mktemp("suite"), rows=[(f"text {row}", each) for row, each in enumerate(splits)])
    suite = loaded(folder)
    gate, canary = read_examples(suite).inputs, read_examples(suite, "canary", sample).inputs
    assert len(canary) == min(sample, len(gate))
    assert canary == [text for text in gate if text in set(canary)]
    assert canary == read_examples(loaded(folder), "canary", sample).inputs
    more = read_examples(suite, "canary", sample + 1).inputs
    assert set(canary) <= set(more)
    key = lambda row: hashlib.sha256(f"{suite.sha256}:{row}".encode()).digest()  # noqa: E731
    assert set(canary) == {gate[row] for row in sorted(range(len(gate)), key=key)[:sample]}
