"""Digests, atomic writes, the content-addressed store and manifests, on real files."""

import errno
import json
import os
import resource
from hashlib import sha256

import pytest

from registry import files
from registry.files import (
    hash_tree,
    open_regular,
    read_json,
    sha256_file,
    shown,
    sweep,
    write_atomic,
    write_json,
)
from registry.manifests import verify_manifest, write_manifest
from registry.records import FoldinError
from registry.store import copy_in

# SHA-256 of "abc": FIPS 180-4, appendix example B.1
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def tree(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "b.txt").write_bytes(b"abc")
    (source / "sub" / "a.txt").write_bytes(b"")
    return source


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def test_a_tree_is_hashed_by_relative_name_in_order(tree):
    assert sha256_file(tree / "b.txt") == ABC
    assert list(hash_tree(tree).items()) == [("b.txt", ABC), ("sub/a.txt", sha256(b"").hexdigest())]


@pytest.mark.timeout(5)
def test_a_tree_with_anything_but_regular_files_is_refused(tree, tmp_path, store):
    makers = (
        lambda path: path.symlink_to(tree / "b.txt"),
        lambda path: path.symlink_to(tmp_path),
        os.mkfifo,
    )
    for make in makers:
        make(tree / "sub" / "odd")
        for use in (hash_tree, lambda source: copy_in(source, store)):
            with pytest.raises(FoldinError, match=r"E_FILETYPE file odd: .* is a"):
                use(tree)
        (tree / "sub" / "odd").unlink()
    (tmp_path / "alias").symlink_to(tree)
    with pytest.raises(FoldinError, match="E_FILETYPE file alias"):
        hash_tree(tmp_path / "alias")


def test_a_file_that_is_not_there_is_unreachable(tmp_path):
    with (
        pytest.raises(FoldinError, match=r"E_UNREACHABLE base, file gone.*No such file"),
        open_regular(tmp_path / "gone", "base"),
    ):
        pass


def test_too_many_open_files_are_no_files_fault(tree, descriptors):
    whole, found, free = hash_tree(tree), None, 0
    with descriptors(0), pytest.raises(OSError, match="Too many open files") as caught, open_regular(tree / "b.txt"):
        pass
    assert caught.value.errno == errno.EMFILE
    while found != whole:  # whatever cannot be opened first: the folder, one below it, a file
        with descriptors(free):
            try:
                found = hash_tree(tree)
            except OSError as error:
                found = error.errno
        assert found in (whole, errno.EMFILE)
        free += 1
    assert free > 1


@pytest.mark.parametrize("number", [errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_what_the_system_says_of_itself_is_left_as_it_is(tree, monkeypatch, number):
    def refusing(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "open", refusing)
    with pytest.raises(OSError, match=os.strerror(number)), open_regular(tree / "b.txt"):
        pass


def test_a_folder_that_cannot_be_opened_is_named(tree, monkeypatch):
    opened = os.open

    def refusing(path, *arguments, **options):
        if path == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(files.os, "open", refusing)
    with pytest.raises(FoldinError, match=r"E_UNREACHABLE file sub: the folder cannot be read.*Permission denied"):
        hash_tree(tree)


def test_an_atomic_write_replaces_and_keeps_nothing_else(tmp_path):
    path = tmp_path / "deep" / "x"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["x"]


def test_a_write_that_does_not_fit_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))
    try:
        with pytest.raises(FoldinError, match=r"E_DISK .*file x.*File too large"):
            write_atomic(path, b"new" * 2**12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_sweep_removes_what_killed_writers_left(tmp_path):
    (tmp_path / ".x.0123.tmp").write_bytes(b"half")
    (tmp_path / ".4567.tmp").mkdir()
    (tmp_path / "x.tmp").write_bytes(b"a file of somebody")
    assert sweep(tmp_path) == [".4567.tmp", ".x.0123.tmp"]
    assert os.listdir(tmp_path) == ["x.tmp"]


def test_json_is_canonical_and_comes_back(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": [1, 2.5], "a": "é"})
    assert path.read_text() == '{\n "a": "é",\n "b": [\n  1,\n  2.5\n ]\n}\n'
    assert read_json(path) == {"a": "é", "b": [1, 2.5]}


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"a": 1, "a": 2}', b'{"a":' * 5000, b"\xff", b"1" * 9999, b""])
def test_json_that_cannot_be_trusted_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(FoldinError, match=r"E_FORMAT suite of task city, file x.json: the JSON is not"):
        read_json(tmp_path / "x.json", "suite of task city")


def test_json_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 10)
    (tmp_path / "x.json").write_text('{"a": "0123456789"}')
    with pytest.raises(FoldinError, match="E_TOO_LARGE"):
        read_json(tmp_path / "x.json")


def test_text_of_strangers_becomes_harmless():
    assert shown("plain-name_1.json") == "plain-name_1.json"
    assert shown("a\x1b[31m\u202e\nb") == "a\\x1b[31m\\u202e\\nb"
    assert len(shown("x" * 9999)) == 160


def test_a_copy_is_named_by_its_content(tree, store):
    folder, digest, hashes = copy_in(tree, store)
    assert hashes == hash_tree(tree) == hash_tree(folder)
    assert folder == store / digest[:2] / digest
    assert digest == sha256(files.canonical_json(hashes)).hexdigest()
    assert copy_in(tree, store)[0] == folder
    assert sorted(os.listdir(store)) == [digest[:2]]
    (tree / "b.txt").rename(tree / "c.txt")
    assert copy_in(tree, store)[1] != digest


def test_a_source_that_changes_after_the_copy_changes_nothing(tree, store):
    folder, _, hashes = copy_in(tree, store)
    (tree / "b.txt").write_bytes(b"swapped")
    (tree / "new.txt").write_bytes(b"")
    assert hash_tree(folder) == hashes
    assert (folder / "b.txt").read_bytes() == b"abc"


def test_a_source_that_changes_between_copy_and_check_is_checked_as_copied(tree, store):
    def check(copy):
        (tree / "b.txt").write_bytes(b"swapped")
        assert (copy / "b.txt").read_bytes() == b"abc"

    folder, _, hashes = copy_in(tree, store, check=check)
    assert hashes["b.txt"] == ABC == sha256_file(folder / "b.txt")


def test_a_copy_that_fails_its_check_leaves_no_trace(tree, store):
    def check(copy):
        raise files.Place("here", "b.txt").refuse("E_FORMAT", "it is bad")

    with pytest.raises(FoldinError, match="it is bad"):
        copy_in(tree, store, check=check)
    assert os.listdir(store) == []


def test_a_damaged_copy_is_not_reused(tree, store):
    folder, _, _ = copy_in(tree, store)
    (folder / "b.txt").write_bytes(b"abx")
    with pytest.raises(FoldinError, match=r"E_DIGEST .*changed after it was stored"):
        copy_in(tree, store)


def test_only_wanted_files_are_copied_and_counted(tree, store):
    (tree / "big.bin").write_bytes(bytes(1000))
    folder, _, _ = copy_in(tree, store, wanted=lambda name: name == "b.txt", max_bytes=3)
    assert list(hash_tree(folder)) == ["b.txt"]
    with pytest.raises(FoldinError, match=r"E_TOO_LARGE e v1, file b.txt"):
        copy_in(tree, store, wanted=lambda name: name == "b.txt", max_bytes=2, where="e v1")


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\u202eb", "a:b", "x" * 201, "a*"])
def test_names_that_are_not_plain_are_not_copied(tree, store, name):
    (tree / name).write_bytes(b"")
    with pytest.raises(FoldinError, match="E_PATH") as caught:
        copy_in(tree, store)
    assert str(caught.value).isprintable()


def test_a_manifest_lists_every_file_and_the_facts(tree):
    digest = write_manifest(tree, {"verdict": "passed", "files": "not these"})
    content = (tree / "foldin" / "manifest.json").read_bytes()
    assert digest == sha256(content).hexdigest()
    files_listed = {"b.txt": ABC, "sub/a.txt": sha256(b"").hexdigest()}
    assert json.loads(content) == {"verdict": "passed", "files": files_listed}
    assert verify_manifest(tree) == []
    assert write_manifest(tree, {"verdict": "passed"}) == digest


def test_a_manifest_finds_what_is_missing_extra_or_different(tree):
    write_manifest(tree, {})
    (tree / "b.txt").write_bytes(b"abx")
    (tree / "sub" / "a.txt").unlink()
    (tree / "sub" / "c.txt").write_bytes(b"")
    refusals = verify_manifest(tree)
    assert [(refusal.code, refusal.file) for refusal in refusals] == [
        ("E_DIGEST", "b.txt"),
        ("E_DIGEST", "sub/a.txt"),
        ("E_DIGEST", "sub/c.txt"),
    ]
    assert refusals[0].expected == ABC
    assert refusals[1].found == refusals[2].expected == "no such file"


def test_a_folder_without_a_sound_manifest_is_not_whole(tree):
    assert [refusal.code for refusal in verify_manifest(tree)] == ["E_UNREACHABLE"]
    write_json(tree / "foldin" / "manifest.json", {"files": []})
    assert [refusal.code for refusal in verify_manifest(tree)] == ["E_DIGEST"]
    write_manifest(tree, {})
    (tree / "odd").symlink_to(tree / "b.txt")
    assert [refusal.code for refusal in verify_manifest(tree)] == ["E_FILETYPE"]
