"""Rows of two embeddings are matched by token string, on tokenizers of a few words."""

import json

import pytest
import transformers

from evaluation.vocabulary import matched_rows
from registry.records import Refusal

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("red", "green", "blue", "cat", "dog", "cow")


def with_tokenizer(folder, *words):
    """A folder whose tokenizer knows the marks and these words, with ids in this order."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "vocab.txt").write_text("\n".join((*MARKS, *words)) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_rows_are_matched_by_token_and_not_by_place(tmp_path):
    base = with_tokenizer(tmp_path / "base", *WORDS)
    expert = with_tokenizer(tmp_path / "expert", "new", "cow", "red", "green", "blue", "cat")
    # red, green, blue, cat have moved, dog is gone, cow has moved; new has no row in the base.
    assert matched_rows(base, expert, 11, "expert v1") == (0, 1, 2, 3, 4, 7, 8, 9, 10, -1, 6)
    assert matched_rows(expert, base, 11, "expert v1") == (0, 1, 2, 3, 4, -1, 10, 5, 6, 7, 8)


def test_padding_rows_match_nothing_and_tokens_without_a_row_are_left_out(tmp_path):
    base = with_tokenizer(tmp_path / "base", *WORDS)
    assert matched_rows(base, base, 16, "expert v1") == (*range(11), -1, -1, -1, -1, -1)
    assert matched_rows(base, base, 7, "expert v1") == tuple(range(7))


def test_added_tokens_are_tokens(tmp_path):
    base, expert = (with_tokenizer(tmp_path / name, *WORDS) for name in ("base", "expert"))
    for folder, added in ((base, ["<tool>", "<call>"]), (expert, ["<call>"])):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(added, special_tokens=True)
        tokenizer.save_pretrained(folder)
    assert matched_rows(base, expert, 13, "expert v1") == (*range(11), -1, 11)


def test_half_of_the_tokens_are_enough_and_fewer_are_not(tmp_path):
    base = with_tokenizer(tmp_path / "base", *WORDS, "sun")  # twelve tokens, five of them marks
    half = with_tokenizer(tmp_path / "half", "sun", "kuh")
    assert matched_rows(base, half, 12, "expert v1") == (0, 1, 2, 3, 4, -1, -1, -1, -1, -1, -1, 5)
    refusal = matched_rows(base, with_tokenizer(tmp_path / "less", "kuh", "rot"), 12, "expert v1")
    assert isinstance(refusal, Refusal)
    assert str(refusal) == (
        "E_VOCABULARY expert v1: the tokenizer lacks more than half of the base's tokens. Expected 6 or more of 12. "
        "Found 5. Fine-tune it from this line's base; rows of vocabularies so different cannot be matched."
    )


@pytest.mark.parametrize(
    ("bare", "where", "remedy"),
    [("base", "base base", "Keep the base's own tokenizer"), ("expert", "expert v1", "Save the tokenizer")],
)
def test_a_folder_without_tokenizer_is_refused(tmp_path, bare, where, remedy):
    folders = {name: with_tokenizer(tmp_path / name, *WORDS) for name in ("base", "expert")}
    for path in folders[bare].iterdir():
        if path.name != "config.json":
            path.unlink()
    refusal = matched_rows(folders["base"], folders["expert"], 11, "expert v1")
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.where) == ("E_VOCABULARY", where)
    assert f"{where}: the tokenizer is missing. Expected tokenizer.json or vocab.*" in str(refusal)
    assert remedy in str(refusal)


def test_a_broken_tokenizer_is_refused(tmp_path):
    base, expert = (with_tokenizer(tmp_path / name, *WORDS) for name in ("base", "expert"))
    (expert / "tokenizer.json").write_text("{}")
    refusal = matched_rows(base, expert, 11, "expert v1")
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.what) == ("E_VOCABULARY", "the tokenizer cannot be loaded")


def test_a_broken_configuration_is_refused_as_such(tmp_path):
    base, expert = (with_tokenizer(tmp_path / name, *WORDS) for name in ("base", "expert"))
    (expert / "config.json").write_text("{")
    refusal = matched_rows(base, expert, 11, "expert v1")
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.where) == ("E_CONFIG", "expert v1")


def test_code_beside_a_tokenizer_is_never_run(tmp_path):
    base, expert = (with_tokenizer(tmp_path / name, *WORDS) for name in ("base", "expert"))
    path = expert / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    refusal = matched_rows(base, expert, 11, "expert v1")
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.where, refusal.file) == ("E_REMOTE_CODE", "expert v1", "tokenizer_config.json")
