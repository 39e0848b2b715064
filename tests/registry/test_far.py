"""Weights that stay in S3: read by tensors, each compared with its digest, against moto's real server."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from registry import far, ranged
from registry.far import Far, far_files, look_again, mirror, names_in, note_far, write_digests
from registry.files import hash_tree, sha256_file
from registry.headers import read_folder
from registry.intake import admit
from registry.manifests import verify_manifest, write_manifest
from registry.objects import Objects
from registry.records import FoldinError, Refusal
from registry.weights import Checkpoint, content_sha256, tensor_sha256

pytestmark = pytest.mark.integration


@pytest.fixture
def store(s3, monkeypatch, tmp_path):
    """The process's store, behind the proxy, with small parts; small files are far as well."""
    made = Objects(s3.url, parts=4, part_bytes=2**20, timeout=5.0)
    monkeypatch.setattr(far, "store", lambda: made)
    monkeypatch.setattr(far, "SMALL", 1024)
    monkeypatch.setattr(ranged, "_near", None)
    far.trust(tmp_path)
    return made


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in two shards with a state below it."""
    root = tmp_path / "local"
    (root / "foldin/state").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(shape, generator=generator)

    first, second = {"a": some(64, 64), "b": some(300).to(torch.bfloat16), "e": torch.empty(0, 4)}, {"c": some(900)}
    save_file(first, root / "model-00001-of-00002.safetensors")
    save_file(second, root / "model-00002-of-00002.safetensors")
    files = {**dict.fromkeys(first, "model-00001-of-00002.safetensors"), "c": "model-00002-of-00002.safetensors"}
    (root / "model.safetensors.index.json").write_text('{"weight_map": ' + str(files).replace("'", '"') + "}")
    save_file({"a:total": some(64, 64)}, root / "foldin/state/part.safetensors")
    (root / "config.json").write_text("{}")
    return root


def at(s3, name):
    return f"{s3.root}/{name}"


def sent(s3):
    """Bytes that the server has sent so far."""
    return sum(s3.proxy.sent.values())


def put(store, folder, uri):
    for name in hash_tree(folder):
        store.upload(folder / name, f"{uri}/{name}")


def test_a_mirrored_folder_is_the_folder_it_mirrors(store, s3, folder, tmp_path):
    write_manifest(folder, {})
    put(store, folder, at(s3, "model"))
    there = tmp_path / "cache" / "3"
    mirror(at(s3, "model"), there, tmp_path / "seen")
    assert sorted(far_files(there)) == [
        *("foldin/state/part.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ]
    assert not list(there.rglob("*.safetensors"))
    assert hash_tree(there) == hash_tree(folder)
    assert names_in(there) == names_in(folder)
    assert verify_manifest(there) == []
    assert {name: list(spans) for name, spans in read_folder(there).items()} == {
        name: list(spans) for name, spans in read_folder(folder).items()
    }
    here, away = Checkpoint.open(folder), Checkpoint.open(there)
    assert content_sha256(away) == content_sha256(here)
    assert away.specs == here.specs
    for name in away:
        away.expect(name)
        assert torch.equal(away.renamed(str.upper)[name.upper()], here[name])
    state = Checkpoint.open(there / "foldin/state")
    assert torch.equal(state["a:total"], Checkpoint.open(folder / "foldin/state")["a:total"])
    assert torch.equal(Checkpoint.open_file(there / "model-00002-of-00002.safetensors")["c"], here["c"])


def test_a_tensor_may_be_changed_by_whoever_read_it(store, s3, folder, tmp_path):
    put(store, folder, at(s3, "model"))
    mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen")
    found = Checkpoint.open(tmp_path / "m")
    found["c"].add_(1.0)
    assert torch.equal(found["c"], Checkpoint.open(folder)["c"])


def test_what_was_seen_before_is_not_read_again_and_what_changed_is(store, s3, folder, tmp_path):
    put(store, folder, at(s3, "model"))
    there, seen = tmp_path / "m", tmp_path / "seen"
    mirror(at(s3, "model"), there, seen)
    whole = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    before = sent(s3)
    mirror(at(s3, "model"), there, seen)
    mirror(at(s3, "model"), tmp_path / "another", seen)
    assert sent(s3) - before < whole / 2
    save_file({"c": torch.zeros(900)}, folder / "model-00002-of-00002.safetensors")
    put(store, folder, at(s3, "model"))
    mirror(at(s3, "model"), there, seen)
    assert hash_tree(there) == hash_tree(folder)
    store.remove(at(s3, "model/config.json"))
    mirror(at(s3, "model"), there, seen)
    assert "config.json" not in names_in(there)


def test_a_file_that_was_exchanged_is_not_read(store, s3, folder, tmp_path):
    put(store, folder, at(s3, "model"))
    mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen")
    opened = Checkpoint.open(tmp_path / "m")
    save_file({"c": torch.zeros(900)}, folder / "model-00002-of-00002.safetensors")
    put(store, folder, at(s3, "model"))
    with pytest.raises(FoldinError, match="E_DIGEST"):
        opened["c"]


def test_a_flipped_bit_on_the_way_is_noticed_and_the_tensor_asked_for_again(store, s3, folder, tmp_path):
    put(store, folder, at(s3, "model"))
    mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen")
    opened, right = Checkpoint.open(tmp_path / "m"), Checkpoint.open(folder)["a"]
    s3.proxy.next("GetObject", "flip")
    assert torch.equal(opened["a"], right)
    for _ in range(ranged.LOOKS):
        s3.proxy.next("GetObject", "flip")
    with pytest.raises(FoldinError, match=r"E_DIGEST .*tensor a: the tensor's bytes are others than before"):
        opened["a"]


def test_what_was_read_once_is_near_and_damage_there_is_read_again(store, s3, folder, tmp_path):
    put(store, folder, at(s3, "v1"))
    mirror(at(s3, "v1"), tmp_path / "v1", tmp_path / "seen")
    ranged.keep_near(tmp_path / "near", 10**6)
    first = {name: tensor.clone() for name, tensor in Checkpoint.open(tmp_path / "v1").items()}
    again = Checkpoint.open(tmp_path / "v1")
    after = sent(s3)
    for name in again:
        again.expect(name)
        assert torch.equal(again[name], first[name])
    assert sent(s3) == after
    for path in (tmp_path / "near").glob("*/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")  # no float32 or bfloat16 of this size ends so
    assert all(torch.equal(again[name], first[name]) for name in again)
    assert sent(s3) > after


def test_our_own_list_of_digests_spares_reading_all_and_is_believed_only_until_somebody_looks(
    store, s3, folder, tmp_path
):
    write_digests(folder)
    write_manifest(folder, {})
    put(store, folder, at(s3, "model"))
    whole, before = sum(path.stat().st_size for path in folder.rglob("*.safetensors")), sent(s3)
    mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen", ours=True)
    assert sent(s3) - before < whole / 2
    assert verify_manifest(tmp_path / "m") == []
    assert content_sha256(Checkpoint.open(tmp_path / "m")) == content_sha256(Checkpoint.open(folder))
    # Somebody exchanges the weights and leaves the lists: a reader of the tensor is told, and so is who looks at all.
    save_file({"c": torch.zeros(900)}, folder / "model-00002-of-00002.safetensors")
    store.upload(folder / "model-00002-of-00002.safetensors", at(s3, "model/model-00002-of-00002.safetensors"))
    mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen", ours=True)
    with pytest.raises(FoldinError, match=r"E_DIGEST .*tensor c"):
        Checkpoint.open(tmp_path / "m")["c"]
    look_again(tmp_path / "m", tmp_path / "seen")
    assert [each.file for each in verify_manifest(tmp_path / "m")] == ["model-00002-of-00002.safetensors"]


def test_names_of_foldins_own_lists_are_refused(store, s3, folder, tmp_path):
    (folder / "foldin/state.far.json").write_text('{"far": {}}')
    put(store, folder, at(s3, "model"))
    with pytest.raises(FoldinError, match=r"E_PATH .*the name is kept for foldin's own lists"):
        mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen")


@pytest.mark.parametrize("keep", [False, True])
def test_an_expert_in_s3_is_admitted_without_a_copy_of_its_weights_here(store, s3, zoo, tmp_path, keep):
    expert = zoo / "expert-1"
    put(store, expert, at(s3, "expert"))
    mirror(at(s3, "expert"), tmp_path / "m", tmp_path / "seen")
    content = tmp_path / "experts"
    away = admit(tmp_path / "m", content, "expert", keep=at(s3, "kept") if keep else "")
    here = admit(expert, tmp_path / "other", "expert")
    assert not isinstance(away, Refusal)
    assert (away.tree_sha256, away.files_sha256) == (here.tree_sha256, here.files_sha256)
    assert not list(content.rglob("*.safetensors"))
    assert not list(content.glob(".*"))
    assert content_sha256(Checkpoint.open(away.folder)) == content_sha256(Checkpoint.open(here.folder))
    assert admit(tmp_path / "m", content, "expert", keep=at(s3, "kept") if keep else "") == away  # found again
    # Whoever registered it may do with it what they like.
    store.remove(at(s3, "expert/model.safetensors"))
    if keep:
        assert content_sha256(Checkpoint.open(away.folder)) == content_sha256(Checkpoint.open(here.folder))
    else:
        with pytest.raises(FoldinError, match="E_SOURCE"):
            content_sha256(Checkpoint.open(away.folder))


def test_a_far_file_counts_towards_the_size_that_is_allowed(store, s3, zoo, tmp_path):
    put(store, zoo / "expert-1", at(s3, "expert"))
    mirror(at(s3, "expert"), tmp_path / "m", tmp_path / "seen")
    size = (zoo / "expert-1/model.safetensors").stat().st_size
    refused = admit(tmp_path / "m", tmp_path / "experts", "expert", max_bytes=size)
    assert isinstance(refused, Refusal)
    assert refused.code == "E_TOO_LARGE"
    assert not list((tmp_path / "experts").iterdir())


def test_a_list_beside_a_folder_of_strangers_is_not_believed(tmp_path):
    """A team may log `expert/` and `expert.far.json` to one run, and register the first."""
    note_far(tmp_path / "expert", {"model.safetensors": Far("s3://secret/key", 1, "e", "d", {})})
    assert far_files(tmp_path / "expert") == {}
    far.trust(tmp_path)
    assert list(far_files(tmp_path / "expert")) == ["model.safetensors"]
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert/model.safetensors").write_bytes(b"x")
    with pytest.raises(FoldinError, match=r"E_FILETYPE .*here and far at once"):
        hash_tree(tmp_path / "expert")


def test_a_mirror_that_was_cut_off_is_not_taken_for_a_whole_one(store, s3, folder, tmp_path, monkeypatch):
    put(store, folder, at(s3, "model"))
    monkeypatch.setattr(store, "download", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen")
    assert far.is_mirror(tmp_path / "m")
    monkeypatch.undo()
    monkeypatch.setattr(far, "store", lambda: store)
    monkeypatch.setattr(far, "SMALL", 1024)
    mirror(at(s3, "model"), tmp_path / "m", tmp_path / "seen")
    assert hash_tree(tmp_path / "m") == hash_tree(folder)


def test_a_list_of_nothing_is_no_list(tmp_path):
    far.trust(tmp_path)
    note_far(tmp_path / "x", {"a.safetensors": Far("s3://b/a", 1, "e", "d", {})})
    assert list(far_files(tmp_path / "x")) == ["a.safetensors"]
    note_far(tmp_path / "x", {})
    assert (far_files(tmp_path / "x"), list(tmp_path.iterdir())) == ({}, [])


def large(folder, tensors, entries):
    folder.mkdir()
    weights = {f"layer.{number:03}": torch.full((entries,), float(number)) for number in range(tensors)}
    save_file(weights, folder / "model.safetensors")
    write_digests(folder)
    return folder


@pytest.mark.parametrize(
    ("tensors", "entries"),
    [(200, 2**17), pytest.param(220, 2_500_000, marks=pytest.mark.chaos)],
    ids=["100 MB", "2.2 GB"],
)
def test_reading_one_tensor_of_twenty_transfers_little_more_than_that(s3, monkeypatch, tmp_path, tensors, entries):
    made = Objects(s3.url)
    monkeypatch.setattr(far, "store", lambda: made)
    far.trust(tmp_path)
    local = large(tmp_path / "local", tensors, entries)
    size, digest = (local / "model.safetensors").stat().st_size, sha256_file(local / "model.safetensors")
    put(made, local, at(s3, "large"))
    shutil.rmtree(local)
    before = sent(s3)
    mirror(at(s3, "large"), tmp_path / "m", tmp_path / "seen", ours=True)
    opened = Checkpoint.open(tmp_path / "m")
    for number in range(0, tensors, 20):
        assert opened[f"layer.{number:03}"][-1] == number
    transferred = sent(s3) - before
    print(f"{transferred / size:.2%} of {size} bytes")
    assert 0.05 * size <= transferred < 0.08 * size
    assert far_files(tmp_path / "m")["model.safetensors"].sha256 == digest
    assert not list((tmp_path / "m").rglob("*.safetensors"))
    assert tensor_sha256(opened["layer.001"]) == opened.far["model.safetensors"].tensors["layer.001"]
