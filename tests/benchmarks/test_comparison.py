"""Both sides of the step benchmark do the same sum, and the benchmarks run as programs."""

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ours, reference
from benchmarks.harness import Side, SideError, run_side
from benchmarks.shapes import vit_b32
from benchmarks.stages import Watch, classify, profile
from benchmarks.synthetic import make
from registry.weights import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHAPE = vit_b32(layers=1, width=64)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tiny tower, and two versions of foldin's."""
    root = make(tmp_path_factory.mktemp("tower"), SHAPE, experts=3)
    for number in (1, 2):
        ours.fold(**fold_arguments(root, number))
    return root


def fold_arguments(root, number):
    parent = str(root / f"foldin-{number - 1}") if number > 1 else None
    folders = {"base": str(root / "base"), "expert": str(root / f"expert-{number}"), "parent": parent}
    return {**folders, "out": str(root / f"foldin-{number}"), "projected": list(SHAPE.linear)}


def test_foldin_and_the_reference_make_the_same_model(tower, tmp_path):
    told = ours.fold(**fold_arguments(tower, 3))
    assert told.keys() == {"fold_seconds", "materialise_seconds", "cast_loss"}
    merged = tower / "expert-1"
    for number in (2, 3):
        out = tmp_path / str(number)
        expert = str(tower / f"expert-{number}")
        reference.run(str(tower / "base"), str(merged), expert, str(out), list(SHAPE.linear), "F64")
        merged = out
    base, found, wanted = (Checkpoint.open(folder) for folder in (tower / "base", tower / "foldin-3", merged))
    for name in base:
        error = (found[name].double() - wanted[name]).norm() / (wanted[name] - base[name].double()).norm()
        assert float(error) < 1e-4, name


def test_operations_are_charged_to_stages(tower, tmp_path):
    matrix = torch.randn(8, 4, dtype=torch.float64)
    with Watch() as watch:
        torch.linalg.eigh(matrix.mT @ matrix)
        matrix @ torch.ones(4, 3, dtype=torch.float64)
    assert watch.flops["factorisation"] == pytest.approx(14 / 3 * 4**3)
    assert watch.flops["products_float64"] == 2 * 8 * 4 * 4 + 2 * 8 * 4 * 3
    assert classify("add", (matrix,)) == ("rest", 0.0)
    told = profile({**fold_arguments(tower, 3), "out": str(tmp_path)}, size=64)
    assert told["products_float64_gflop"] > 0
    assert told["bound_seconds"] > 0


def test_a_side_may_be_a_program(tmp_path):
    script = "import sys; block = bytearray(b'x') * (200 << 20); {}"
    good = {"command": [sys.executable, "-c", script.format("print('talk'); print('{\"own\": 1.5}')")]}
    run = run_side(Side("program", "benchmarks.harness:launch", good), threads=1)
    assert run.programs
    assert run.details == {"own": 1.5}
    assert 200 < run.peak_rss_mb < 240
    bad = {"command": [sys.executable, "-c", script.format("sys.exit('it went wrong')")]}
    with pytest.raises(SideError, match="it went wrong"):
        run_side(Side("program", "benchmarks.harness:launch", bad), threads=1)


@pytest.mark.parametrize("name", ["gpu", "parallel", "reference", "report", "shapes", "stages", "targets"])
def test_the_examples_in_the_modules_hold(name):
    result = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def start(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.integration
@pytest.mark.chaos
def test_the_step_benchmark_prints_one_json_object(tmp_path):
    finished = start("benchmarks.step", "--quick", "--json", "--threads", "1", "--keep", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout)
    assert told["benchmark"] == "step"
    assert told["sides"].keys() == {"foldin", "reference"}
    assert told["sides"]["foldin"]["peak_rss_mb"] > told["sides"]["foldin"]["baseline_rss_mb"] > 0
    assert told["accuracy"]["foldin"]["whole"] < 1e-4
    assert told["accuracy"]["reference"]["whole"] < 1e-4
    (tmp_path / "vit-b32-2x128-seed-0/expert-3/model.safetensors").write_bytes(b"damaged")
    failed = start("benchmarks.step", "--quick", "--json", "--threads", "1", "--keep", str(tmp_path))
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "side 'foldin'" in failed.stderr


def test_peers_without_their_environment_say_what_to_do(tmp_path):
    failed = start("benchmarks.peers", "--peers", str(tmp_path))
    assert failed.returncode == 2
    assert "make bench-peers" in failed.stderr
