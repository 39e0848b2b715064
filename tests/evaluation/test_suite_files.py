"""A suite folder is read as data from strangers: each way it can be wrong has its message."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.suites import load_suite, read_examples, write_suite
from registry.records import FoldinError

TEXT_ROWS = [("Paris", 0, "gate"), ("Tokyo", 1, "gate"), ("Lyon", 0, "tune")]
WHERE = "expert demo v3"


def text_suite(folder, **changes):
    arguments = {"kind": "zero-shot-text", "labels": ["Europe", "Asia"], "prompts": ["in Europe", "in Asia"]}
    write_suite(folder, **{**arguments, "rows": TEXT_ROWS, **changes})
    return folder


def image_suite(folder, image_shape=(1, 2, 2), rows=(([0.0, 0.25, 0.5, 1.0], 1, "gate"),)):
    write_suite(folder, kind="image-classification", labels=["a", "b"], rows=rows, image_shape=image_shape)
    return folder


def edit(folder, **changes):
    path = folder / "suite.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "REMOVED"}))


def replace_data(folder, **columns):
    pq.write_table(pa.table(columns), folder / "examples.parquet")
    edit(folder, data_sha256=load_error(folder).refusal.found)


def load_error(folder):
    with pytest.raises(FoldinError) as caught:
        load_suite(folder, task="city", where=WHERE)
    assert caught.value.refusal.code == "E_SUITE"
    assert WHERE in str(caught.value)
    return caught.value


def test_a_text_suite_comes_back_as_written(tmp_path):
    suite = load_suite(text_suite(tmp_path), task="city", where=WHERE)
    assert (suite.task, suite.kind, suite.metric, suite.image_shape) == ("city", "zero-shot-text", "accuracy", None)
    assert suite.labels == ("Europe", "Asia")
    assert suite.prompts == ("in Europe", "in Asia")
    assert read_examples(suite) == (["Paris", "Tokyo"], [0, 1])
    assert read_examples(suite, "tune") == (["Lyon"], [0])


def test_an_image_suite_comes_back_as_written(tmp_path):
    suite = load_suite(image_suite(tmp_path), task="digits", where=WHERE)
    assert suite.image_shape == (1, 2, 2)
    assert read_examples(suite) == ([[0.0, 0.25, 0.5, 1.0]], [1])


def test_equal_suites_have_equal_bytes_and_identities(tmp_path):
    first, second = text_suite(tmp_path / "a"), text_suite(tmp_path / "b")
    for name in ("suite.json", "examples.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    identities = {load_suite(folder, task="t", where=WHERE).sha256 for folder in (first, second)}
    assert len(identities) == 1


def test_the_identity_ignores_the_file_name_and_key_order_but_nothing_else(tmp_path):
    folder = text_suite(tmp_path / "a")
    before = load_suite(folder, task="t", where=WHERE).sha256
    (folder / "examples.parquet").rename(folder / "other.parquet")
    document = {**json.loads((folder / "suite.json").read_text()), "data": "other.parquet"}
    (folder / "suite.json").write_text(json.dumps(dict(reversed(document.items()))))
    assert load_suite(folder, task="t", where=WHERE).sha256 == before
    edit(folder, prompts=["in Asia", "in Europe"])
    assert load_suite(folder, task="t", where=WHERE).sha256 != before
    other_rows = text_suite(tmp_path / "b", rows=[*TEXT_ROWS, ("Rome", 0, "gate")])
    assert load_suite(other_rows, task="t", where=WHERE).sha256 != before


def test_suite_json_is_missing(tmp_path):
    assert "the file is missing" in str(load_error(tmp_path))


@pytest.mark.parametrize("text", ["{", "\udcff", "[" * 100_000], ids=["cut", "not UTF-8", "deep"])
def test_suite_json_is_not_json(tmp_path, text):
    (tmp_path / "suite.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "the file is not valid JSON" in str(load_error(tmp_path))


def test_suite_json_is_not_an_object(tmp_path):
    (tmp_path / "suite.json").write_text("[]")
    assert "does not hold a JSON object" in str(load_error(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "the key 'prompt' is unknown. Did you mean 'prompts'."),
        ({"labels": "REMOVED"}, "the key 'labels' is missing"),
        ({"kind": "zero-shot-txt"}, "the kind is unknown. Expected one of zero-shot-text, text-classification"),
        ({"metric": "f1"}, "the metric is unknown. Expected one of accuracy. Found 'f1'"),
        ({"labels": []}, "labels are too few to tell apart. Expected two or more. Found 0"),
        ({"labels": ["Asia", "Asia"]}, "a label stands twice. Found 'Asia'"),
        ({"labels": "Asia"}, "labels is not a list of texts"),
        ({"labels": [1, 2]}, "labels is not a list of texts"),
        ({"prompts": ["one"]}, "the number of prompts does not fit. Expected 2 (one per label). Found 1"),
        ({"kind": "text-classification"}, "Expected 0 (kind text-classification has none). Found 2"),
        ({"image_shape": [1, 2, 2]}, "image_shape does not belong to kind zero-shot-text"),
        ({"kind": "image-classification", "prompts": []}, "image_shape is not a shape"),
        ({"data": 3}, "data is not a path"),
        ({"data": "s3://bucket/a.parquet"}, "data by URI is not supported yet"),
        ({"data": "file:a.parquet"}, "data by URI is not supported yet"),
        ({"data": "C:\\a.parquet"}, "data by URI is not supported yet"),
        ({"data": "../examples.parquet"}, "data leaves the suite's folder"),
        ({"data": "a\\..\\b"}, "data leaves the suite's folder"),
        ({"data": "a\0b"}, "data leaves the suite's folder"),
        ({"data": "/etc/hostname"}, "data leaves the suite's folder"),
        ({"data": "gone.parquet"}, "the data file is missing. Expected gone.parquet"),
        ({"data_sha256": "0" * 64}, "the data has another digest. Expected " + "0" * 64),
        ({"labels": ["Europe", "Asia", "Africa"], "prompts": ["x"]}, "Expected 3 (one per label). Found 1"),
    ],
)
def test_what_suite_json_may_not_say(tmp_path, changes, message):
    edit(text_suite(tmp_path), **changes)
    assert message in str(load_error(tmp_path))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = text_suite(tmp_path / "suite")
    os.replace(folder / "examples.parquet", tmp_path / "outside.parquet")
    (folder / "examples.parquet").symlink_to(tmp_path / "outside.parquet")
    assert "data leaves the suite's folder" in str(load_error(folder))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "split": ["gate"]}, "the column 'label' does not fit. Expected int64. Found no such columns"),
        (
            {"text": [1], "label": [0], "split": ["gate"]},
            "the column 'text' does not fit. Expected string. Found int64",
        ),
        ({"text": ["a"], "label": [0.5], "split": ["gate"]}, "the column 'label' does not fit"),
        (
            {"text": ["a"], "label": [2], "split": ["gate"]},
            "label index is out of range. Expected 0 to 1. Found 2 in row 0",
        ),
        ({"text": ["a"], "label": [-1], "split": ["gate"]}, "a label index is out of range"),
        ({"text": ["a", None], "label": [0, 0], "split": ["gate"] * 2}, "the column 'text' has empty cells"),
        ({"text": ["a"], "label": [0], "split": ["tune"]}, "the split gate has no rows"),
        ({"text": ["a", "b"], "label": [0, 0], "split": ["gate", "train"]}, "a split is unknown. Expected one of gate"),
    ],
)
def test_what_the_rows_may_not_be(tmp_path, columns, message):
    replace_data(text_suite(tmp_path), **columns)
    assert message in str(load_error(tmp_path))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([0.0, 1.0, 2.0], "an image has another size. Expected 4 values for image_shape [1, 2, 2]. Found 3 in row 0"),
        ([0.0, 1.0, 2.0, float("nan")], "an image holds a value that is not finite"),
        ([0.0, 1.0, 2.0, None], "an image holds a value that is not finite"),
    ],
)
def test_what_an_image_may_not_be(tmp_path, image, message):
    images = pa.array([image], pa.list_(pa.float32()))
    replace_data(image_suite(tmp_path), image=images, label=[0], split=["gate"])
    assert message in str(load_error(tmp_path))


def test_data_that_is_not_parquet(tmp_path):
    folder = text_suite(tmp_path)
    (folder / "examples.parquet").write_bytes(b"PAR1 not really")
    edit(folder, data_sha256=load_error(folder).refusal.found)
    assert "the data cannot be read as Parquet" in str(load_error(folder))


def test_data_that_cannot_be_opened_for_want_of_descriptors_is_not_refused(tmp_path, descriptors):
    suite = load_suite(text_suite(tmp_path), task="city", where=WHERE)
    with descriptors(0), pytest.raises(OSError, match="Too many open files"):
        read_examples(suite)


def test_data_that_is_not_utf8(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    replace_data(text_suite(tmp_path), text=broken, label=[0], split=["gate"])
    assert "the data cannot be read as Parquet" in str(load_error(tmp_path))


def test_a_split_without_rows_cannot_be_read(tmp_path):
    suite = load_suite(text_suite(tmp_path, rows=TEXT_ROWS[:2]), task="city", where=WHERE)
    with pytest.raises(FoldinError, match=r"suite of task city, file examples.parquet: the split has no rows"):
        read_examples(suite, "tune")


def test_writing_a_suite_that_could_not_be_read_is_refused(tmp_path):
    with pytest.raises(FoldinError, match="a label index is out of range"):
        text_suite(tmp_path, rows=[("Paris", 7, "gate")])
    with pytest.raises(FoldinError, match="the split gate has no rows"):
        text_suite(tmp_path, rows=[])


def test_words_of_strangers_reach_messages_cleaned(tmp_path):
    edit(text_suite(tmp_path), kind="\x1b[31m\u202e" + "x" * 1000)
    message = str(load_error(tmp_path))
    assert message.isprintable()
    assert len(message) < 600
