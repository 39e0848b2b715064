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


def test_what_nobody_read_for_an_hour_makes_room_the_oldest_first(tmp_path):
    old, older, used, new = (bytes([number]) * 100 for number in range(4))
    assert filled(TensorCache(tmp_path, 350), old, older, used) == [True] * 3
    (tmp_path / "aa").mkdir(exist_ok=True)
    (tmp_path / "aa/.dead.tmp").write_bytes(b"x" * 100)  # a process was killed while it wrote
    for path in tmp_path.glob("*/*"):
        age = 2 if path.name in (digest_of(older), ".dead.tmp") else 1
        os.utime(path, (0, time.time() - age * IDLE - 1))
    cache = TensorCache(tmp_path, 350)
    assert cache.get(digest_of(used)) == used  # so it is not idle any more
    assert filled(cache, new) == [True]
    assert [digest_of(each) in cache for each in (old, older, used)] == [False, False, True]
    assert [path.name for path in tmp_path.glob("aa/*")] == []


def test_the_files_of_many_processes_fit_into_one_room(tmp_path):
    caches = [TensorCache(tmp_path, 250) for _ in range(10)]
    for number, cache in enumerate(caches):
        filled(cache, bytes([number]) * 100)
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) == 200


def test_a_full_disk_and_a_strange_name_are_no_trouble(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file", 1_000)
    assert filled(cache, b"one") == [False]
    assert cache.get(digest_of(b"one")) is None
    cache.put("../../evil", b"x")
    assert "../../evil" not in cache
    assert cache.get("") is None
