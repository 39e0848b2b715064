"""Each step of a fold gives on a GPU what it gives on the processor, up to the order of summation."""

import pytest
import torch

from merging import Stats, build
from merging.fold import drained, fold_pieces, fold_tensor, role_of
from merging.lowrank import Factors, dense, fold_factors
from merging.method import Role
from merging.opcm import VARIANTS, project
from merging.read import read_pieces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of ||GPU - CPU|| / ||CPU||
SHAPES = [(320, 288), (288, 320), (1500, 96), (64, 64)]  # above and below the size from which on float32 is used
STATS = Stats(3.0, 5.0, 2.0)


def apart(there, here):
    assert there.is_cuda
    return float((there.cpu().double() - here.double()).norm() / here.double().norm())


def change(*shape, seed=0, dtype=torch.float32):
    """A delta with a decaying spectrum under noise."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, 16, generator=generator) for side in shape)
    strengths = torch.arange(1, 17).float().pow(-0.7)
    return ((left * strengths) @ right.T + 0.3 * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection(shape, variant, dtype):
    total, delta = (change(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
    here = project(total, delta, 0.5, variant=variant)
    assert apart(project(total.cuda(), delta.cuda(), 0.5, variant=variant), here) < TOLERANCE[dtype]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_opcm_folds_three_experts(shape, stored):
    rule, base = build("opcm", {}), change(*shape, seed=9).to(stored)
    experts = [(base + 0.05 * change(*shape, seed=seed)).to(stored) for seed in range(3)]
    here = there = None
    for count, expert in enumerate(experts):
        role = role_of(base, True, count)
        assert role_of(base.cuda(), True, count).noise == pytest.approx(role.noise, rel=1e-12)
        here, measure = fold_tensor(rule, base, here, expert, role)
        there, found = fold_tensor(rule, base.cuda(), there, expert.cuda(), role)
        assert tuple(found) == pytest.approx(tuple(measure), rel=1e-4, abs=1e-6)
    assert apart(there["total"], here["total"]) < TOLERANCE[torch.float32]


def test_opcm_folds_a_stack_of_matrices():
    base, delta = torch.zeros(3, 40, 24), torch.stack([change(40, 24, seed=seed) for seed in range(3)])
    state, role = {"total": delta.roll(1, 0)}, Role(projected=True, stacked=True)
    here, _ = fold_tensor(build("opcm", {}), base, state, delta, role)
    there, _ = fold_tensor(build("opcm", {}), base.cuda(), {"total": state["total"].cuda()}, delta.cuda(), role)
    assert apart(there["total"], here["total"]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("method", ["average", "magmax", "opcm", "task_arithmetic"])
def test_pieces_are_the_same_entries(method):
    base = change(3000, 400, seed=9).bfloat16()  # more than one piece on the processor
    experts = [base + 0.05 * change(3000, 400, seed=seed) for seed in range(2)]
    rule, far = build(method, {}), [expert.cuda() for expert in experts]
    (here, measures), (there, found) = (
        drained(fold_pieces(rule, one, None, some)) for one, some in ((base, experts), (base.cuda(), far))
    )
    totals = [torch.cat([piece["total"] for piece in pieces]) for pieces in (there, here)]
    assert torch.equal(totals[0].cpu(), totals[1])  # sums and comparisons of single entries round alike
    for one, other in zip(found, measures, strict=True):
        assert tuple(one) == pytest.approx(tuple(other), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", ["average", "magmax", "opcm", "task_arithmetic"])
def test_what_is_read_is_the_same(method):
    base, total = change(3000, 400, seed=9).bfloat16(), change(3000, 400)
    rule = build(method, {})
    here, reading = drained(read_pieces(rule, base, {"total": total}, STATS))
    there, found = drained(read_pieces(rule, base.cuda(), {"total": total.cuda()}, STATS))
    assert apart(torch.cat(there), torch.cat(here)) < 1e-5
    assert tuple(found) == pytest.approx(tuple(reading), rel=1e-4)
    assert all(piece.is_cuda and piece.dtype == torch.bfloat16 for piece in there)


@pytest.mark.parametrize("method", ["average", "opcm", "task_arithmetic"])
def test_factors(method):
    rule, role = build(method, {}), Role(projected=True)
    here = there = None
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        delta = Factors(*(torch.randn(side, 8, generator=generator) for side in (320, 288)))
        here, measure = fold_factors(rule, here, delta, role)
        there, found = fold_factors(rule, there, Factors(*(side.cuda() for side in delta)), role)
        assert tuple(found) == pytest.approx(tuple(measure), rel=1e-5, abs=1e-7)
    assert apart(dense(there), dense(here)) < 1e-5
