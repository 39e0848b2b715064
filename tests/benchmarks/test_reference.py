"""The transcription against the public implementation's own output (tests/golden)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.reference import load, project, run, step

GOLDEN = Path(__file__).parents[1] / "golden"
# The public code rescales this tensor but never adds an expert to it; see tests/golden/README.md.
STRANDED = ["embeddings.class_embedding"]
LAMBDA, DELTA = 1e-6, 1e-4


def distance(found, wanted, base):
    return float((found.double() - wanted.double()).norm() / (wanted.double() - base.double()).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["opcm_full_rank", "opcm_decaying_alpha03"])
def test_every_step_matches_the_public_implementation(name, dtype):
    folder = GOLDEN / name
    expected = json.loads((folder / "expected.json").read_text())
    base, merged = (
        {key: value.to(dtype) for key, value in load_file(folder / f"{file}.safetensors").items()}
        for file in ("base", "expert_0")
    )
    memory = None
    for t in range(2, len(expected["lambda_t"]) + 1):
        expert = {key: value.to(dtype) for key, value in load_file(folder / f"expert_{t - 1}.safetensors").items()}
        memory = step(base, merged, expert, memory, expected["projected"], expected["alpha"], STRANDED)
        assert memory.lambda_t == pytest.approx(expected["lambda_t"][t - 1], rel=LAMBDA)
        assert memory.norms == pytest.approx(expected["task_vector_norm"][:t], rel=LAMBDA)
        for key, wanted in load_file(folder / f"merged_after_{t}.safetensors").items():
            assert distance(merged[key], wanted, base[key]) < DELTA, key


def test_what_is_kept_is_orthogonal_to_the_total():
    tau, delta = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(float((project(tau, delta, 0.5) * tau).sum())) < 1e-12


def test_two_runs_from_disk_are_the_steps_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        tensors = {"w": torch.randn(5, 3, generator=generator), "b": torch.randn(5, generator=generator)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    base, merged, two, three = (load(tmp_path / name, torch.float64) for name in ("base", "one", "two", "three"))
    memory = step(base, merged, three, step(base, merged, two, None, ["w"]), ["w"])
    folders = {name: str(tmp_path / name) for name in ("base", "one", "two", "three", "first", "second")}
    run(folders["base"], folders["one"], folders["two"], folders["first"], ["w"], "F64")
    facts = run(folders["base"], folders["first"], folders["three"], folders["second"], ["w"], "F64")
    assert facts["lambda_t"] == pytest.approx(memory.lambda_t, rel=1e-12)
    written = load_file(tmp_path / "second/model.safetensors")
    assert written["w"].dtype == torch.float64
    assert all(torch.allclose(written[name], merged[name], rtol=1e-12) for name in merged)
