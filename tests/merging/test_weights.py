"""Weights of experts: what they multiply, what they count, and that a common factor changes nothing that is read."""

import math
from itertools import pairwise

import pytest
import torch

from merging import METHODS, Stats, build
from merging.fold import advance, fold_tensor
from merging.lowrank import Factors, dense, fold_factors
from merging.measure import Measure, measure, shares
from merging.method import Role

RANDOM = torch.Generator().manual_seed(3)
BASE = torch.randn(24, 16, dtype=torch.float64, generator=RANDOM)
EXPERTS = [BASE + 0.1 * torch.randn(24, 16, dtype=torch.float64, generator=RANDOM) for _ in range(3)]
ROLES = [Role(), Role(projected=True)]


def folded(method, weights, role):
    """State and statistics after the experts, each with its weight."""
    rule, state, stats = build(method, {}), None, Stats()
    for expert, weight in zip(EXPERTS, weights, strict=True):
        state, found = fold_tensor(rule, BASE, state, expert, role, weight)
        stats = advance(stats, [found], weight)
    return rule, state, stats


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_weight_multiplies_the_experts_change(method, role):
    rule, state, _ = folded(method, (1.0, 0.5, 2.0), role)
    wanted = None
    for expert, weight in zip(EXPERTS, (1.0, 0.5, 2.0), strict=True):
        wanted, _ = fold_tensor(rule, BASE, wanted, BASE + weight * (expert - BASE), role)
    torch.testing.assert_close(state, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", ["average", "opcm"])
def test_two_equal_weights_leave_what_is_read_as_it_is(method, role):
    (rule, one, stats), (_, four, more) = folded(method, (1.0,) * 3, role), folded(method, (4.0,) * 3, role)
    assert more.count == 12.0
    assert more.norm_sum == pytest.approx(4 * stats.norm_sum)
    torch.testing.assert_close(rule.read(four, more), rule.read(one, stats), rtol=1e-5, atol=1e-6)


def test_factors_take_a_weight_as_matrices_do():
    rule, delta = build("opcm", {}), Factors(torch.randn(24, 3, generator=RANDOM), torch.randn(16, 3, generator=RANDOM))
    light, found = fold_factors(rule, None, delta._replace(left=0.25 * delta.left), Role(projected=True))
    torch.testing.assert_close(dense(light), 0.25 * dense(delta))
    assert found.delta_norm == pytest.approx(0.25 * float(torch.linalg.norm(dense(delta))), rel=1e-5)


def test_the_shares_of_a_change():
    before = {"total": torch.tensor([3.0, 0.0])}
    along = measure(before, torch.tensor([2.0, 0.0]), {"total": torch.tensor([5.0, 0.0])})
    across = measure(before, torch.tensor([0.0, 1.5]), {"total": torch.tensor([3.0, 1.5])})
    taken = measure(before, torch.tensor([0.0, 2.0]), before)
    assert shares({"a": along}) == (1.0, 0.0)
    assert shares({"a": across}) == (0.0, 0.0)
    assert shares({"a": taken}) == (0.0, 1.0)
    both = shares({"a": along, "b": across})
    assert both == (pytest.approx(math.sqrt(4 / 6.25)), 0.0)
    assert shares({}) == (0.0, 0.0)
    assert math.isnan(shares({"a": Measure(1.0, 1.0, math.nan, 0.0)})[0])


def test_shares_of_changes_that_repeat_what_is_there_never_pass_one():
    """Rounding puts some of these at 1 + 2e-16, which a limit of 1 would reject."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(1, 400):
        total = torch.randn(number % 37 + 1, generator=generator)
        found.append(measure({"total": total}, -number * 1e-3 * total, {"total": total}))
    assert all(-1.0 <= each.cosine <= -0.999 for each in found)
    assert all(shares({"a": one, "b": other})[0] <= 1.0 for one, other in pairwise(found))
