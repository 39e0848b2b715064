"""Every tensor of an expert comes back, whatever the base has of it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import packs
from flows.archives import SAID, Archive
from flows.archiving import _copy_files
from flows.memory import Memory
from flows.packs import counterparts, pack_all
from flows.restoring import FILES, Record, write_restored
from flows.versions import Version
from registry.records import FoldinError
from registry.weights import Checkpoint


@pytest.fixture
def base(zoo):
    return Version(1, zoo / "base", "", Memory("opcm", {}, "0" * 64, "0" * 64))


def kept_and_restored(base, expert, tmp_path, tolerance=0.01):
    """(record, tensors that came back) of an expert's folder."""
    folder, weights = tmp_path / "archive", Checkpoint.open(expert, "expert")
    _copy_files(expert, folder / FILES)
    kept, error = pack_all(folder / "changes", base, weights, tolerance, "expert")
    digests = dict.fromkeys(("weights_sha256", "tree_sha256", "restored_weights_sha256", "restored_tree_sha256"), "")
    sizes = {"bytes_before": 0, "bytes_after": 0, "layout": weights.layout, "tensors": kept}
    record = Record("expert", {}, base.memory.base_sha256, **digests, tolerance=tolerance, error=error, **sizes)
    shutil.rmtree(tmp_path / "back", ignore_errors=True)
    write_restored(folder, record, base, tmp_path / "back", "expert")
    return record, Checkpoint.open(tmp_path / "back", "back")


def changed(expert, tmp_path, change):
    """A copy of an expert whose tensors a function changed."""
    folder = shutil.copytree(expert, tmp_path / "expert")
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_heads_integers_and_other_shapes_come_back_exactly(base, zoo, tmp_path):
    def change(tensors):
        tensors["classifier.weight"] = torch.randn(3, 32)
        tensors["counts"] = torch.arange(5)
        tensors["pooler.dense.bias"] = torch.randn(7)
        return tensors

    expert = changed(zoo / "expert-1", tmp_path, change)
    record, back = kept_and_restored(base, expert, tmp_path)
    own = load_file(expert / "model.safetensors")
    for name in ("classifier.weight", "counts", "pooler.dense.bias"):
        assert (record.tensors[name].form, record.tensors[name].of) == ("exact", "")
        assert torch.equal(back[name], own[name])
    assert record.tensors["embeddings.word_embeddings.weight"].form == "same"
    assert dict(back.specs) == dict(Checkpoint.open(expert, "").specs)


def test_a_tensor_that_is_tied_to_one_of_the_bases_comes_back_as_that_does(base, zoo, tmp_path):
    tied = "encoder.layer.0.output.dense.weight"
    expert = changed(zoo / "expert-1", tmp_path, lambda tensors: {**tensors, "a.decoder.weight": tensors[tied].clone()})
    record, back = kept_and_restored(base, expert, tmp_path)
    assert record.tensors["a.decoder.weight"][:2] == ("copy", tied)
    assert torch.equal(back["a.decoder.weight"], back[tied])
    assert not torch.equal(back[tied], load_file(expert / "model.safetensors")[tied])


def test_names_below_a_prefix_are_the_bases(base, zoo, tmp_path):
    expert = changed(zoo / "expert-1", tmp_path, lambda tensors: {f"bert.{name}": own for name, own in tensors.items()})
    of = counterparts(base, base.weights(), Checkpoint.open(expert, ""))
    assert all(name == f"bert.{found}" for name, found in of.items())
    record, _ = kept_and_restored(base, expert, tmp_path)
    assert record.error <= 0.01


def test_the_files_of_changes_are_cut_and_found_again(base, zoo, tmp_path, monkeypatch):
    whole, one = kept_and_restored(base, zoo / "expert-1", tmp_path / "whole")
    monkeypatch.setattr(packs, "SHARD", 3000)
    cut, other = kept_and_restored(base, zoo / "expert-1", tmp_path / "cut")
    files = {each.file for each in cut.tensors.values() if each.parts}
    assert len({each.file for each in whole.tensors.values() if each.parts}) == 1 < len(files)
    assert files == {path.name for path in (tmp_path / "cut/archive/changes").iterdir()}
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_base_of_other_weights_and_a_change_that_is_not_finite_are_refused(base, zoo, tmp_path):
    record, _ = kept_and_restored(base, zoo / "expert-1", tmp_path)
    other = SimpleNamespace(memory=SimpleNamespace(base_sha256="1" * 64))
    with pytest.raises(FoldinError, match=r"E_ARCHIVE expert, file archive\.json: the archive is of another base"):
        write_restored(tmp_path / "archive", record, other, tmp_path / "else", "expert")
    name = "pooler.dense.weight"
    expert = changed(zoo / "expert-1", tmp_path, lambda own: {**own, name: own[name] * torch.nan})
    with pytest.raises(FoldinError, match=rf"E_ARCHIVE .*tensor {name}: a change cannot be packed.*not finite"):
        pack_all(tmp_path / "bad", base, Checkpoint.open(expert, ""), 0.01, "expert")


@pytest.mark.parametrize("run", ["", "0" * 32])
def test_what_the_history_says_of_an_archive_is_read_back(run):
    said = Archive("tiny", "a: b v3", 1_234_567, 89, 0.0098, "a" * 64, "b" * 64, "c" * 64, run).said
    groups = ("a: b v3", "1,234,567", "89", "0.0098", "a" * 64, "b" * 64, "c" * 64, run or None)
    assert SAID.fullmatch(said).groups() == groups
