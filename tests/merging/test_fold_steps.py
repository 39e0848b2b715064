"""The driver's steps on one tensor, and the errors of the in-memory merge."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import MergeError, Stats, build, merge
from merging.fold import advance, fold_tensor, is_folded
from merging.measure import Measure
from merging.method import Role
from merging.read import read_tensor

AVERAGE = build("average", {})
ONE = Stats(count=1.0, norm_sum=1.0, total_norm=1.0)


@pytest.mark.parametrize(
    ("dtype", "folded"),
    [
        (torch.float32, True),
        (torch.float64, True),
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.int64, False),
        (torch.uint8, False),
        (torch.bool, False),
    ],
)
def test_floats_are_folded(dtype, folded):
    assert is_folded(dtype) is folded
    assert is_folded(torch.zeros(2, dtype=dtype)) is folded


def test_integer_tensors_are_refused():
    counter = torch.tensor([3])
    with pytest.raises(MergeError, match=r"expected float tensors of one shape, found expert torch.int64 \(1,\)"):
        fold_tensor(AVERAGE, counter, None, counter, Role())


def test_other_shapes_are_refused_even_if_they_would_broadcast():
    with pytest.raises(MergeError, match=r"\(3,\).*\(2, 3\)"):
        fold_tensor(AVERAGE, torch.zeros(2, 3), None, torch.zeros(3), Role())


def test_a_half_precision_base_is_subtracted_and_added_in_float32():
    base, expert = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)
    state, _ = fold_tensor(AVERAGE, base, None, expert, Role())
    assert state["total"].tolist() == [2**-7]
    # Half of a bfloat16 step is lost in the cast, not in the sum: two more experts of 0 make a third of a step.
    assert read_tensor(AVERAGE, base, state, Stats(count=3.0))[0].tolist() == [1.0]
    assert read_tensor(AVERAGE, base, state, ONE)[0].dtype == torch.bfloat16


def test_a_float64_base_keeps_its_precision():
    base = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    state, _ = fold_tensor(AVERAGE, base, None, base + 1, Role())
    assert read_tensor(AVERAGE, base, state, ONE)[0].tolist() == [2.0 + 1e-12]


def test_an_untouched_tensor_stays_droppable():
    state, found = fold_tensor(AVERAGE, torch.ones(3), None, torch.ones(3), Role())
    assert not any(slot.any() for slot in state.values())
    assert found == Measure(0.0, 0.0, 0.0, 0.0)


def test_a_moved_tensor_does_not():
    state, _ = fold_tensor(AVERAGE, torch.ones(3), None, torch.tensor([1.0, 1.0, 2.0]), Role())
    assert any(slot.any() for slot in state.values())


def test_reading_without_a_state_gives_a_copy_of_the_base():
    base = torch.tensor([-0.0, 1.0])
    read = read_tensor(AVERAGE, base, None, ONE)[0]
    assert torch.equal(read.view(torch.int32), base.view(torch.int32))
    assert read.data_ptr() != base.data_ptr()


def test_advance_adds_norms_over_the_whole_model():
    stats = advance(Stats(1.0, 10.0, 99.0), [Measure(3.0, 6.0, 0, 0), Measure(4.0, 8.0, 0, 0)])
    assert stats == Stats(count=2.0, norm_sum=15.0, total_norm=10.0)


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.randoms())
def test_advance_does_not_depend_on_the_order_of_the_tensors(norms, random):
    measures = [Measure(norm, norm, 0, 0) for norm in norms]
    shuffled = random.sample(measures, len(measures))
    assert advance(Stats(), shuffled) == advance(Stats(), measures)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 2), method=st.sampled_from(["opcm", "average", "magmax"]))
def test_dropping_a_trivial_state_changes_nothing(seed, cut, method):
    generator = torch.Generator().manual_seed(seed)
    base, *experts = (torch.randn(5, 3, generator=generator) for _ in range(4))
    experts[:cut] = [base] * cut
    rule, role = build(method, {}), Role(projected=True)
    kept, dropped = None, None
    for expert in experts:
        kept, _ = fold_tensor(rule, base, kept, expert, role)
        dropped, _ = fold_tensor(rule, base, dropped, expert, role)
        dropped = dropped if any(slot.any() for slot in dropped.values()) else None
    assert torch.equal(kept["total"], dropped["total"])


BASE = {"a.weight": torch.eye(2), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"a.weight": torch.eye(3)},
            r"expert 2, tensor 'a.weight': the shapes differ; expected \(2, 2\), found \(3, 3\)",
        ),
        ({"a.bias": torch.zeros(2, dtype=torch.int32)}, r"tensor 'a.bias': the kinds of number differ"),
        ({"head.bias": torch.zeros(2)}, r"tensor 'head.bias': the base has no such tensor; .*problem 1 of 1"),
        ({"a.bias": torch.tensor([0.0, math.nan])}, r"expert 2, tensor 'a.bias': the fold is not finite"),
    ],
)
def test_an_expert_that_does_not_fit_is_named(change, words):
    with pytest.raises(MergeError, match=words):
        merge(BASE, [BASE, BASE | change], projected=["a.weight"])


def test_a_tensor_that_an_expert_lacks_is_unchanged():
    moved = BASE | {"a.weight": 2 * torch.eye(2)}
    partly = merge(BASE, [{"a.weight": moved["a.weight"]}], projected=[])
    whole = merge(BASE, [moved], projected=[])
    assert all(torch.equal(partly[name], whole[name]) for name in BASE)


def test_an_expert_with_none_of_the_tensors_is_refused():
    with pytest.raises(MergeError, match=r"tensor 'a.weight': the expert has no tensor of the base"):
        merge(BASE, [{}], projected=[])


def test_an_unknown_projected_name_is_refused():
    with pytest.raises(MergeError, match=r"projected names \['a.waight'\] are not in the base"):
        merge(BASE, [BASE], projected=["a.waight"])


def test_a_projected_vector_is_refused_with_its_name():
    with pytest.raises(MergeError, match=r"tensor 'a.bias': a projected tensor .* expected a float matrix"):
        merge(BASE, [BASE], projected=["a.bias"])
