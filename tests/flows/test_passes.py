"""The two passes: one pass over many experts, many workers, a crash and its second run, a disk that is full."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import first_pass, parts, passes, second_pass
from flows.fitting import Fitted
from registry import writer
from registry.files import hash_tree
from registry.records import FoldinError

MATRIX = "encoder.layer.0.attention.self.query.weight"
BIAS = "encoder.layer.1.output.dense.bias"


@pytest.fixture(scope="module")
def team(zoo, tmp_path_factory):
    """Five experts of the tiny base: three that moved matrices, one that moved two tensors, one that moved nothing."""
    root = tmp_path_factory.mktemp("team")
    folders = [zoo / f"expert-{number}" for number in (1, 2, 3)]
    few, none = root / "few", root / "none"
    for folder in (few, none):
        shutil.copytree(zoo / "base", folder)
    tensors = load_file(few / "model.safetensors")
    tensors[MATRIX] += 0.01
    tensors[BIAS] -= 0.5
    save_file(tensors, few / "model.safetensors", {"format": "pt"})
    return [few, folders[0], none, folders[1], folders[2]]


@pytest.fixture
def small_parts(monkeypatch):
    """So little state in a part that the tiny model has several."""
    monkeypatch.setattr(parts, "PART_BYTES", 16 * 1024)


# many experts in one pass


@pytest.mark.parametrize(("method", "parameters"), [("opcm", {"energy": 0.4}), ("average", {}), ("magmax", {})])
@pytest.mark.parametrize("cut", [5, 2, 3])
def test_one_pass_over_many_experts_is_byte_for_byte_one_pass_each(zoo, team, bare_line, method, parameters, cut):
    settings = {"method": method, "parameters": parameters}
    together, apart = bare_line(zoo / "base", **settings), bare_line(zoo / "base", **settings)
    measures = []
    for batch in (team[:cut], team[cut:]):
        if batch:
            done = together.fold(*batch)
            measures += done.measures
    alone = [apart.fold(expert) for expert in team]
    assert done.bytes == alone[-1].bytes
    assert together.stats == apart.stats
    for batched, one in zip(measures, (each.measures[0] for each in alone), strict=True):
        nothing = [name for name in batched if name not in one]  # not moved by then: its measures are zero
        assert all(not any(batched[name]) for name in nothing)
        assert {name: found for name, found in batched.items() if name in one} == one
    folders = [line.serve(last.plan)[0] for line, last in ((together, done), (apart, alone[-1]))]
    assert hash_tree(folders[0]) == hash_tree(folders[1])


def test_an_expert_that_moved_nothing_counts_and_moves_nothing(zoo, team, bare_line):
    line = bare_line(zoo / "base")
    _, expert, none, *_ = team
    empty = line.fold(none)
    assert empty.plan.names == ()
    assert line.stats == (1.0, 0.0, 0.0)
    served, _ = line.serve(empty.plan)
    assert hash_tree(served)["model.safetensors"] == hash_tree(zoo / "base")["model.safetensors"]
    first = line.fold(expert)
    second = line.fold(none)
    assert first.bytes == second.bytes
    assert line.stats[0] == 3.0


def test_only_what_moved_is_kept(zoo, team, bare_line):
    line = bare_line(zoo / "base")
    done = line.fold(team[0])
    assert set(done.plan.names) == {MATRIX, BIAS}
    assert set(line.slots) == {f"{MATRIX}:total", f"{BIAS}:total"}


# many workers


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(zoo, team, bare_line, small_parts, workers):
    lines = [bare_line(zoo / "base", devices=("cpu",) * number) for number in (1, workers)]
    for batch in (team[:2], team[2:]):
        done = [line.fold(*batch) for line in lines]
        assert len(done[0].bytes) > 4  # parts and their index
        assert done[0].bytes == done[1].bytes
        assert done[0].measures == done[1].measures
        assert lines[0].stats == lines[1].stats
    served = [line.serve(each.plan) for line, each in zip(lines, done, strict=True)]
    assert hash_tree(served[0][0]) == hash_tree(served[1][0])
    assert served[0][1] == served[1][1]


def test_how_the_state_is_cut_changes_no_tensor_and_no_number(zoo, team, bare_line, monkeypatch):
    whole = bare_line(zoo / "base")
    done = [whole.fold(*team)]
    monkeypatch.setattr(parts, "PART_BYTES", 16 * 1024)
    cut = bare_line(zoo / "base", devices=("cpu",) * 2)
    done.append(cut.fold(*team))
    assert done[0].bytes.keys() == {"model.safetensors"}
    assert len(done[1].bytes) > 4
    assert whole.slots.keys() == cut.slots.keys()
    assert all(torch.equal(whole.slots[key], cut.slots[key]) for key in whole.slots)
    assert whole.stats == cut.stats
    assert hash_tree(whole.serve(done[0].plan)[0]) == hash_tree(cut.serve(done[1].plan)[0])


def test_the_parts_cost_about_the_same(zoo, team, bare_line, small_parts):
    plan = bare_line(zoo / "base").plan(*team)
    cut = parts.state_parts(plan)
    assert [name for part in cut for name in part.names] == list(plan.names)
    costs = [sum(parts.cost(plan, name) for name in part.names) for part in cut]
    assert max(costs) < 2.5 * sum(costs) / len(costs)


def test_progress_is_told_in_tensors(zoo, team, bare_line, small_parts, tmp_path):
    plan, told = bare_line(zoo / "base").plan(team[1]), []
    passes.fold_state(tmp_path / "state", tmp_path / "records", plan, ("cpu",), lambda *each: told.append(each))
    assert len(told) == len(parts.state_parts(plan))
    assert told == sorted(told)
    assert told[-1] == (len(plan.names), len(plan.names))


# a crash, and the second run


class Died(Exception):
    """What the test makes the fold end with."""


@pytest.fixture
def folds(monkeypatch):
    """The names of the tensors that were folded; `limit` makes it die when there are more."""

    class Folds(list):
        limit = 10**9

    folds, original = Folds(), first_pass._step

    def counted(plan, name, number, *rest):
        if len(folds) >= folds.limit:
            raise Died(name)
        folds.append(name)
        return original(plan, name, number, *rest)

    monkeypatch.setattr(first_pass, "_step", counted)
    return folds


def unfinished(folder):
    """Names of what a killed writer would leave."""
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("workers", [2, 3])
def test_a_crash_among_several_workers_resumes_to_the_same_bytes(zoo, team, bare_line, small_parts, folds, workers):
    line = bare_line(zoo / "base", devices=("cpu",) * workers)
    plan, expected, every = interrupted(line, team[1], folds, left=1)  # every worker had a part that it could finish
    assert not unfinished(line.root)
    folds.clear()
    done = line.run(plan)
    assert len(folds) < len(every)
    assert done.bytes == expected.bytes
    assert done.measures == expected.measures


def interrupted(line, expert, folds, left=None):
    """A plan whose first run died in the middle, or with `left` tensors to go; the digests of an undisturbed run; and
    what was folded in it.
    """
    from copy import copy

    plan, other = line.plan(expert), copy(line)
    other.root = line.root.with_name("undisturbed")
    expected = other.run(plan)
    every = list(folds)
    folds.clear()
    folds.limit = len(every) - left if left else len(every) // 2
    with pytest.raises(Died):
        line.run(plan)
    folds.limit = 10**9
    return plan, expected, every


def test_the_second_run_folds_only_what_the_first_did_not_finish(zoo, team, bare_line, small_parts, folds):
    line = bare_line(zoo / "base")
    plan, expected, every = interrupted(line, team[1], folds)
    left, cut = line.root / "state-0", parts.state_parts(plan)
    finished = [part for part in cut if (left / part.file).exists()]
    assert 0 < len(finished) < len(cut)
    assert not unfinished(line.root)
    assert not (left / writer.INDEX).exists()
    kept = {name for part in finished for name in part.names}
    folds.clear()
    done = line.run(plan)
    assert folds == [name for name in every if name not in kept]
    assert done.bytes == expected.bytes
    assert done.measures == expected.measures


def test_parts_of_another_plan_are_not_taken_for_this_one(zoo, team, bare_line, small_parts, folds):
    """The same names and sizes, cut alike: only what the plan says tells them apart."""
    one, other = bare_line(zoo / "base"), bare_line(zoo / "base", parameters={"energy": 0.9})
    for line in (one, other):
        line.fold(team[1])
    wanted = other.run(other.plan(team[3])).bytes
    done = one.run(one.plan(team[3]))
    assert done.bytes != wanted
    shutil.rmtree(other.root / "state-1"), shutil.rmtree(other.root / "records-1")
    shutil.copytree(done.folder, other.root / "state-1")
    shutil.copytree(done.records, other.root / "records-1")
    assert other.run(other.plan(team[3])).bytes == wanted


def test_a_finished_fold_is_found_whole(zoo, team, bare_line, small_parts, folds):
    line = bare_line(zoo / "base")
    plan = line.plan(team[1])
    first = line.run(plan)
    folds.clear()
    again = line.run(plan)
    assert not folds
    assert again.bytes == first.bytes
    assert again.measures == first.measures


def damage(folder, records, file):
    raw = bytearray((folder / file).read_bytes())
    raw[-3] ^= 1
    (folder / file).write_bytes(raw)


def remove_part(folder, records, file):
    (folder / file).unlink()


def remove_record(folder, records, file):
    (records / f"{file}.json").unlink()


def other_profile(folder, records, file):
    record = json.loads((records / f"{file}.json").read_text())
    record["profile"]["torch"] = "1.0"
    (records / f"{file}.json").write_text(json.dumps(record))


def other_plan(folder, records, file):
    record = json.loads((records / f"{file}.json").read_text())
    record["plan"] = "0" * 64
    (records / f"{file}.json").write_text(json.dumps(record))


def other_cut(folder, records, file):
    record = json.loads((records / f"{file}.json").read_text())
    record["measures"][0].popitem()
    (records / f"{file}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("spoil", [damage, remove_part, remove_record, other_profile, other_plan, other_cut])
def test_a_part_that_is_not_what_its_record_says_is_made_again(zoo, team, bare_line, small_parts, folds, spoil):
    line = bare_line(zoo / "base")
    plan = line.plan(team[1])
    first = line.run(plan)
    bytes_before = first.bytes
    part = parts.state_parts(plan)[1]
    spoil(first.folder, first.records, part.file)
    folds.clear()
    again = line.run(plan)
    assert set(folds) == {name for name in part.names if name in plan.kinds.projected}
    assert again.bytes == bytes_before
    assert again.measures == first.measures


def test_what_a_killed_writer_left_is_swept_away(zoo, team, bare_line, small_parts):
    line = bare_line(zoo / "base")
    left = line.root / "state-0"
    left.mkdir(parents=True)
    (left / ".model-00001-of-00005.safetensors.0123456789ab.tmp").write_bytes(b"half")
    done = line.fold(team[1])
    assert not unfinished(line.root)
    assert all(name.startswith("model") for name in done.bytes)


def test_a_worker_of_another_kind_is_refused(zoo, team, bare_line):
    line = bare_line(zoo / "base")
    plan = line.plan(team[1])
    with pytest.raises(FoldinError, match="a worker has another torch") as caught:
        line.run(replace(plan, profile={**plan.profile, "torch": "1.0"}))
    assert caught.value.refusal.code == "E_PROFILE"


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from flows import first_pass, parts, passes

root, plan = Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes())
parts.PART_BYTES, limit, original, calls = 16 * 1024, int(sys.argv[3]), first_pass._step, []

def counted(*arguments):
    calls.append(arguments[1])
    if len(calls) == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

first_pass._step = counted
passes.fold_state(root / "state-0", root / "records-0", plan, ("cpu",))
print(len(calls))
"""


@pytest.mark.integration
def test_a_kill_in_the_middle_of_a_part_resumes_to_the_same_bytes(zoo, team, bare_line, small_parts, tmp_path):
    import pickle

    line = bare_line(zoo / "base")
    plan = line.plan(team[1])
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    matrices = len([name for name in plan.names if name in plan.kinds.projected])

    def life(limit):
        command = [sys.executable, "-c", KILLED, str(line.root), str(tmp_path / "plan"), str(limit)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert life(matrices // 2).returncode == -signal.SIGKILL
    assert unfinished(line.root)
    assert any((line.root / "state-0" / part.file).exists() for part in parts.state_parts(plan))
    second = life(10**9)
    assert (second.returncode, second.stderr) == (0, "")
    assert matrices // 2 <= int(second.stdout) < matrices
    assert not unfinished(line.root)
    fresh = bare_line(zoo / "base")
    assert hash_tree(line.root / "state-0") == fresh.run(plan).bytes


# what breaks


class Full:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, raw):
        self._room -= len(raw)
        if self._room < 0:
            raise OSError(28, os.strerror(28))
        return self._file.write(raw)


@pytest.fixture
def full_disk(monkeypatch):
    """A function that leaves room for so many bytes in every file written from then on; None: as many as there are."""
    from contextlib import contextmanager

    original, room = writer.replacing, []

    @contextmanager
    def replacing(path, *options):
        with original(path, *options) as file:
            yield Full(file, room[-1]) if room and room[-1] is not None else file

    monkeypatch.setattr(writer, "replacing", replacing)
    return room.append


def test_a_disk_that_fills_up_in_a_part_leaves_no_half_file_and_the_next_run_goes_on(
    zoo, team, bare_line, small_parts, full_disk
):
    line = bare_line(zoo / "base")
    plan = line.plan(team[1])
    full_disk(12 * 1024)
    with pytest.raises(FoldinError) as caught:
        line.run(plan)
    assert caught.value.refusal.code == "E_DISK"
    assert caught.value.refusal.file.startswith("model-0000")
    assert not unfinished(line.root)
    left = line.root / "state-0"
    assert not (left / caught.value.refusal.file).exists()
    full_disk(None)
    assert line.run(plan).bytes == bare_line(zoo / "base").run(plan).bytes


def test_a_disk_that_fills_up_in_the_second_pass_leaves_no_serving_file(zoo, team, bare_line, full_disk):
    line = bare_line(zoo / "base")
    done = line.fold(team[1])
    full_disk(20 * 1024)
    with pytest.raises(FoldinError) as caught:
        line.serve(done.plan)
    assert caught.value.refusal.code == "E_DISK"
    assert caught.value.refusal.file == "model.safetensors"
    assert not [path for path in (line.root / "serving-1").rglob("*") if path.is_file()]
    full_disk(None)
    line.serve(done.plan)


@pytest.mark.integration
def test_a_real_limit_on_the_size_of_files_is_a_full_disk(zoo, team, bare_line, tmp_path):
    import pickle

    line = bare_line(zoo / "base")
    (tmp_path / "plan").write_bytes(pickle.dumps(line.plan(team[1])))
    program = (
        "import pickle, resource, signal, sys; from pathlib import Path; from flows import passes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "root, plan = Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes())\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    passes.fold_state(root / 'state', root / 'records', plan, ('cpu',))\n"
        "except Exception as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(line.root), str(tmp_path / "plan")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "file model.safetensors: the file could not be written" in done.stdout, done.stderr
    assert not [path for path in line.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("whose", ["expert", "base", "slots"])
def test_a_file_that_ends_early_after_it_was_read_is_named_with_the_tensor(zoo, team, bare_line, tmp_path, whose):
    base, expert = (shutil.copytree(zoo / name, tmp_path / name) for name in ("base", "expert-1"))
    line = bare_line(base)
    line.fold(team[3])
    plan = line.plan(expert)
    path = {"expert": expert, "base": base, "slots": line.root / "state-0"}[whose] / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5_000)
    with pytest.raises(FoldinError) as caught:
        line.run(plan)
    refusal = caught.value.refusal
    assert (refusal.code, refusal.file) == ("E_FORMAT", "model.safetensors")
    assert refusal.where == {"expert": "expert expert-1", "base": "base", "slots": "state"}[whose]
    assert refusal.tensor.partition(":")[0] in plan.names
    assert not list((line.root / "state-1").glob("*"))


@pytest.mark.parametrize("whose", ["base", "slots"])
def test_a_file_that_ends_early_before_the_second_pass_is_named(zoo, team, bare_line, tmp_path, whose):
    base = shutil.copytree(zoo / "base", tmp_path / "base")
    line = bare_line(base)
    done = line.fold(team[1])
    path = {"base": base, "slots": line.root / "state-0"}[whose] / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5_000)
    with pytest.raises(FoldinError) as caught:
        line.serve(done.plan)
    refusal = caught.value.refusal
    assert (refusal.code, refusal.file) == ("E_FORMAT", "model.safetensors")
    assert refusal.where == {"base": "base", "slots": "state"}[whose]
    assert refusal.tensor.partition(":")[0] in done.plan.base
    assert not [path for path in (line.root / "serving-1").rglob("*") if path.is_file()]


def test_a_change_too_large_for_the_fold_is_the_experts_fault_and_names_the_tensor(zoo, huge, bare_line):
    line = bare_line(zoo / "base")
    line.fold(huge.folder)
    with pytest.raises(FoldinError) as caught:
        line.run(line.plan(huge.folder))
    assert (caught.value.refusal.code, caught.value.refusal.tensor) == ("E_FOLD", huge.tensor)


def test_a_merged_tensor_beyond_its_dtype_is_refused_by_name(zoo, bare_line, tmp_path):
    folders = [shutil.copytree(zoo / name, tmp_path / name) for name in ("base", "expert-1")]
    for folder, value in zip(folders, (0.0, 65_000.0), strict=True):
        tensors = {name: each.half() for name, each in load_file(folder / "model.safetensors").items()}
        tensors[BIAS] = torch.full_like(tensors[BIAS], value)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    line = bare_line(folders[0], method="task_arithmetic", parameters={"scale": 2.0})
    done = line.fold(folders[1])
    with pytest.raises(FoldinError, match="the merged tensor is not finite") as caught:
        line.serve(done.plan)
    assert (caught.value.refusal.code, caught.value.refusal.tensor) == ("E_FOLD", BIAS)
    assert not [path for path in (line.root / "serving-1").rglob("*") if path.is_file()]


@pytest.mark.parametrize("step", ["first pass", "second pass"])
def test_too_little_memory_names_the_tensor_and_blames_no_expert(zoo, team, bare_line, monkeypatch, step):
    line = bare_line(zoo / "base")
    done = line.fold(team[0])

    def greedy(*arguments):
        return torch.empty(2**46)  # more than a process can address

    module, called = (first_pass, "_step") if step == "first pass" else (second_pass, "state_in")
    monkeypatch.setattr(module, called, greedy)
    with pytest.raises(FoldinError, match="too little memory") as caught:
        line.run(line.plan(team[1])) if step == "first pass" else line.serve(done.plan)
    assert caught.value.refusal.code == "E_MEMORY"
    assert caught.value.refusal.tensor in load_file(zoo / "base" / "model.safetensors")
    assert not [path for path in (line.root / "serving-1").rglob("*") if path.is_file()]


def test_an_expert_is_read_only_where_it_moved(zoo, team, bare_line, monkeypatch):
    """A tensor that an expert left alone costs no reading of it."""
    line, read = bare_line(zoo / "base"), []
    plan, original = line.plan(*team), Fitted.__getitem__
    places = {id(each): at for at, each in enumerate(plan.experts)}

    def noted(self, name):
        read.append((places[id(self)], name))
        return original(self, name)

    monkeypatch.setattr(Fitted, "__getitem__", noted)
    line.run(plan)
    assert sorted(read) == sorted((at, name) for at, each in enumerate(plan.experts) for name in each.moved)


# state and serving weights in one pass


ONE_PASS = [("average", {}), ("task_arithmetic", {"scale": 0.4}), ("magmax", {})]


def once(line, plan, name):
    """One pass that makes both, into folders of its own."""
    state, serving = line.root / f"{name}-state", line.root / f"{name}-serving"
    made = passes.fold_once(state, line.root / f"{name}-records", serving, plan, line.devices)
    return (*made, state, serving)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("method", "parameters"), ONE_PASS)
def test_one_pass_gives_the_bytes_of_two(zoo, team, bare_line, small_parts, method, parameters, workers):
    line = bare_line(zoo / "base", devices=("cpu",) * workers, method=method, parameters=parameters)
    line.fold(*team[:2])
    plan = line.plan(*team[2:])
    assert plan.one_pass
    measures, serving, state, served = once(line, plan, "once")
    done = line.fold(*team[2:])
    folder, wanted = line.serve(plan)
    assert hash_tree(state) == done.bytes
    assert measures == done.measures
    assert serving == wanted
    weights = {path.name for path in folder.iterdir() if "safetensors" in path.name}
    assert weights
    assert all((served / name).read_bytes() == (folder / name).read_bytes() for name in weights)


def test_one_pass_over_an_expert_that_moved_nothing_writes_the_base(zoo, bare_line, team):
    line = bare_line(zoo / "base", method="average")
    plan = line.plan(team[2])  # it moved nothing: there is no state at all
    measures, serving, state, served = once(line, plan, "nothing")
    assert measures == [{}]
    assert not list(state.glob("*")) if state.exists() else True
    base, found = load_file(zoo / "base/model.safetensors"), load_file(served / "model.safetensors")
    assert all(torch.equal(found[name], base[name]) for name in base)
    assert serving.cast_loss == 0


def test_one_pass_goes_on_from_finished_parts(zoo, team, bare_line, small_parts, monkeypatch):
    line = bare_line(zoo / "base", method="average")
    plan = line.plan(*team[:2])
    wanted = once(line, plan, "whole")
    original, made = first_pass._fold_pieces, []

    def dying(plan, name, *rest):
        made.append(name)
        if len(made) == len(plan.names) - 3:
            raise OSError("the machine goes down")
        return original(plan, name, *rest)

    monkeypatch.setattr(first_pass, "_fold_pieces", dying)
    with pytest.raises(OSError, match="goes down"):
        once(line, plan, "broken")
    assert not (line.root / "broken-serving" / "model.safetensors").exists()
    assert not list(line.root.rglob("*.tmp"))
    made.clear()
    monkeypatch.setattr(
        first_pass, "_fold_pieces", lambda plan, name, *rest: made.append(name) or original(plan, name, *rest)
    )
    again = once(line, plan, "broken")
    assert 0 < len(made) < len(plan.names)
    assert again[:2] == wanted[:2]
    assert hash_tree(again[2]) == hash_tree(wanted[2])
    assert hash_tree(again[3]) == hash_tree(wanted[3])
