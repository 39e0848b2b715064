"""Experts kept as compressed changes: smaller, as near as promised, used again when the original is gone."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from experiments.plain_client import register_expert
from flows.archives import archive_of, archives, opened
from flows.archiving import _tags, archive
from flows.doctor import check_line
from flows.memory import Folded, Memory
from flows.restoring import Record, restored
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import hash_tree, read_json
from registry.manifests import MANIFEST, write_manifest
from registry.records import FoldinError
from registry.store import tree_sha256

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def made(tmp_path_factory, furnish, prefect, zoo):
    """(foldin.toml, rows) of the line `tiny` with experts 1, 2 and 3, archived; `other` is like it, and empty.

    The third expert stores its tensors in two files, and rounded.
    """
    from flows.watch import watch

    root = tmp_path_factory.mktemp("archives")
    path = furnish(root) / "foldin.toml"
    tiny = path.read_text().partition("[lines.tiny]")[2]
    other = tiny.replace("lines.tiny", "lines.other").replace("tiny-experts", "other-experts")
    path.write_text(f"{path.read_text()}\n[lines.other]{other}")
    third = shutil.copytree(zoo / "expert-3", root / "expert-3")
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
    yield path, archive(at, "tiny", [], 0.01, "ann")
    house.cache_clear()


@pytest.fixture(scope="module")
def toml(made):
    return made[0]


@pytest.fixture
def at(reopened):
    return reopened


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


def test_a_lines_experts_are_archived_once_and_come_back_as_promised(at, made, toml, verbs, zoo):
    verb, rows = verbs(toml), made[1]
    assert [row["state"] for row in rows] == ["archived"] * 3
    for number, row in enumerate(rows, 1):
        assert (row["expert"], row["line"], row["reason"]) == (f"tiny-experts v{number}", "tiny", "")
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
        with opened(at, each) as folder:
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


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_archive_is_made_again_while_the_original_is_there(at, toml, verbs, kept):
    found = archive_of(at, folded(at, 1).tree_sha256)
    home = at.experts / found.restored_sha256[:2] / found.restored_sha256
    with kept(at):
        with at.mlflow.archives.opened("tiny", found.manifest_sha256) as folder:
            flip(folder / "changes/00001.safetensors")
        shutil.rmtree(home, ignore_errors=True)
        (told,) = check_line(at, "tiny")
        assert "run `foldin archive` again while the original is there" in told.remedy
        code, out, said = verbs(toml)("archive", "tiny", "--json")
        states = ["archived", "already archived", "already archived"]
        assert (code, [row["state"] for row in json.loads(out)]) == (0, states)
        assert "tiny-experts v1: its archive is not as it was" in said
        at = house(str(toml))
        assert list(check_line(at, "tiny")) == []
        assert restored(at, archive_of(at, folded(at, 1).tree_sha256))[0].folder == home
        # Gone with all its files, it comes back as well.
        with at.mlflow.archives.opened("tiny", found.manifest_sha256) as folder:
            shutil.rmtree(folder)
        (told,) = check_line(at, "tiny")
        assert (told.code, told.what, told.where) == ("E_SOURCE", "the archive is gone", found.where)
        assert "run `foldin archive` again" in told.remedy
        assert [row["state"] for row in archive(at, "tiny", ["v1"], 0.01, "ann")] == ["archived"]
        assert list(check_line(at, "tiny")) == []
        at.ledger.close()


def test_a_finer_archive_replaces_a_coarser_one_and_not_the_other_way(at, kept):
    coarse = archive_of(at, folded(at, 2).tree_sha256)
    with kept(at):
        for tolerance, state in ((0.1, "already archived"), (0.001, "archived"), (0.01, "already archived")):
            (row,) = archive(at, "tiny", ["task-2"], tolerance, "ann")
            assert row["state"] == state
        fine = archive_of(at, folded(at, 2).tree_sha256)
        assert fine.error <= 0.001 < coarse.error
        # Nobody asks for the coarser one any more, so nobody is told when it is lost.
        with at.mlflow.archives.opened("tiny", coarse.manifest_sha256) as folder:
            shutil.rmtree(folder)
        assert list(check_line(at, "tiny")) == []


def test_each_line_has_archives_of_its_own(at, toml, zoo, kept):
    from flows.watch import watch

    with kept(at):
        register_expert(tracking_uri(at.config), "other-experts", zoo / "expert-1", "task-1", artifact_root(at.config))
        watch("other", str(toml))
        (mine,) = open_version(at, "other", 2).memory.experts
        assert archive_of(at, mine.tree_sha256).line == "tiny"
        (row,) = archive(at, "other", [], 0.01, "ann")
        assert (row["state"], row["line"]) == ("archived", "other")
        assert archive_of(at, mine.tree_sha256, "other").line == "other"
        at.ledger.close()


def test_a_run_that_says_it_keeps_the_history_takes_no_archive_away(at, kept):
    found, kept_last = archive_of(at, folded(at, 1).tree_sha256), at.mlflow.runs.history_sha256("tiny")
    with kept(at):
        client = at.mlflow._client
        experiment = client.get_experiment_by_name("foldin/tiny").experiment_id
        client.create_run(experiment, tags={"foldin.history_of": "tiny"})
        assert at.mlflow.runs.history_sha256("tiny") == kept_last != ""
        # Even the oldest: the line's history names the run.
        client.create_run(experiment, start_time=1, tags={"foldin.history_of": "tiny"})
        with opened(at, found) as folder:
            assert Record.read(folder, "").tree_sha256 == found.tree_sha256
        client.delete_run(found.run)
        with opened(at, found) as folder:
            assert Record.read(folder, "").tree_sha256 == found.tree_sha256
        with pytest.raises(FoldinError, match="E_SOURCE archive of expert tiny-experts v1: the archive is gone"):
            opened(at, found._replace(run="0" * 32)).__enter__()


def test_an_upload_whose_manifest_is_another_one_did_not_arrive(at, tmp_path, kept):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a").write_bytes(b"a")
    manifest = write_manifest(tmp_path / "archive", {})
    with kept(at):
        assert at.mlflow.archives.keep("tiny", tmp_path / "archive", manifest)
        with pytest.raises(FoldinError, match=rf"E_MLFLOW .*{MANIFEST}: what was uploaded did not arrive whole"):
            at.mlflow.archives.keep("tiny", tmp_path / "archive", "0" * 64)


def test_an_expert_whose_weight_was_changed_since_is_not_replayed(at, toml, kept):
    with kept(at):
        at.mlflow._client.set_model_version_tag("tiny-experts", "3", "foldin.weight", "0.5")
        wanted = r"E_DIGEST expert tiny-experts v3: the expert's weight is not the one .* Expected 1\. Found 0\.5"
        with pytest.raises(FoldinError, match=wanted):
            replayed(toml, without=["v2"])
        # Its archive says with which weight it was folded.
        (row,) = archive(at, "tiny", ["v3"], 0.005, "ann")
        assert row["state"] == "archived"
        assert restored(at, archive_of(at, folded(at, 3).tree_sha256))[1].tags == {"foldin.task": "task-3"}


@pytest.mark.parametrize(("own", "text"), [(0.5, "0.5"), (1e-9, "0.000000001"), (999.125, "999.125")])
def test_an_archive_has_the_weight_that_the_expert_declared(own, text):
    expert = Folded("a", 1, "b", "", "", 1.0, weight=3 * own, declared=own)
    assert _tags(None, expert) == {"foldin.task": "b", "foldin.weight": text}


def test_what_an_older_foldin_remembers_of_an_expert_is_read(at, tmp_path):
    now = open_version(at, "tiny", 4)
    state = read_json(now.folder / "foldin/state.json")
    state["experts"] = [row[:7] for row in state["experts"]]
    (tmp_path / "foldin").mkdir()
    (tmp_path / "foldin/state.json").write_text(json.dumps(state))
    before = Memory.read(tmp_path)
    assert {each.declared for each in now.memory.experts} == {1.0}
    assert [each._replace(declared=1.0) for each in before.experts] == list(now.memory.experts)
    assert _tags(at, before.experts[0]) == {"foldin.task": "task-1"}


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_tolerance_out_of_range_is_refused(at, tolerance):
    with pytest.raises(FoldinError, match=r"E_ARCHIVE the tolerance is out of its range.*Give another --tolerance"):
        archive(at, "tiny", [], tolerance, "ann")


@pytest.mark.chaos
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


@pytest.mark.chaos
def test_without_an_archive_what_is_gone_is_said(at, toml, zoo):
    from flows.watch import watch

    uri, root = tracking_uri(at.config), artifact_root(at.config)
    version = register_expert(uri, "tiny-experts", zoo / "expert-4", "task-4", root)
    watch("tiny", str(toml))
    at.mlflow._client.delete_model_version("tiny-experts", str(version))
    with pytest.raises(FoldinError, match=f"E_SOURCE expert tiny-experts v{version}: the expert was deleted in MLflow"):
        replayed(toml, without=["v2"])
    # Our own copy is there: it can still be archived, and then replayed.
    (row,) = archive(at, "tiny", [f"v{version}"], 0.1, "ann")
    assert (row["state"], row["error"] <= 0.1) == ("archived", True)
    facts = replayed(toml, without=["v2"])
    assert facts["experts"][-1]["source"] == "archive"
    # No finer once our copy is lost too; the one that there is stays.
    mine = open_version(at, "tiny", at.ledger.line("tiny").champion).memory.experts[-1]
    shutil.rmtree(at.experts / mine.tree_sha256[:2] / mine.tree_sha256)
    (again,) = archive(at, "tiny", [f"v{version}"], 0.01, "ann")
    assert again == {**row, "state": "archived before, its original is gone", "error": again["error"]}
    (again,) = archive(at, "tiny", [f"v{version}"], 0.1, "ann")
    assert again == {**row, "state": "already archived", "error": again["error"]}


def test_a_copy_that_was_changed_is_not_archived_and_the_others_are(at, toml, zoo, verbs):
    from flows.watch import watch

    uri, root = tracking_uri(at.config), artifact_root(at.config)
    version = register_expert(uri, "tiny-experts", zoo / "expert-5", "task-5", root)
    watch("tiny", str(toml))
    *others, mine = open_version(at, "tiny", at.ledger.line("tiny").champion).memory.experts
    path = at.experts / mine.tree_sha256[:2] / mine.tree_sha256 / "model.safetensors"
    flip(path)
    code, out, said = verbs(toml)("archive", "tiny", "task-5", others[0].task, "--json")
    rows = json.loads(out)
    assert (code, [row["state"] for row in rows]) == (1, ["failed", "already archived"])
    wanted = f"E_DIGEST expert tiny-experts v{version}: the stored copy was changed after it was stored"
    assert wanted in rows[0]["reason"]
    assert wanted in said
    code, out, _ = verbs(toml)("archive", "tiny", "task-5")
    assert (code, "failed" in out) == (1, True)
    at = house(str(toml))
    assert archive_of(at, mine.tree_sha256) is None
