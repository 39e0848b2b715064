"""Checkpoints: what is written comes back, through foldin and through the libraries that users have."""

import json
import multiprocessing
import os
import resource
import signal
import weakref
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from registry import weights
from registry.records import FoldinError, TensorSpec
from registry.weights import DTYPES, Checkpoint, combined_sha256, content_sha256, spec_of, tensor_sha256
from registry.writer import plan_layout, write_checkpoint


def sample(seed=0):
    """One tensor of every dtype, a scalar, an empty one, and a transposed (not contiguous) one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"kind.{name}": (torch.rand(3, 5, generator=generator) * 9).to(dtype) for name, dtype in DTYPES.items()}
    weight = torch.randn(4, 6, generator=generator)
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "turned": weight.T}


def specs_of(tensors):
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


def write(folder, tensors, layout=None):
    specs = specs_of(tensors)
    return write_checkpoint(folder, specs, tensors.__getitem__, layout=layout or plan_layout(specs))


def equal(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in right
    )


def test_one_file_comes_back_through_foldin_and_safetensors(tmp_path):
    tensors = sample()
    written = write(tmp_path, tensors)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert equal(load_file(tmp_path / "model.safetensors"), tensors)
    checkpoint = Checkpoint.open(tmp_path)
    assert equal(dict(checkpoint), tensors)
    assert checkpoint.specs == specs_of(tensors)
    assert written == {"model.safetensors": sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()}


def test_shards_come_back_and_the_index_names_every_tensor(tmp_path):
    tensors = sample()
    specs = specs_of(tensors)
    layout = plan_layout(specs, max_bytes=130)
    assert len(layout) > 3
    write(tmp_path, tensors, layout)
    merged = {name: tensor for file in layout for name, tensor in load_file(tmp_path / file).items()}
    assert equal(merged, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in layout.items() for name in names}
    # 15 values of each dtype: 15 * (8+4+2+2+8+4+2+1+1+1) = 495; one float, no float, 24 floats: 4 + 0 + 96
    assert index["metadata"]["total_size"] == 495 + 100
    checkpoint = Checkpoint.open(tmp_path)
    assert equal(dict(checkpoint), tensors)
    assert checkpoint.layout == layout


def test_the_same_tensors_give_the_same_bytes_and_start_on_a_multiple_of_eight(tmp_path):
    first, second = write(tmp_path / "a", sample()), write(tmp_path / "b", sample())
    assert first == second
    for name in ("x", "xy", "xyz"):
        write(tmp_path / "c", {name: torch.ones(2)})
        content = (tmp_path / "c" / "model.safetensors").read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0


def test_the_content_digest_ignores_shards_and_sees_names_shapes_dtypes_and_values(tmp_path):
    tensors = sample()
    write(tmp_path / "one", tensors)
    write(tmp_path / "many", tensors, plan_layout(specs_of(tensors), max_bytes=100))
    assert content_sha256(Checkpoint.open(tmp_path / "one")) == content_sha256(tensors)
    assert content_sha256(Checkpoint.open(tmp_path / "many")) == content_sha256(tensors)
    grid = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    others = (
        {"y": grid},
        {"x": grid.reshape(4)},
        {"x": grid.view(torch.int32)},
        {"x": grid.flip(0)},
        {"x": grid, "y": grid},
    )
    assert len({content_sha256(other)[0] for other in ({"x": grid}, *others)}) == 6


def test_digests_follow_their_written_definition():
    tensor = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    # bfloat16 is the upper half of float32: 1.0 is 3f80, -2.0 is c000, both stored with the low byte first
    expected = sha256(b"BF16 [2]\n" + bytes.fromhex("803f00c0")).hexdigest()
    assert tensor_sha256(tensor) == expected
    assert combined_sha256({"x": "ab"}) == sha256(b'[["x", "ab"]]').hexdigest()


def test_a_visitor_sees_every_tensor_once_and_in_order(tmp_path):
    write(tmp_path, sample())
    seen = []
    _, digests = content_sha256(Checkpoint.open(tmp_path), visit=lambda name, tensor: seen.append(name))
    assert seen == sorted(sample()) == list(digests)
    assert list(content_sha256(Checkpoint.open(tmp_path), names=["scalar", "empty"])[1]) == ["empty", "scalar"]


def test_views_rename_and_choose_without_reading(tmp_path):
    tensors = {"vit.a": torch.ones(2), "vit.b": torch.zeros(3), "head.w": torch.ones(1)}
    write(tmp_path, tensors, {"m.safetensors": ["vit.b", "head.w", "vit.a"]})
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / "m.safetensors").rename(tmp_path / "gone")
    view = checkpoint.prefixed("vit.")
    assert list(view) == ["a", "b", "head.w"]
    assert view.layout == {"m.safetensors": ("b", "head.w", "a")}
    assert view.only(["a"]).specs == {"a": TensorSpec("F32", (2,))}
    (tmp_path / "gone").rename(tmp_path / "m.safetensors")
    assert torch.equal(view["a"], tensors["vit.a"])
    assert len(view.only(["a", "b"])) == 2
    assert "vit.a" not in view


def test_views_refuse_collisions_and_unknown_names(tmp_path):
    write(tmp_path, {"vit.a": torch.ones(2), "a": torch.zeros(3)})
    checkpoint = Checkpoint.open(tmp_path, "expert e v1")
    with pytest.raises(FoldinError, match=r"E_SCHEMA expert e v1, file model.safetensors, tensor .*a: renaming"):
        checkpoint.prefixed("vit.")
    with pytest.raises(FoldinError, match=r"E_SCHEMA .*tensor b"):
        checkpoint.only(["a", "b"])
    with pytest.raises(KeyError):
        checkpoint["b"]


def test_a_tensor_that_was_read_may_be_changed_and_the_file_stays(tmp_path):
    write(tmp_path, {"x": torch.arange(4.0)})
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint["x"].add_(1)
    assert torch.equal(checkpoint["x"], torch.arange(4.0))


def test_a_file_that_vanishes_or_changes_after_opening_is_named(tmp_path):
    write(tmp_path, {"x": torch.ones(2)})
    checkpoint = Checkpoint.open(tmp_path, "base")
    write(tmp_path, {"x": torch.ones(3)})
    with pytest.raises(FoldinError, match=r"E_SCHEMA base, file model.safetensors, tensor x: .*F32 \[2\].*F32 \[3\]"):
        checkpoint["x"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FoldinError, match=r"E_FORMAT base, file model.safetensors, tensor x"):
        checkpoint["x"]


def test_planned_shards_hold_everything_once_and_stay_within_their_size():
    specs = {f"t{number}": TensorSpec("F32", (number + 1,)) for number in range(10)} | {"big": TensorSpec("F64", (99,))}
    layout = plan_layout(specs, max_bytes=64)
    assert sorted(name for names in layout.values() for name in names) == sorted(specs)
    sizes = {
        file: sum(4 * specs[name].shape[0] for name in names) for file, names in layout.items() if "big" not in names
    }
    assert max(sizes.values()) <= 64
    assert [names for names in layout.values() if "big" in names] == [("big",)]
    assert next(iter(layout)) == f"model-00001-of-{len(layout):05}.safetensors"
    assert plan_layout(specs) == {"model.safetensors": ("big", *sorted(specs.keys() - {"big"}))}


def test_planned_files_start_with_wide_dtypes_so_that_all_are_aligned():
    specs = {"a": TensorSpec("BOOL", (3,)), "b": TensorSpec("F32", (1,)), "c": TensorSpec("F64", (1,))}
    assert plan_layout(specs) == {"model.safetensors": ("c", "b", "a")}


class Wrong(NamedTuple):
    code: str
    specs: dict
    layout: dict


F2 = TensorSpec("F32", (2,))
WRONG = {
    "other shape": Wrong("E_SCHEMA", {"x": TensorSpec("F32", (3,))}, {"m.safetensors": ["x"]}),
    "other rank": Wrong("E_SCHEMA", {"x": TensorSpec("F32", (2, 1))}, {"m.safetensors": ["x"]}),
    "other dtype": Wrong("E_SCHEMA", {"x": TensorSpec("F16", (2,))}, {"m.safetensors": ["x"]}),
    "integers for floats": Wrong("E_SCHEMA", {"x": TensorSpec("I32", (2,))}, {"m.safetensors": ["x"]}),
    "unsupported dtype": Wrong("E_DTYPE", {"x": TensorSpec("F8_E4M3", (2,))}, {"m.safetensors": ["x"]}),
    "negative length": Wrong("E_HEADER", {"x": TensorSpec("F32", (-2,))}, {"m.safetensors": ["x"]}),
    "in no file": Wrong("E_SCHEMA", {"x": F2}, {"m.safetensors": []}),
    "twice in a file": Wrong("E_SCHEMA", {"x": F2}, {"m.safetensors": ["x", "x"]}),
    "in two files": Wrong("E_SCHEMA", {"x": F2}, {"m.safetensors": ["x"], "n.safetensors": ["x"]}),
    "without a spec": Wrong("E_SCHEMA", {}, {"m.safetensors": ["x"]}),
    "path as name": Wrong("E_PATH", {"../x": F2}, {"m.safetensors": ["../x"]}),
    "control character": Wrong("E_PATH", {"x\n": F2}, {"m.safetensors": ["x\n"]}),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_tensor_unlike_its_spec_is_named_and_nothing_is_written(tmp_path, wrong):
    with pytest.raises(FoldinError) as caught:
        write_checkpoint(tmp_path, wrong.specs, lambda name: torch.ones(2), layout=wrong.layout)
    refusal = caught.value.refusal
    assert refusal.code == wrong.code
    assert "x" in refusal.tensor
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("file", ["../m.safetensors", "/m.safetensors", "m.bin", "a/m.safetensors", ".safetensors"])
def test_a_layout_cannot_write_outside_its_folder(tmp_path, file):
    with pytest.raises(FoldinError, match="E_PATH"):
        write_checkpoint(tmp_path / "in", {"x": F2}, lambda name: torch.ones(2), layout={file: ["x"]})
    assert os.listdir(tmp_path) == []


def test_an_exception_half_way_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    tensors = {name: torch.ones(8) for name in "abcd"}
    layout = plan_layout(specs_of(tensors), max_bytes=32)
    write(tmp_path, tensors, layout)

    def failing(name):
        if name == "c":
            raise RuntimeError("no more")
        return torch.zeros(8)

    with pytest.raises(RuntimeError, match="no more"):
        write_checkpoint(tmp_path, specs_of(tensors), failing, layout=layout)
    assert content_sha256(Checkpoint.open(tmp_path)) == content_sha256(tensors)
    assert sorted(os.listdir(tmp_path)) == sorted([*layout, "model.safetensors.index.json"])


def test_only_one_tensor_is_alive_at_a_time(tmp_path):
    earlier: list[weakref.ref] = []

    def fetch(name):
        assert all(reference() is None for reference in earlier)
        tensor = torch.ones(16)
        earlier.append(weakref.ref(tensor))
        return tensor

    specs = dict.fromkeys("abcd", TensorSpec("F32", (16,)))
    write_checkpoint(tmp_path, specs, fetch, layout=plan_layout(specs, max_bytes=128))
    assert len(earlier) == 4


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path):
    tensors = {name: torch.ones(2**16) for name in "abc"}  # 256 KiB each
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))  # the limit answers EFBIG where a full disk says ENOSPC
    try:
        with pytest.raises(FoldinError) as caught:
            write(tmp_path, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.refusal.code, caught.value.refusal.file) == ("E_DISK", "model.safetensors")
    assert "File too large" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("free", [0, 1])  # safetensors opens the file, and then torch does
def test_too_many_open_files_are_no_checkpoints_fault(tmp_path, descriptors, free):
    write(tmp_path, {"one": torch.ones(3)})
    checkpoint = Checkpoint.open(tmp_path)
    assert equal(dict(checkpoint), {"one": torch.ones(3)})
    with descriptors(free), pytest.raises(OSError, match="Too many open files"):
        checkpoint["one"]
    assert equal(dict(checkpoint), {"one": torch.ones(3)})


def test_a_file_that_could_not_be_opened_a_moment_ago_is_not_gone(tmp_path, descriptors, monkeypatch):
    write(tmp_path, {"one": torch.ones(3)})
    checkpoint, opened = Checkpoint.open(tmp_path), weights.safe_open

    def starved(*arguments, **options):
        with descriptors(0):
            return opened(*arguments, **options)

    monkeypatch.setattr(weights, "safe_open", starved)
    with pytest.raises(OSError, match="No such file") as caught:
        checkpoint["one"]
    assert not isinstance(caught.value, FileNotFoundError)


def test_a_file_that_is_gone_is(tmp_path):
    write(tmp_path, {"one": torch.ones(3)})
    checkpoint = Checkpoint.open(tmp_path, "version 1")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FoldinError, match=r"E_FORMAT version 1, file model.safetensors, tensor one: .*No such file"):
        checkpoint["one"]


def _write_until_killed(folder: Path, tensors, layout, last, channel):
    def fetch(name):
        if name == last:
            channel.send("here")
            signal.pause()
        return tensors[name]

    write_checkpoint(folder, specs_of(tensors), fetch, layout=layout)


@pytest.mark.parametrize("last", ["a", "b", "c", "d", "e"])
def test_a_killed_writer_leaves_no_file_under_a_final_name(tmp_path, last):
    tensors = {name: torch.ones(1000) for name in "abcde"}
    layout = plan_layout(specs_of(tensors), max_bytes=8000)
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    writer = fork.Process(target=_write_until_killed, args=(tmp_path, tensors, layout, last, there))
    writer.start()
    assert here.poll(30)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(30)
    assert writer.exitcode == -signal.SIGKILL
    assert os.listdir(tmp_path)
    assert all(name.startswith(".") and name.endswith(".tmp") for name in os.listdir(tmp_path))
    with pytest.raises(FoldinError, match="E_FORMAT"):
        Checkpoint.open(tmp_path)
    write(tmp_path, tensors, layout)
    assert content_sha256(Checkpoint.open(tmp_path)) == content_sha256(tensors)


def test_files_of_other_writers_are_read(tmp_path):
    tensors = sample() | {"turned": torch.ones(2)}
    save_file(tensors, tmp_path / "weights-of-a-friend.safetensors", metadata={"format": "pt", "note": "{[}]"})
    assert equal(dict(Checkpoint.open(tmp_path)), tensors)


@pytest.mark.integration
@pytest.mark.parametrize("max_bytes", [10**9, 20_000])
def test_transformers_loads_what_is_written(tmp_path, max_bytes):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=300, **sizes))
    model.config.save_pretrained(tmp_path)
    tensors = model.state_dict()
    write(tmp_path, tensors, plan_layout(specs_of(tensors), max_bytes))
    loaded, info = BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal(loaded.state_dict(), tensors)
