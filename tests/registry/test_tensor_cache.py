"""Tensors from a store that stay on this machine while there is room."""

import hashlib
import os
import time

from registry.tensor_cache import IDLE, TensorCache


def digest_of(content):
    return hashlib.sha256(content).hexdigest()


def filled(cache, *contents):
    for content in contents:
        cache.put(digest_of(content), content)
    return [digest_of(content) in cache for content in contents]


def test_what_is_put_is_had_by_its_digest_and_nothing_else_is(tmp_path):
    cache = TensorCache(tmp_path, 1_000)
    assert filled(cache, b"one", b"") == [True, True]
    assert cache.get(digest_of(b"one")) == bytearray(b"one")
    assert cache.get(digest_of(b"")) == bytearray()
    assert cache.get(digest_of(b"two")) is None
    assert TensorCache(tmp_path, 1_000).get(digest_of(b"one")) == bytearray(b"one")


def test_what_came_first_stays_where_there_is_no_more_room(tmp_path):
    cache = TensorCache(tmp_path, 250)
    assert filled(cache, b"a" * 100, b"b" * 100, b"c" * 100, b"d" * 50) == [True, True, False, True]


def test_what_nobody_read_for_an_hour_makes_room(tmp_path):
    first, second, third = b"a" * 100, b"b" * 100, b"c" * 100
    assert filled(TensorCache(tmp_path, 250), first, second) == [True, True]
    for path in tmp_path.glob("*/*"):
        os.utime(path, (0, time.time() - IDLE - 1))
    cache = TensorCache(tmp_path, 250)
    assert cache.get(digest_of(second)) == second  # so it is not idle any more
    (tmp_path / "aa").mkdir(exist_ok=True)
    (tmp_path / "aa/.dead.tmp").write_bytes(b"x" * 200)  # a process was killed while it wrote
    os.utime(tmp_path / "aa/.dead.tmp", (0, 0))
    cache._used = 200
    assert filled(cache, first, second, third) == [True, True, False]
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 250


def test_another_process_s_files_count_too(tmp_path):
    filled(TensorCache(tmp_path, 250), b"a" * 100, b"b" * 100)
    late = TensorCache(tmp_path, 150)
    assert filled(late, b"c" * 100) == [True]  # it has not looked yet
    assert filled(late, b"d" * 100) == [False]


def test_a_full_disk_and_a_strange_name_are_no_trouble(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file", 1_000)
    assert filled(cache, b"one") == [False]
    assert cache.get(digest_of(b"one")) is None
    cache.put("../../evil", b"x")
    assert "../../evil" not in cache
    assert cache.get("") is None
