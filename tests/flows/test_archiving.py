"""Experts kept as compressed changes: smaller, as near as promised, used again when the original is gone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.plain_client import register_expert
from flows.archiving import archive
from flows.doctor import check_line
from flows.restoring import Record, archive_of, archives, restored
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import hash_tree
from registry.records import FoldinError
from registry.store import tree_sha256

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish, prefect, zoo):
    """The line `tiny` with experts 1, 2 and 3; the third stores its tensors in two files, and rounded."""
    from flows.watch import watch

    root = tmp_path_factory.mktemp("archives")
    path, third = furnish(root) / "foldin.toml", shutil.copytree(zoo / "expert-3", root / "expert-3")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(third / "model.safetensors").items()}
    names = sorted(tensors)
    weight_map = {}
    for number, mine in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in mine}, third / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (third / "model.safetensors").unlink()
    (third / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    at = house(str(path))
    for number, folder in enumerate((zoo / "expert-1", zoo / "expert-2", third), 1):
        register_expert(tracking_uri(at.config), "tiny-experts", folder, f"task-{number}", artifact_root(at.config))
    watch("tiny", str(path))
    yield path
    house.cache_clear()


@pytest.fixture
def at(toml):
    house.cache_clear()
    found = house(str(toml))
    yield found
    found.ledger.close()


def replayed(toml, **wanted):
    from flows.replay import replay

    return replay("tiny", "a test", who="ann", config_file=str(toml), **wanted)


def folded(at, number):
    return open_version(at, "tiny", 4).memory.experts[number - 1]


def moved_by(expert, base):
    """The norm of the difference of two checkpoints' folders, float64."""
    one, other = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (expert, base)
    )
    assert one.keys() == other.keys()
    return sum(float((one[name].double() - other[name].double()).norm()) ** 2 for name in one) ** 0.5


def test_a_lines_experts_are_archived_once_and_come_back_as_promised(at, toml, verbs, zoo):
    verb = verbs(toml)
    code, out, said = verb("archive", "tiny", "--json")
    rows = json.loads(out)
    assert (code, [row["state"] for row in rows]) == (0, ["archived"] * 3)
    assert "tiny-experts v1: " in said
    at = house(str(toml))
    for number, row in enumerate(rows, 1):
        mine = folded(at, number)
        original = at.experts / mine.tree_sha256[:2] / mine.tree_sha256
        found = archive_of(at, mine.tree_sha256)
        assert row["before"] == found.before == sum(path.stat().st_size for path in original.rglob("*.*"))
        assert row["after"] == found.after < found.before
        files, record = restored(at, found)
        # Everything but the weights is what it was, and the weights are as near as the record says.
        was, is_ = hash_tree(original), hash_tree(files.folder)
        changed = {name for name in was.keys() | is_.keys() if was.get(name) != is_.get(name)}
        assert changed
        assert all("safetensors" in name for name in changed)
        assert {name for name in was if name.endswith("safetensors")} == set(record.layout)
        assert tree_sha256(is_) == files.tree_sha256 == record.restored_tree_sha256 == found.restored_sha256
        measured = moved_by(files.folder, original) / moved_by(original, zoo / "base")
        assert measured == pytest.approx(record.error, rel=1e-4)
        assert row["error"] == pytest.approx(record.error, rel=1e-3)
        assert 0 < record.error <= 0.01 == record.tolerance
        assert (record.weights_sha256, record.tags) == (mine.weights_sha256, {"foldin.task": mine.task})
        assert record.base_sha256 == open_version(at, "tiny", 1).memory.weights_sha256
    kinds = {each.form for each in record.tensors.values()}
    assert {"same", "dense"} <= kinds
    # Again it does nothing, and a replay with the originals is what it was.
    events = len(at.ledger.events("tiny"))
    code, out, _ = verb("archive", "tiny", "task-2")
    assert (code, "already archived" in out, "tiny-experts v1" in out) == (0, True, False)
    at = house(str(toml))
    assert len(at.ledger.events("tiny")) == events
    facts = replayed(toml, without=["v2"])
    assert [(each["source"], each["error"]) for each in facts["experts"]] == [("original", 0.0)]
    assert "archived" in verb("log", "tiny")[1]
    # Nothing of it is garbage.
    assert verb("gc", "tiny", "--keep", 5, "--yes")[0] == 0
    at = house(str(toml))
    assert len(archives(at)) == 3
    for each in archives(at):
        with at.mlflow.archives.opened("tiny", each.manifest_sha256) as folder:
            assert Record.read(folder, "").tree_sha256 == each.tree_sha256
    assert list(check_line(at, "tiny")) == []


def test_a_flipped_bit_or_a_lost_file_of_an_archive_is_named(at):
    found = archive_of(at, folded(at, 1).tree_sha256)
    home = at.experts / found.restored_sha256[:2] / found.restored_sha256
    shutil.rmtree(home, ignore_errors=True)
    with at.mlflow.archives.opened("tiny", found.manifest_sha256) as folder:
        for name in ("changes/00001.safetensors", "archive.json", "files/suite.json", "foldin/manifest.json"):
            content = (folder / name).read_bytes()
            flipped = bytearray(content)
            flipped[len(flipped) // 2] ^= 1
            for wrong in (bytes(flipped), None):
                (folder / name).write_bytes(wrong) if wrong else (folder / name).unlink()
                with pytest.raises(FoldinError, match=f"E_DIGEST archive of expert tiny-experts v1, file {name}: "):
                    restored(at, found)
                told = [(each.code, each.where, each.file) for each in check_line(at, "tiny")]
                assert told == [("E_DIGEST", "archive of expert tiny-experts v1", name)]
                (folder / name).write_bytes(content)
        aside = shutil.move(folder, folder.with_name("aside"))
        with pytest.raises(FoldinError, match="E_SOURCE archive"):
            restored(at, found)
        assert [each.code for each in check_line(at, "tiny")] == ["E_SOURCE"]
        shutil.move(aside, folder)
    assert not home.exists()
    assert restored(at, found)[0].folder == home


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_tolerance_out_of_range_is_refused(at, tolerance):
    with pytest.raises(FoldinError, match="E_ARCHIVE the tolerance is out of its range"):
        archive(at, "tiny", [], tolerance, "ann")


def test_an_expert_that_is_gone_is_replayed_from_its_archive(at, toml, verbs):
    exact = replayed(toml, without=["v1"])
    before = {number: open_version(at, "tiny", number).memory for number in (4, exact["version"])}
    # The team deletes two versions, and the artifacts of the third; our own copies are lost as well.
    client = at.mlflow._client
    (source,) = [at.mlflow.fetch(each) for each in at.mlflow.newer("tiny-experts", 2)]
    for number in (1, 2):
        client.delete_model_version("tiny-experts", str(number))
    shutil.rmtree(source)
    shutil.rmtree(at.experts)
    shutil.rmtree(at.scores)
    facts = replayed(toml, without=["v1"])
    assert [each["state"] for each in facts["experts"]] == ["folded"] * 2
    assert [each["source"] for each in facts["experts"]] == ["archive"] * 2
    assert all(0 < each["error"] <= 0.01 for each in facts["experts"])
    assert facts["version"] != exact["version"]
    near = {task: abs(each["branch"] - exact["scores"][task]["branch"]) for task, each in facts["scores"].items()}
    assert len(near) == 2
    assert max(near.values()) <= 0.1
    # The memory says what was folded, and the merge has a name of its own.
    now = open_version(at, "tiny", facts["version"]).memory
    was = before[exact["version"]]
    for mine, theirs in zip(now.experts, was.experts, strict=True):
        _, record = restored(at, archive_of(at, theirs.tree_sha256))
        assert (mine.model, mine.version, mine.task) == (theirs.model, theirs.version, theirs.task)
        assert mine.weights_sha256 == record.restored_weights_sha256 != theirs.weights_sha256
        assert mine.tree_sha256 == record.restored_tree_sha256
        assert mine.delta_norm == pytest.approx(theirs.delta_norm, rel=0.01)
    moved = moved_by(*(at.mlflow.folder("tiny", number) for number in (facts["version"], exact["version"])))
    assert 0 < moved < 0.05 * moved_by(at.mlflow.folder("tiny", exact["version"]), at.mlflow.folder("tiny", 1))
    assert now.suites == was.suites
    assert list(check_line(at, "tiny")) == []
    # Found again, from what it folded too, and said.
    code, out, said = verbs(toml)("replay", "tiny", "--without", "v1", "--because", "again", "--promote", "--json")
    again = json.loads(out)
    assert (code, again["version"], again["promoted"]) == (0, facts["version"], True)
    assert "its original is gone; from its archive" in said
    assert "beside the champion, from its archive" in said
    code, out, _ = verbs(toml)("replay", "tiny", "--without", "v2", "--because", "once more")
    assert (code, "from its archive" in out) == (0, True)
    code, out, _ = verbs(toml)("archive", "tiny", "--json")
    assert {row["state"] for row in json.loads(out)} == {"already archived"}


def test_without_an_archive_what_is_gone_is_said(at, toml, zoo):
    from flows.watch import watch

    register_expert(tracking_uri(at.config), "tiny-experts", zoo / "expert-4", "task-4", artifact_root(at.config))
    watch("tiny", str(toml))
    at.mlflow._client.delete_model_version("tiny-experts", "4")
    with pytest.raises(FoldinError, match="E_SOURCE expert tiny-experts v4: the expert was deleted in MLflow"):
        replayed(toml, without=["v2"])
    # Our own copy is there: it can still be archived, and then replayed.
    (row,) = archive(at, "tiny", ["v4"], 0.1, "ann")
    assert (row["state"], row["error"] <= 0.1) == ("archived", True)
    facts = replayed(toml, without=["v2"])
    assert [each["source"] for each in facts["experts"]] == ["archive"] * 2


def test_a_copy_that_was_changed_is_not_archived(at, toml, zoo):
    from flows.watch import watch

    register_expert(tracking_uri(at.config), "tiny-experts", zoo / "expert-5", "task-5", artifact_root(at.config))
    watch("tiny", str(toml))
    mine = open_version(at, "tiny", at.ledger.line("tiny").champion).memory.experts[-1]
    path = at.experts / mine.tree_sha256[:2] / mine.tree_sha256 / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FoldinError, match="E_DIGEST expert tiny-experts v5: the stored copy was changed"):
        archive(at, "tiny", ["v5"], 0.01, "ann")
    assert archive_of(at, mine.tree_sha256) is None
    assert torch.is_tensor(load_file(path)["embeddings.word_embeddings.weight"])
