"""Every tensor is made on the device of its arguments: the rules run on a device in disguise, where none is at hand.

A tensor in disguise says that it lies on `meta`, holds real values on the processor, and refuses, as a GPU does, to be
computed with together with a tensor of another device.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from merging import METHODS, Stats, build, measure, merge
from merging.fold import drained, fold_pieces, fold_tensor, role_of
from merging.lowrank import Factors, dense, fold_factors
from merging.method import Role
from merging.opcm import VARIANTS
from merging.read import read_pieces
from merging.statistics import merged_variance, second_moment

AWAY = torch.device("meta")
TRANSFERS = {"_to_copy", "copy_"}


class Away(torch.Tensor):
    """A tensor that says that it lies on AWAY."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device=AWAY
        )

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Disguise(TorchDispatchMode):
    """While entered, tensors may be made on AWAY."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """One operation of torch, on one device."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    away = [isinstance(one, Away) for one in tensors]
    name, wanted = func.overloadpacket.__name__, kwargs.get("device")
    if any(away) and name not in TRANSFERS:
        strangers = [one for one, far in zip(tensors, away, strict=True) if not far and one.ndim]
        assert not strangers, f"{name}: a tensor {tuple(strangers[0].shape)} lies on another device"
    outside = wanted == AWAY if wanted is not None else bool(tensors) and away[0]
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = tree_map_only(Away, lambda one: one.here, (args, kwargs))
    result = func(*inner[0], **inner[1])
    if not outside:
        return result
    known = {id(one.here): one for one in tensors if isinstance(one, Away)}  # in place: the same tensor comes back
    return tree_map_only(torch.Tensor, lambda one: known[id(one)] if id(one) in known else Away(one), result)


@pytest.fixture
def away():
    """A function that sends tensors to the device in disguise."""
    with Disguise():
        yield lambda value: tree_map_only(torch.Tensor, lambda one: one.to(AWAY), value)


def matrices(*shape):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(*shape, generator=generator)
    return base, [base + 0.05 * torch.randn(*shape, generator=generator) for _ in range(3)]


def test_the_disguise_is_seen_through_by_nothing_but_a_transfer(away):
    there = away(torch.ones(3))
    assert there.device == AWAY
    assert float((there + 1).sum()) == 6.0
    assert torch.equal(there.cpu(), torch.ones(3))
    with pytest.raises(AssertionError, match="another device"):
        there + torch.zeros(3)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_whole_merge_stays_on_its_device(away, method):
    (base, experts), (bias, biases) = matrices(12, 8), matrices(12)
    models = [{"w": one, "b": other} for one, other in zip([base, *experts], [bias, *biases], strict=True)]
    wanted = merge(models[0], models[1:], method, projected=["w"])
    there = [away(model) for model in models]
    found = merge(there[0], there[1:], method, projected=["w"])
    for name, tensor in wanted.items():
        assert found[name].device == AWAY
        assert torch.equal(found[name].cpu(), tensor)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (3, 12, 8)])
def test_every_projection_stays_on_its_device(away, variant, shape):
    base, experts = away(matrices(*shape))
    rule, state = build("opcm", {"variant": variant}), None
    for count, expert in enumerate(experts):
        role = role_of(base, True, count, stacked=len(shape) == 3)
        state, _ = fold_tensor(rule, base, state, expert, role)
    assert state["total"].device == AWAY


def test_pieces_stay_on_their_device(away):
    base, experts = away(matrices(12, 8))
    rule = build("average", {})
    pieces, _ = drained(fold_pieces(rule, base, None, experts))
    again, _ = drained(fold_pieces(rule, base, pieces[0], experts))
    read, _ = drained(read_pieces(rule, base.bfloat16(), again[0], Stats(6.0, 1.0, 1.0)))
    assert [piece["total"].device for piece in pieces] == [read[0].device] == [AWAY]


def test_a_device_holds_one_piece_of_each_tensor_and_gives_the_same_bytes(away, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK", 16)
    monkeypatch.setattr(measure, "DEVICE_BLOCK", 16)
    base, experts = matrices(12, 8)
    rule, stats = build("average", {}), Stats(6.0, 1.0, 1.0)

    def folded(device):
        first, _ = drained(fold_pieces(rule, base, None, experts, device=device))
        state = {"total": torch.cat([piece["total"].cpu() for piece in first])}
        again, found = drained(fold_pieces(rule, base, state, experts, device=device))
        state = {"total": torch.cat([piece["total"].cpu() for piece in again])}
        read, _ = drained(read_pieces(rule, base, state, stats, device))
        return again, found, torch.cat([piece.cpu() for piece in read]), max(map(len, read))

    here, there = folded(None), folded(AWAY)
    assert {piece["total"].device for piece in there[0]} == {AWAY}
    assert there[1:] == (here[1], there[2], 16)
    assert torch.equal(there[2], here[2])


def test_factors_stay_on_their_device(away):
    left, right = away((torch.randn(12, 2), torch.randn(8, 2)))
    total = None
    for _ in range(2):
        total, _ = fold_factors(build("opcm", {}), total, Factors(left, right), Role(projected=True))
    assert dense(total).device == AWAY


def test_running_statistics_stay_on_their_device(away):
    mean, spread = away((torch.ones(3), torch.ones(3)))
    assert merged_variance(spread, mean, second_moment(mean, mean, spread)).device == AWAY
