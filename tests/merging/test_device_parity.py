"""The same rules on a CUDA device."""

import pytest
import torch

from merging import METHODS, merge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_cpu_and_gpu_agree(method):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(96, 32, generator=generator), "b": torch.randn(96, generator=generator)}
    experts = [
        {name: one + 0.05 * torch.randn(one.shape, generator=generator) for name, one in base.items()} for _ in range(3)
    ]
    there = [{name: one.cuda() for name, one in model.items()} for model in (base, *experts)]
    merged = merge(base, experts, method, projected=["w"])
    away = merge(there[0], there[1:], method, projected=["w"])
    for name, one in base.items():
        assert away[name].is_cuda
        # Rounding differs in order of summation; the diagonal drop amplifies it on flat spectra.
        assert float((away[name].cpu() - merged[name]).norm() / (merged[name] - one).norm()) < 1e-4
