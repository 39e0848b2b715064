"""What is said about a fold: norms, cosine, removed share, and the summary per layer."""

import pytest
import torch

from merging import build
from merging.fold import fold_tensor
from merging.measure import Measure, measure, summarise
from merging.method import Role


def test_the_numbers_of_a_small_case_done_by_hand():
    before, delta = {"total": torch.tensor([3.0, 4.0])}, torch.tensor([4.0, 3.0])
    found = measure(before, delta, {"total": torch.tensor([3.0, 7.0])})  # the first entry was removed
    assert found.delta_norm == 5.0
    assert found.total_norm == pytest.approx(58**0.5)
    assert found.cosine == pytest.approx(24 / 25)
    assert found.removed == pytest.approx(16 / 25)


def test_the_first_expert_has_no_cosine_and_loses_nothing():
    delta = torch.tensor([4.0, 3.0])
    assert measure(None, delta, {"total": delta}) == Measure(5.0, 5.0, 0.0, 0.0)


def test_an_expert_without_a_change_divides_by_nothing():
    total = {"total": torch.tensor([3.0, 4.0])}
    assert measure(total, torch.zeros(2), total) == Measure(0.0, 5.0, 0.0, 0.0)


def test_the_same_expert_twice_is_removed_along_the_total():
    base, expert = torch.zeros(2, 2), torch.diag(torch.tensor([2.0, 1.0]))
    rule, role = build("opcm", {}), Role(projected=True)
    state, _ = fold_tensor(rule, base, None, expert, role)
    again, found = fold_tensor(rule, base, state, expert, role)
    assert found.cosine == pytest.approx(1.0)
    assert found.removed == pytest.approx(1.0)
    assert torch.allclose(again["total"], state["total"], atol=1e-6)


def test_large_values_do_not_overflow():
    # 1e30 squared is beyond float32
    delta = torch.full((4,), 1e30)
    assert measure(None, delta, {"total": delta}).delta_norm == pytest.approx(2e30)


def test_the_numbers_do_not_depend_on_the_block_length(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    before, delta, after = (torch.randn(7, 9, generator=generator) for _ in range(3))
    whole = measure({"total": before}, delta, {"total": after})
    monkeypatch.setattr("merging.measure.BLOCK", 5)
    assert measure({"total": before}, delta, {"total": after}) == pytest.approx(whole, rel=1e-12)


def test_layers_are_names_without_their_last_component():
    found = summarise(
        {
            "h.0.weight": Measure(3.0, 6.0, 0.5, 0.1),
            "h.0.bias": Measure(4.0, 8.0, 0.0, 0.6),
            "scale": Measure(0.0, 1.0, 0.0, 0.0),
        }
    )
    assert list(found) == ["h.0", "scale"]
    assert found["h.0"] == pytest.approx(
        {"delta_norm": 5.0, "total_norm": 10.0, "cosine": 0.5 * 9 / 25, "removed": (0.1 * 9 + 0.6 * 16) / 25}
    )
    assert found["scale"] == {"delta_norm": 0.0, "total_norm": 1.0, "cosine": 0.0, "removed": 0.0}
