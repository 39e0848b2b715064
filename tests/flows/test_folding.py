"""One candidate in its folder: what a run that was killed left there is neither kept nor in the way."""

import shutil
from dataclasses import replace

import pytest

from flows import parts
from flows.folding import _folded, fold
from flows.recipe import Recipe
from flows.versions import STATE_FOLDER
from registry.files import hash_tree


@pytest.fixture
def candidate(zoo, bare_line, monkeypatch):
    """A function that folds one expert into a folder; what it wrote."""
    monkeypatch.setattr(parts, "PART_BYTES", 16 * 1024)

    def of(scratch, expert="expert-1", method="opcm", weight=1.0, factor=1.0):
        line = bare_line(zoo / "base", method=method)
        experts, recipe = [line.admitted(zoo / expert)], Recipe(method, {}, weight).stronger(factor)
        done = fold(scratch, line.settings, recipe, line.version, line.version, experts, lambda done, total: None)
        return hash_tree(done.folder)

    return of


@pytest.mark.parametrize("method", ["opcm", "average"])
def test_leftovers_of_a_killed_run_are_cleared_away(candidate, tmp_path, method):
    wanted = candidate(tmp_path / "clean", method=method)
    folder = tmp_path / "dirty" / "candidate"
    left = [
        "model-00001-of-00009.safetensors",
        "heads/old.safetensors",
        f"{STATE_FOLDER}/model-00099-of-00099.safetensors",
    ]
    for name in (*left, f"{STATE_FOLDER}/deep/er", "model.safetensors", ".half.0123456789ab.tmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left by another layout")
    assert candidate(tmp_path / "dirty", method=method) == wanted
    assert not (folder / "heads").exists()
    assert not (folder / STATE_FOLDER / "deep").exists()


def test_finished_parts_of_a_killed_run_are_kept(candidate, tmp_path):
    wanted = candidate(tmp_path / "whole")
    (tmp_path / "whole" / "fold.json").unlink()
    part = sorted((tmp_path / "whole/candidate" / STATE_FOLDER).glob("model-*.safetensors"))[0]
    before = part.stat().st_mtime_ns
    assert candidate(tmp_path / "whole") == wanted
    assert part.stat().st_mtime_ns == before


def test_a_finished_fold_is_not_made_again_unless_a_byte_of_it_has_changed(candidate, tmp_path):
    wanted, folder = candidate(tmp_path / "one"), tmp_path / "one" / "candidate"
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert candidate(tmp_path / "one") == wanted
    assert weights.stat().st_mtime_ns == before
    shutil.copyfile(folder / "config.json", weights)
    assert candidate(tmp_path / "one") == wanted


def test_another_strength_keeps_the_state_and_another_weight_does_not(candidate, tmp_path):
    def state(files):
        return {name: digest for name, digest in files.items() if name.startswith(f"{STATE_FOLDER}/")}

    plain, parts_of = candidate(tmp_path / "one"), tmp_path / "one/candidate" / STATE_FOLDER
    before = {path.name: path.stat().st_mtime_ns for path in parts_of.glob("model-*.safetensors")}
    stronger = candidate(tmp_path / "one", factor=1.5)
    assert {path.name: path.stat().st_mtime_ns for path in parts_of.glob("model-*.safetensors")} == before
    assert state(stronger) == state(plain)
    assert stronger["model.safetensors"] != plain["model.safetensors"]
    assert stronger == candidate(tmp_path / "fresh", factor=1.5)
    lighter = candidate(tmp_path / "one", weight=0.5)
    assert state(lighter) != state(plain)
    assert lighter == candidate(tmp_path / "light", weight=0.5)
    assert candidate(tmp_path / "one") == plain


def test_a_version_remembers_the_weight_that_the_expert_declared_and_the_one_it_was_folded_with(bare_line, zoo):
    line = bare_line(zoo / "base")
    expert = replace(line.admitted(zoo / "expert-1"), weight=0.5)
    found = _folded(line.plan(zoo / "expert-1"), expert, {}, 1.5)
    assert (found.weight, found.declared) == (1.5, 0.5)
