"""The baselines against their formulas written out over all experts at once."""

import pytest
import torch

from merging import merge

BASE = {"w": torch.tensor([1.0, -1.0, 0.5])}
DELTAS = torch.tensor([[0.5, -0.25, 0.0], [-1.0, 0.25, 0.125], [0.25, 0.5, -0.125]])  # exact in binary
EXPERTS = [{"w": BASE["w"] + delta} for delta in DELTAS]


def test_average_is_the_mean_of_the_experts():
    merged = merge(BASE, EXPERTS, "average", projected=[])["w"]
    assert merged.tolist() == pytest.approx((BASE["w"] + DELTAS.mean(0)).tolist(), rel=1e-6)


def test_task_arithmetic_adds_the_scaled_sum():
    merged = merge(BASE, EXPERTS, "task_arithmetic", projected=[], scale=0.5)["w"]
    assert merged.tolist() == (BASE["w"] + 0.5 * DELTAS.sum(0)).tolist()


def test_magmax_adds_the_scaled_entry_of_largest_size_and_the_later_one_on_a_tie():
    merged = merge(BASE, EXPERTS, "magmax", projected=[], scale=0.5)["w"]
    assert merged.tolist() == (BASE["w"] + 0.5 * torch.tensor([-1.0, 0.5, -0.125])).tolist()


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_sums_do_not_depend_on_the_order(method):
    forward = merge(BASE, EXPERTS, method, projected=[])["w"]
    assert torch.equal(merge(BASE, EXPERTS[::-1], method, projected=[])["w"], forward)
