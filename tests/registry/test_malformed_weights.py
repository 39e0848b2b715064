"""Every way a safetensors file or index can be wrong is refused by name, before anything is allocated."""

import json
import os
import random
import shutil
import zipfile
from io import BytesIO

import pytest
import torch

from registry.files import sha256_file
from registry.records import FoldinError
from registry.weights import Checkpoint, content_sha256, spec_of
from registry.writer import plan_layout, write_checkpoint

SEED = 20240
FILES_PER_CLASS = 12


def entries(rng):
    """A correct header of five tensors and its data."""
    header, data = {}, b""
    for number in range(5):
        dtype, size = rng.choice([("F32", 4), ("BF16", 2), ("I64", 8), ("U8", 1)])
        shape = [rng.randint(1, 5), rng.randint(1, 5)]
        begin = len(data)
        data += rng.randbytes(shape[0] * shape[1] * size)
        header[f"layer.{number}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    return header, data


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edited(edit):
    """A class of bad files: a correct one in which `edit(rng, entry, header)` spoils one tensor's entry."""

    def make(rng):
        header, data = entries(rng)
        edit(rng, header[rng.choice(sorted(header))], header)
        return packed(header, data)

    return make


def whole(change):
    """A class of bad files: `change(rng, bytes)` of a correct one."""
    return lambda rng: change(rng, packed(*entries(rng)))


def put(key, value):
    return edited(lambda rng, entry, header: entry.__setitem__(key, value(rng, entry)))


def shifted(first, second):
    return put("data_offsets", lambda rng, e: [e["data_offsets"][0] + first, e["data_offsets"][1] + second])


def renamed(name):
    return edited(lambda rng, entry, header: header.__setitem__(name, header.pop("layer.4.weight")))


def reheaded(change):
    def make(rng):
        header, data = entries(rng)
        return packed(change(json.dumps(header).encode()), data)

    return make


def zipped(rng):
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", rng.randbytes(200))
    return archive.getvalue()


def pickled(rng):
    archive = BytesIO()
    torch.save({"x": torch.ones(3)}, archive, _use_new_zipfile_serialization=False)
    return archive.getvalue()


DUPLICATE = b', "layer.0.weight": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
CLASSES = {  # name -> (code, names the tensor?, maker)
    "empty file": ("E_FORMAT", False, lambda rng: b""),
    "cut in the length": ("E_FORMAT", False, whole(lambda rng, file: file[: rng.randint(1, 8)])),
    "cut in the header": ("E_FORMAT", False, whole(lambda rng, file: file[: rng.randint(9, 100)])),
    "cut in the data": ("E_FORMAT", True, whole(lambda rng, file: file[: -rng.randint(1, 5)])),
    "bytes at the end": ("E_FORMAT", False, whole(lambda rng, file: file + rng.randbytes(rng.randint(1, 64)))),
    "huge header length": (
        "E_HEADER",
        False,
        whole(lambda rng, file: rng.randint(2**25, 2**64 - 1).to_bytes(8, "little") + file[8:]),
    ),
    "length a little off": ("E_", False, whole(lambda rng, file: bytes([file[0] ^ rng.randint(1, 7)]) + file[1:])),
    "zip renamed": ("E_FORMAT", False, zipped),
    "pickle renamed": ("E_FORMAT", False, pickled),
    "random bytes": ("E_FORMAT", False, lambda rng: b"\x00" * 8 + rng.randbytes(100)),
    "header no JSON": ("E_HEADER", False, reheaded(lambda text: text[:-1] + b" ")),
    "header no UTF-8": ("E_HEADER", False, reheaded(lambda text: text.replace(b"layer.1", b"layer\xff1"))),
    "two headers": ("E_HEADER", False, reheaded(lambda text: text + text)),
    "deep JSON": ("E_HEADER", False, reheaded(lambda text: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "duplicate tensor": ("E_HEADER", False, reheaded(lambda text: text[:-1] + DUPLICATE)),
    "metadata no text": ("E_HEADER", False, edited(lambda rng, e, header: header.update(__metadata__={"n": 1}))),
    "entry no object": ("E_HEADER", True, edited(lambda rng, e, header: header.update({"layer.9": [1]}))),
    "entry without shape": ("E_HEADER", True, edited(lambda rng, entry, header: entry.pop("shape"))),
    "entry with more": ("E_HEADER", True, put("stride", lambda rng, entry: [1])),
    "unknown dtype": ("E_DTYPE", True, put("dtype", lambda rng, entry: rng.choice(["F31", "f32", "", "F32 "]))),
    "eight-bit float": ("E_DTYPE", True, put("dtype", lambda rng, entry: rng.choice(["F8_E4M3", "F8_E5M2", "F4"]))),
    "dtype no text": ("E_DTYPE", True, put("dtype", lambda rng, entry: rng.choice([None, 32, ["F32"]]))),
    "dtype of another size": ("E_HEADER", True, put("dtype", lambda rng, e: "F64" if e["dtype"] != "I64" else "F32")),
    "shape too large": ("E_HEADER", True, put("shape", lambda rng, entry: [entry["shape"][0] + 1, entry["shape"][1]])),
    "2^63 elements": ("E_HEADER", True, put("shape", lambda rng, entry: [2 ** rng.randint(63, 70)])),
    "product overflows": ("E_HEADER", True, put("shape", lambda rng, entry: [2**62, 2**62, 2 ** rng.randint(4, 62)])),
    "negative length": ("E_HEADER", True, put("shape", lambda rng, entry: [-1, -entry["shape"][0]])),
    "shape of booleans": ("E_HEADER", True, put("shape", lambda rng, entry: [True, 1.0])),
    "a thousand dimensions": ("E_HEADER", True, put("shape", lambda rng, entry: [1] * 1000)),
    "offsets negative": ("E_HEADER", True, put("data_offsets", lambda rng, e: [-1, e["data_offsets"][1]])),
    "offsets reversed": ("E_HEADER", True, put("data_offsets", lambda rng, e: e["data_offsets"][::-1])),
    "three offsets": ("E_HEADER", True, put("data_offsets", lambda rng, e: [*e["data_offsets"], 0])),
    "offsets past the end": ("E_HEADER", True, shifted(10_000, 10_000)),
    "overlap or hole": ("E_HEADER", True, shifted(1, 1)),
    "two tensors share bytes": (
        "E_HEADER",
        True,
        edited(lambda rng, entry, header: header.update({"copy": dict(entry)})),
    ),
    "name climbs": ("E_PATH", True, renamed("../../evil")),
    "name absolute": ("E_PATH", True, renamed("/etc/passwd")),
    "name with NUL": ("E_PATH", True, renamed("layer\0weight")),
    "name turns text": ("E_PATH", True, renamed("layer\u202eweight")),
    "name too long": ("E_PATH", True, renamed("n" * 513)),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_malformed_files_are_refused_naming_file_and_tensor(tmp_path, kind):
    code, names_tensor, make = CLASSES[kind]
    rng = random.Random(f"{SEED} {kind}")
    for number in range(FILES_PER_CLASS):
        (tmp_path / "model.safetensors").write_bytes(make(rng))
        with pytest.raises(FoldinError) as caught:
            Checkpoint.open(tmp_path, "expert e v1")
        refusal = caught.value.refusal
        assert refusal.code.startswith(code), (kind, number, refusal)
        assert "expert e v1, file model.safetensors" in str(refusal)
        assert bool(refusal.tensor) is names_tensor or code == "E_", (kind, number, refusal)
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 1200


def test_the_correct_file_that_the_classes_start_from_is_accepted(tmp_path):
    rng = random.Random(SEED)
    for _ in range(FILES_PER_CLASS):
        (tmp_path / "model.safetensors").write_bytes(packed(*entries(rng)))
        assert len(Checkpoint.open(tmp_path)) == 5


def test_every_truncation_of_a_file_is_refused(tmp_path):
    content = packed(*entries(random.Random(SEED)))
    for length in range(len(content)):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(FoldinError, match=r"file model\.safetensors"):
            Checkpoint.open(tmp_path)


def test_every_flipped_bit_is_refused_or_seen_by_a_digest(tmp_path):
    header, data = entries(random.Random(SEED))
    content = packed(header, data)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    file_digest, content_digest = sha256_file(path), content_sha256(Checkpoint.open(tmp_path))[0]
    rng = random.Random(SEED)
    refused = 0
    for bit in rng.sample(range(8 * len(content)), 400):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert sha256_file(path) != file_digest
        try:
            assert content_sha256(Checkpoint.open(tmp_path))[0] != content_digest
        except FoldinError:
            refused += 1
    assert 0 < refused < 400


@pytest.fixture
def sharded(tmp_path):
    tensors = {name: torch.ones(8) for name in "abc"}
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, specs, tensors.__getitem__, layout=plan_layout(specs, max_bytes=32))
    return tmp_path


def reindex(folder, **changes):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


HOSTILE = ["/etc/passwd", "../../x", "../x.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:\\x.safetensors"]
HOSTILE += ["x.bin", "", ".", "x\0.safetensors", "%2e%2e/x.safetensors", "x" * 4096 + ".safetensors", 7, None, ["x"]]
HOSTILE += ["x\uff0fy.safetensors", "x.safetensors\n", "~/x.safetensors", "s3://b/x.safetensors"]


@pytest.mark.parametrize("file", HOSTILE)
def test_an_index_can_only_name_plain_files_of_its_folder(sharded, file):
    reindex(sharded, b=file)
    with pytest.raises(FoldinError) as caught:
        Checkpoint.open(sharded)
    refusal = caught.value.refusal
    assert (refusal.code, refusal.file, refusal.tensor) == ("E_PATH", "model.safetensors.index.json", "b")


def refusal_of(folder):
    with pytest.raises(FoldinError) as caught:
        Checkpoint.open(folder)
    return caught.value.refusal


def test_an_index_that_disagrees_with_its_files_is_refused(sharded):
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    reindex(sharded, b=first)
    assert refusal_of(sharded).file == second  # no tensor of the index lies there
    reindex(sharded, b=second, ghost=first)
    assert (refusal_of(sharded).code, refusal_of(sharded).tensor) == ("E_FORMAT", "ghost")
    reindex(sharded, ghost="gone.safetensors")
    assert refusal_of(sharded).file == "gone.safetensors"


def test_a_tensor_in_two_files_and_a_file_outside_the_index_are_refused(sharded):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model-00002-of-00003.safetensors")
    assert "two files" in refusal_of(sharded).what
    assert refusal_of(sharded).tensor == "a"
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "other.safetensors")
    assert refusal_of(sharded).file == "other.safetensors"


def test_an_index_must_be_one_json_object(sharded):
    index = sharded / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}', '{"a":' * 9000):
        index.write_text(text)
        assert refusal_of(sharded).file == index.name
    index.unlink()
    assert refusal_of(sharded).what == "this is not one whole checkpoint"
    for part in (2, 3):
        (sharded / f"model-0000{part}-of-00003.safetensors").unlink()
    assert refusal_of(sharded).file == "model-00001-of-00003.safetensors"  # one part alone is not a checkpoint


KINDS = {
    "link": lambda path, good: path.symlink_to(good),
    "pipe": lambda path, good: os.mkfifo(path),
    "folder": lambda path, good: path.mkdir(),
    "dangling link": lambda path, good: path.symlink_to("nowhere"),
    "device": lambda path, good: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(5)
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened_and_a_pipe_does_not_hang(tmp_path, kind):
    good = tmp_path / "good"
    good.write_bytes(packed(*entries(random.Random(SEED))))
    (tmp_path / "in").mkdir()
    KINDS[kind](tmp_path / "in" / "model.safetensors", good)
    refusal = refusal_of(tmp_path / "in")
    assert (refusal.code, refusal.file) == ("E_FILETYPE", "model.safetensors")


def test_a_folder_that_cannot_be_opened_for_want_of_descriptors_is_not_refused(sharded, descriptors):
    with descriptors(0), pytest.raises(OSError, match="Too many open files"):
        Checkpoint.open(sharded)


def test_a_missing_folder_is_unreachable(tmp_path):
    assert refusal_of(tmp_path / "nowhere").code == "E_UNREACHABLE"


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda folder, shard: shard.unlink(), "upload it beside model.safetensors.index.json"),
        (lambda folder, shard: shutil.copy(shard, folder / "more.safetensors"), "remove it, or name it in model.saf"),
        (
            lambda folder, shard: (folder / "model.safetensors.index.json").unlink(),
            "upload model.safetensors.index.json",
        ),
    ],
)
def test_the_remedy_is_about_the_file_that_is_wrong(sharded, change, remedy):
    change(sharded, sorted(sharded.glob("*.safetensors"))[0])
    with pytest.raises(FoldinError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.refusal.remedy.startswith(remedy)
