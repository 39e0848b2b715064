"""Folding by factors: the same result as folding the matrices, at the price of the rank."""

import pytest
import torch

from merging import METHODS, MergeError, Stats, build
from merging.fold import fold_tensor
from merging.lowrank import Factors, dense, fits, fold_factors
from merging.method import Role
from merging.read import read_tensor

SHAPES = [(40, 24), (24, 40), (32, 32)]
ADDITIVE = sorted(name for name in METHODS if build(name, {}).additive)


def adapter(shape: tuple[int, int], rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(*(torch.randn(side, rank, generator=generator) for side in shape))


def both(name, shape, ranks, role, **parameters):
    """The total and the measure of the last fold: from the factors and from the matrices."""
    method, base = build(name, parameters), torch.zeros(shape)
    total, state = None, None
    for seed, rank in enumerate(ranks):
        delta = adapter(shape, rank, seed)
        total, by_factors = fold_factors(method, total, delta, role)
        state, by_matrices = fold_tensor(method, base, state, dense(delta), role)
    return total, by_factors, state["total"], by_matrices


def test_the_methods_that_promise_it_are_known():
    assert ADDITIVE == ["average", "opcm", "task_arithmetic"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("name", ADDITIVE)
def test_factors_give_what_the_matrices_give(name, projected, shape):
    role = Role(projected=projected)
    total, by_factors, wanted, by_matrices = both(name, shape, [4, 2, 4], role)
    assert float((dense(total) - wanted).norm() / wanted.norm()) < 1e-5
    assert by_factors == pytest.approx(by_matrices, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("variant", ["fusionbench", "released", "paper"])
def test_every_variant_of_the_projection_can_be_folded_by_factors(variant):
    total, _, wanted, _ = both("opcm", (40, 24), [4, 4], Role(projected=True), variant=variant)
    assert float((dense(total) - wanted).norm() / wanted.norm()) < 1e-5


def test_the_rank_is_the_sum_of_the_ranks():
    total, *_ = both("opcm", (40, 24), [4, 2, 3], Role(projected=True))
    assert (total.left.shape, total.right.shape) == ((40, 9), (24, 9))


def test_the_same_adapter_twice_is_removed_by_its_numerical_rank():
    delta, method, role = adapter((40, 24), 4, 0), build("opcm", {"energy": 0.99}), Role(projected=True)
    once, _ = fold_factors(method, None, delta, role)
    twice, found = fold_factors(method, once, delta, role)
    assert found.removed == pytest.approx(1.0)
    assert torch.allclose(dense(twice), dense(once), atol=1e-5)


def test_a_zero_adapter_changes_nothing():
    method, role, delta = build("opcm", {}), Role(projected=True), adapter((40, 24), 4, 0)
    once, _ = fold_factors(method, None, delta, role)
    after, found = fold_factors(method, once, Factors(delta.left, 0 * delta.right), role)
    assert found.delta_norm == 0
    assert torch.allclose(dense(after), dense(once), atol=1e-5)


def test_a_total_of_factors_reads_as_its_matrix():
    method, base = build("average", {}), torch.ones(40, 24)
    total, _ = fold_factors(method, None, adapter((40, 24), 4, 0), Role())
    read = read_tensor(method, base, {"total": dense(total)}, Stats(1.0, 1.0, 1.0))
    assert torch.allclose(read[0], base + dense(adapter((40, 24), 4, 0)), atol=1e-5)


def test_an_adapter_that_is_not_finite_is_refused():
    left, right = adapter((40, 24), 4, 0)
    left[3, 1] = torch.nan
    with pytest.raises(MergeError, match="not finite"):
        fold_factors(build("average", {}), None, Factors(left, right), Role())


@pytest.mark.parametrize(("rank", "kept"), [(1, True), (12, True), (13, False)])
def test_above_half_the_short_side_factors_are_not_worth_it(rank, kept):
    assert fits(rank, (40, 24)) is kept
