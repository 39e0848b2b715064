"""OPCM's projection: its geometry, its edges, and where foldin deviates from the published form on purpose."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import Stats, merge
from merging.method import Role
from merging.opcm import VARIANTS, _work_dtype, opcm, project
from merging.spectrum import directions, gram, split_rank

SHAPES = [(12, 5), (5, 12), (7, 7)]


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_opcm", Path(__file__).with_name("reference_opcm.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    return normal((shape[0], rank), seed) @ normal((rank, shape[1]), seed + 1)


def triplets(matrix: torch.Tensor, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if matrix.shape[0] < matrix.shape[1]:
        return triplets(matrix.mT, noise)[::-1]
    sigma, right = directions(gram(matrix), noise)
    return matrix.double() @ right / sigma, sigma, right


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_published_form_where_the_total_has_full_rank(shape, energy, oracle):
    total, delta = normal(shape, 1), normal(shape, 2)
    wanted = torch.from_numpy(oracle.project(total.numpy(), delta.numpy(), energy))
    assert distance(project(total, delta, energy), wanted) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_line_equals_the_published_recursion(shape, oracle):
    base = {"w": normal(shape, 0), "b": normal((4,), 1)}
    experts = [{name: one + 0.1 * normal(one.shape, seed) for name, one in base.items()} for seed in range(2, 8)]
    plain = [{name: one.numpy() for name, one in model.items()} for model in (base, *experts)]
    wanted = list(oracle.fold_all(plain[0], plain[1:], {"w"}, 0.5))[-1].merged
    merged = merge(base, experts, projected=["w"])
    for name, one in base.items():
        # The product keeps its total in float32; six experts add six roundings.
        assert distance(merged[name] - one, torch.from_numpy(wanted[name]) - one) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 9),
    energy=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
    variant=st.sampled_from(["fusionbench", "paper"]),
)
def test_what_is_kept_is_orthogonal_to_the_total_and_never_longer(shape, rank, energy, seed, variant):
    total, delta = low_rank(shape, rank, seed), normal(shape, seed + 2)
    kept = project(total, delta, energy, variant=variant)
    # A direction just above the cut, 1e-8 of the largest, is known to about 1e-8 from the Gram matrix.
    assert abs(float((total * kept).sum())) < 1e-7 * float(total.norm() * delta.norm())
    assert float(kept.norm()) <= float(delta.norm()) * (1 + 1e-12)


def test_the_released_variant_keeps_a_part_along_the_total():
    total, delta = normal((12, 5), 1), normal((12, 5), 2)
    kept = project(total, delta, 0.3, variant="released")
    assert abs(float((total * kept).sum())) > 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_removed_entries_are_those_of_the_variant(variant, shape):
    total, delta = normal(shape, 1), normal(shape, 2)
    left, sigma, right = triplets(total)
    rank = split_rank(sigma, 0.5)
    inner = left.mT @ project(total, delta, 0.5, variant=variant) @ right
    row, column = torch.meshgrid(torch.arange(len(sigma)), torch.arange(len(sigma)), indexing="ij")
    block, diagonal = (row < rank) & (column < rank), row == column
    removed = {"fusionbench": block | diagonal, "released": block, "paper": (row < rank) | (column < rank) | diagonal}
    before = left.mT @ delta @ right
    assert rank >= 1
    assert torch.allclose(inner, before.masked_fill(removed[variant], 0), atol=1e-12)


def test_the_paper_variant_also_removes_what_a_leading_direction_shares_with_the_complement():
    total, delta = normal((12, 5), 1), normal((12, 5), 2)
    leading = triplets(total)[2][:, : split_rank(triplets(total)[1], 0.5)]
    assert float((project(total, delta, 0.5, variant="paper") @ leading).norm()) < 1e-12
    assert float((project(total, delta, 0.5) @ leading).norm()) > 0.1


def test_energy_zero_still_drops_the_diagonal():
    total, delta = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    assert project(total, delta, 0.0).tolist() == [[0.0, 6.0], [7.0, 0.0]]


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.0, 0), (0.39, 0), (0.41, 1), (0.69, 1), (0.71, 2), (0.99, 3)],  # shares of 4, 3, 2, 1: .4 .7 .9 1
)
def test_the_split_rank_counts_shares_of_the_sum_of_sigma(energy, rank):
    assert split_rank(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), energy) == rank


def test_a_direction_that_reaches_the_energy_exactly_is_protected():
    assert split_rank(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64), 0.5) == 1


def test_the_split_rank_of_nothing_is_zero():
    assert split_rank(torch.zeros(0, dtype=torch.float64), 0.5) == 0


def test_a_zero_total_removes_nothing():
    delta = normal((6, 4), 1)
    assert torch.equal(project(torch.zeros(6, 4), delta, 0.5), delta)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_degenerate_matrices_are_folded(shape):
    assert project(torch.ones(shape), torch.ones(shape), 0.5).shape == shape


def test_a_tiny_change_of_a_rank_deficient_total_does_not_move_the_result(oracle):
    total, delta = low_rank((30, 20), 4, 1), normal((30, 20), 3)
    touched = total + 1e-15 * normal((30, 20), 4)
    moved = distance(project(touched, delta, 0.5), project(total, delta, 0.5))
    public = [torch.from_numpy(oracle.project(one.numpy(), delta.numpy(), 0.5)) for one in (touched, total)]
    assert moved < 1e-10
    assert distance(*public) > 0.01  # the published form deletes a diagonal in an arbitrary null basis


def test_after_a_low_rank_expert_only_its_own_directions_are_removed():
    total, delta = low_rank((30, 20), 4, 1), normal((30, 20), 3)
    removed = delta - project(total, delta, 0.5)
    assert len(triplets(total)[1]) == 4
    assert int(torch.linalg.matrix_rank(removed)) <= 4
    rows = torch.linalg.svd(total, full_matrices=False).Vh[:4]
    assert distance(removed @ rows.mT @ rows, removed) < 1e-12


def test_the_triplets_rebuild_the_matrix_with_orthonormal_factors():
    matrix = low_rank((9, 14), 5, 1)
    left, sigma, right = triplets(matrix)
    identity = torch.eye(5, dtype=torch.float64)
    assert distance(left * sigma @ right.mT, matrix) < 1e-12
    assert torch.allclose(left.mT @ left, identity, atol=1e-10)
    assert torch.allclose(right.mT @ right, identity, atol=1e-10)
    assert torch.allclose(sigma, torch.linalg.svdvals(matrix)[:5], rtol=1e-10)


def test_directions_below_the_noise_are_left_alone():
    total = torch.diag(torch.tensor([4.0, 2.0, 1e-3]))
    assert triplets(total, noise=1e-2)[1].tolist() == pytest.approx([4.0, 2.0])
    assert project(total, torch.eye(3), 0.5, noise=1e-2).diagonal().tolist() == pytest.approx([0.0, 0.0, 1.0])


def test_scaling_the_total_does_not_change_the_projection():
    total, delta = normal((12, 5), 1), normal((12, 5), 2)
    assert distance(project(1e-20 * total, delta, 0.5), project(total, delta, 0.5)) < 1e-10


def test_unprojected_matrices_are_added():
    rule, delta = opcm(), torch.eye(3)
    state = rule.fold(rule.fold(rule.init(delta), delta, Role()), delta, Role())
    assert torch.equal(state["total"], 2 * delta)


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.6])
def test_the_merged_model_lies_at_strength_times_the_mean_distance_of_its_experts(strength):
    base = {"w": normal((12, 5), 0, torch.float32), "b": normal((6,), 1, torch.float32)}
    experts = [{name: one + scale * normal(one.shape, 9).float() for name, one in base.items()} for scale in (0.1, 0.3)]
    merged = merge(base, experts, projected=["w"], strength=strength)

    def away(model):
        return math.hypot(*(float((model[name] - base[name]).norm()) for name in base))

    assert away(merged) == pytest.approx(strength * sum(map(away, experts)) / 2, rel=1e-6)


def test_reading_before_any_expert_moved_gives_zero():
    rule = opcm()
    assert torch.equal(rule.read(rule.init(torch.ones(3)), Stats(count=1.0)), torch.zeros(3))


def folded(shape: tuple[int, ...], role: Role) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total, delta = normal(shape, 1, torch.float32), normal(shape, 2, torch.float32)
    return total, delta, opcm().fold({"total": total}, delta, role)["total"]


def test_every_matrix_of_a_stack_is_projected_on_its_own():
    total, delta, after = folded((3, 12, 5), Role(projected=True, stacked=True))
    for old, new, found in zip(total, delta, after, strict=True):
        assert distance(found, old + project(old, new, 0.5)) < 1e-6


def test_a_convolution_is_projected_as_output_by_all_the_rest():
    total, delta, after = folded((6, 2, 3, 3), Role(projected=True))
    wanted = total.flatten(1) + project(total.flatten(1), delta.flatten(1), 0.5)
    assert distance(after.flatten(1), wanted) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(300, 7), (7, 300)])
def test_the_length_of_the_blocks_changes_no_more_than_rounding(shape, variant, monkeypatch):
    total, delta = normal(shape, 1), normal(shape, 2)
    whole = project(total, delta, 0.5, variant=variant)
    monkeypatch.setattr("merging.spectrum.BLOCK", 100)
    assert distance(project(total, delta, 0.5, variant=variant), whole) < 1e-13


@pytest.mark.parametrize(("spread", "dtype"), [(1e3, torch.float32), (1e5, torch.float64)])
def test_large_matrices_are_multiplied_in_float32_only_where_their_directions_are_alike(spread, dtype):
    assert _work_dtype(torch.tensor([1.0, *[0.5] * 300, 1 / spread]), torch.float32) == dtype
    assert _work_dtype(torch.tensor([1.0, 1 / spread]), torch.float32) == torch.float64
    assert _work_dtype(torch.tensor([1.0] * 300), torch.float64) == torch.float64


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_products_are_closer_to_float64_than_a_float32_svd_is(variant):
    left, right = (torch.linalg.qr(normal((320, 320), seed)).Q for seed in (1, 2))
    total = (left * torch.logspace(0, -3.5, 320, dtype=torch.float64) @ right.mT).float()
    delta = normal((320, 320), 3, torch.float32)
    exact = project(total.double(), delta.double(), 0.5, variant=variant)
    assert distance(project(total, delta, 0.5, variant=variant), exact) < 1e-5
