"""The noise floor: an expert stored in few bits carries rounding in every direction, which is not signal."""

import pytest
import torch

from merging import MergeError, Stats, build, merge
from merging.fold import advance, fold_tensor, role_of
from merging.method import Role
from merging.read import read_tensor
from merging.spectrum import directions, gram

SIDE, RANK = 768, 16


def rank_of(matrix: torch.Tensor, noise: float = 0.0) -> int:
    return len(directions(gram(matrix), noise).sigma)


@pytest.fixture(scope="module")
def plan() -> tuple[torch.Tensor, torch.Tensor]:
    """A base with entries of about 0.03 and a rank-16 update whose weakest direction is about 0.3."""
    generator = torch.Generator().manual_seed(0)
    base = 0.03 * torch.randn(SIDE, SIDE, generator=generator)
    left, right = (torch.linalg.qr(torch.randn(SIDE, RANK, generator=generator)).Q for _ in range(2))
    return base, (left * torch.linspace(1.0, 0.31, RANK)) @ right.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rank_16_update_has_16_directions_in_every_storage_precision(plan, dtype):
    # Measured on such matrices: sigma_17 is 4e-8 in float32, 2.7e-3 in bfloat16 and 3.4e-4 in float16.
    base = plan[0].to(dtype)
    delta = (plan[0] + plan[1]).to(dtype).float() - base.float()
    role = role_of(base, projected=True, experts=0)
    assert rank_of(delta, role.noise) == RANK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_the_floor_rounding_looks_like_signal(plan, dtype):
    delta = (plan[0] + plan[1]).to(dtype).float() - plan[0].to(dtype).float()
    assert rank_of(delta) > SIDE - 10


def test_a_bfloat16_expert_of_a_float32_base_needs_the_coarser_floor(plan):
    base = plan[0]
    delta = (base + plan[1]).bfloat16().float() - base
    assert rank_of(delta, role_of(base, True, 0).noise) > SIDE - 10
    assert rank_of(delta, role_of(base, True, 0, stored=torch.bfloat16).noise) == RANK


def test_the_in_memory_merge_knows_the_coarsest_expert(plan):
    # Neither the noise of the first expert nor the second's part along it may be taken for signal: with the noise
    # as signal the diagonal is dropped in 96 directions, without it in 16.
    base = plan[0][:96, :96].contiguous()
    change = 0.01 * torch.randn(96, 96, generator=torch.Generator().manual_seed(1))
    experts = [{"w": (base + plan[1][:96, :96]).bfloat16()}, {"w": base + change}]
    rule, states, stats = build("opcm", {}), None, Stats()
    for expert in experts:
        role = role_of(base, True, stats.count, stored=torch.bfloat16)
        states, found = fold_tensor(rule, base, states, expert["w"], role)
        stats = advance(stats, [found])
    merged = merge({"w": base}, experts, projected=["w"])["w"]
    assert torch.equal(merged, read_tensor(rule, base, states, stats)[0])
    finer, _ = fold_tensor(rule, base, None, experts[0]["w"], Role(projected=True))
    finer, _ = fold_tensor(rule, base, finer, experts[1]["w"], role_of(base, True, 1))
    assert not torch.allclose(finer["total"], states["total"], atol=1e-4)


def test_the_floor_grows_with_the_square_root_of_the_experts():
    base = torch.ones(4, 9)
    # 2 * eps32 * rms 1 / sqrt(12) * (sqrt(4) + sqrt(9)), by hand
    assert role_of(base, True, 0).noise == pytest.approx(2 * 2**-23 / 12**0.5 * 5, rel=1e-12)
    assert role_of(base, True, 8).noise == pytest.approx(3 * role_of(base, True, 0).noise)
    assert role_of(3 * base, True, 0).noise == pytest.approx(3 * role_of(base, True, 0).noise)


def test_an_unprojected_tensor_has_no_floor():
    assert role_of(torch.ones(3), False, 5) == Role()


@pytest.mark.parametrize("base", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64)])
def test_only_float_matrices_can_be_projected(base):
    with pytest.raises(MergeError, match="expected a float matrix"):
        role_of(base, True, 0)


def test_a_stack_needs_three_axes():
    with pytest.raises(MergeError, match="expected a stack of float matrices"):
        role_of(torch.ones(2, 2), True, 0, stacked=True)


def test_the_floor_is_that_of_one_matrix_of_a_stack_and_of_a_flattened_kernel():
    matrix = torch.ones(4, 9)
    assert role_of(torch.ones(5, 4, 9), True, 0, stacked=True).noise == pytest.approx(role_of(matrix, True, 0).noise)
    assert role_of(torch.ones(4, 1, 3, 3), True, 0).noise == pytest.approx(role_of(matrix, True, 0).noise)
