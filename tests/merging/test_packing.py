"""Changes of tensors in few bytes: within the tolerance as measured, and restored to the same bytes."""

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import MergeError
from merging.coding import LARGEST, decoded, encoded
from merging.forms import factors, read_factors
from merging.packing import MAKERS, pack, unpack
from merging.target import Target

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (7,), (1, 9), (33, 20), (20, 33), (4, 6, 5), (3, 2, 2, 2))
KINDS = ("normal", "low", "sparse", "rows", "heavy")
numbers = st.lists(st.integers(1 - LARGEST, LARGEST - 1) | st.integers(-3, 3), max_size=60)


def change_of(kind, shape, seed, size=0.01):
    """A change such as training makes: of all entries, of low rank, of few entries, of some rows, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    normal = size * torch.randn(shape, generator=generator)
    if kind == "low" and len(shape) == 2:
        return torch.outer(normal[:, 0], torch.randn(shape[1], generator=generator))
    if kind == "sparse":
        return normal * (torch.rand(shape, generator=generator) < 0.02)
    if kind == "rows" and shape:
        return normal * (torch.arange(shape[0]) % 5 == 0).reshape(-1, *[1] * (len(shape) - 1))
    return normal**5 / size**4 if kind == "heavy" else normal


def pair(kind, shape, seed, dtype=torch.float32):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000))
    return base, (base + change_of(kind, shape, seed)).to(dtype)


def relative(restored, base, expert):
    base, expert = base.double(), expert.double()
    return float((restored.double() - expert).norm() / (expert - base).norm())


@given(numbers=numbers)
def test_numbers_come_back(numbers):
    given_ = torch.tensor(numbers, dtype=torch.int32)
    assert decoded(encoded(given_), len(numbers)).tolist() == numbers


@given(numbers=numbers, count=st.integers(0, 80), cut=st.integers(0, 80))
def test_other_bytes_or_counts_are_refused(numbers, count, cut):
    stream = encoded(torch.tensor(numbers, dtype=torch.int32))
    if count != len(numbers) and numbers and any(numbers):
        with pytest.raises(MergeError, match="not those of"):
            decoded(stream, count)
    if cut < len(stream):
        with pytest.raises(MergeError, match="not those of"):
            decoded(stream[:cut], len(numbers))


def test_a_stream_that_would_fill_the_memory_is_refused():
    bomb = encoded(torch.zeros(10**6, dtype=torch.int32) + 1)
    assert len(bomb) < 5000
    with pytest.raises(MergeError, match="not those of 10 numbers"):
        decoded(bomb, 10)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(FLOATS),
    tolerance=st.sampled_from((1e-3, 0.01, 0.1, 0.5)),
)
def test_the_error_is_measured_and_within_the_tolerance(kind, shape, seed, dtype, tolerance):
    base, expert = pair(kind, shape, seed, dtype)
    before = expert.clone()
    packed = pack(base, expert, tolerance)
    restored = unpack(packed.form, packed.parts, base, dtype)
    assert (restored.shape, restored.dtype) == (expert.shape, dtype)
    assert torch.equal(restored, unpack(packed.form, packed.parts, base, dtype))
    assert packed.error <= tolerance
    if packed.form in ("same", "exact"):
        assert torch.equal(restored, expert)
    else:
        assert relative(restored, base, expert) == pytest.approx(packed.error, rel=1e-6)
        assert packed.size < expert.nbytes + 100
        assert packed.norm == pytest.approx(float((expert.double() - base.double()).norm()), rel=1e-5)
    assert torch.equal(expert, before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (5,), (6, 4)])
def test_nothing_is_kept_of_what_did_not_change(shape, dtype):
    base = torch.randn(shape)
    packed = pack(base, base.to(dtype), 0.01)
    assert packed == ("same", {}, 0.0, 0.0)
    assert torch.equal(unpack("same", {}, base, dtype), base.to(dtype))


@pytest.mark.parametrize("shape", [(768, 768), (1536, 384), (384, 1536)])
def test_an_adapters_change_takes_a_twentieth_and_less(shape):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator)
    change = 0.01 * torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
    packed = pack(base, base + change, 0.01)
    assert packed.form == "factors"
    assert len(packed.parts["scale"]) == 4
    assert packed.size * 20 < base.nbytes


@pytest.mark.parametrize(("kind", "form"), [("normal", "dense"), ("sparse", "sparse"), ("low", "factors")])
def test_each_kind_of_change_has_its_form(kind, form):
    packed = pack(*pair(kind, (200, 150), 1), 0.03)
    assert packed.form == form
    assert packed.size < 200 * 150 * 4 / (5 if form == "dense" else 20)


@pytest.mark.parametrize(("kind", "form"), [("normal", "dense"), ("low", "factors")])
def test_of_a_large_matrix_some_rows_tell_whether_its_rank_is_low(kind, form):
    assert pack(*pair(kind, (1100, 1200), 1), 0.03).form == form


def test_a_larger_tolerance_never_takes_more_bytes():
    sizes = [pack(*pair("normal", (128, 96), 2), tolerance).size for tolerance in (1e-3, 0.01, 0.03, 0.1, 0.3)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_change_that_is_not_finite_is_refused(value):
    base, expert = pair("normal", (6, 4), 0)
    expert[2, 1] = value
    with pytest.raises(MergeError, match="not finite"):
        pack(base, expert, 0.01)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, 1e-5, torch.nan])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    with pytest.raises(MergeError, match="tolerance is"):
        pack(torch.zeros(2), torch.ones(2), tolerance)


def test_what_is_no_floating_point_is_kept_exactly():
    for base, expert in [(torch.arange(4), torch.arange(4) + 1), (torch.tensor([True]), torch.tensor([False]))]:
        packed = pack(base, expert, 0.5)
        assert (packed.form, packed.error) == ("exact", 0.0)
        assert torch.equal(unpack("exact", packed.parts, base, expert.dtype), expert)


def test_the_largest_numbers_of_a_dtype_come_back_finite():
    base, expert = torch.zeros(400), torch.full((400,), 65504.0).to(torch.float16)
    packed = pack(base, expert, 0.01)
    assert packed.form == "dense"
    assert torch.isfinite(unpack(packed.form, packed.parts, base, torch.float16)).all()
    assert packed.error <= 0.01


def test_the_product_of_factors_is_exact_in_any_order():
    base = torch.randn(96, 40, generator=torch.Generator().manual_seed(5))
    low = base + change_of("low", (96, 40), 1) + 0.3 * change_of("low", (96, 40), 2)
    change = low - base
    parts = factors(Target(base, low, change, float(change.norm()), 1e-3))
    whole = read_factors(parts, base.shape)
    left, right = (decoded(parts[side], 2 * size).reshape(2, size) for side, size in (("left", 96), ("right", 40)))
    backwards = sum(
        torch.outer(left[rank].double() * parts["scale"][rank], right[rank].double()) for rank in reversed(range(2))
    )
    assert torch.equal(whole, backwards)


@pytest.mark.parametrize("form", [*MAKERS, "exact", "else"])
def test_parts_of_another_form_or_shape_are_refused(form):
    base, expert = pair("low", (33, 20), 1)
    packed = pack(base, expert, 0.1)
    for wrong in ({}, {"exact": torch.zeros(3)}, {name: part[:1] for name, part in packed.parts.items()}):
        with pytest.raises(MergeError):
            unpack(form, wrong, base, torch.float32)


def test_places_outside_the_tensor_are_refused():
    base, expert = pair("sparse", (200, 150), 1)
    packed = pack(base, expert, 0.03)
    with pytest.raises(MergeError, match="no change of the form 'sparse'"):
        unpack("sparse", packed.parts, base[:20], torch.float32)


NAMES = ("codes", "step", "places", "count", "left", "right", "scale", "exact")
KINDS_OF_PARTS = (torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool)
values = st.lists(st.integers(-9, 70) | st.sampled_from((10**9, torch.nan, torch.inf)), min_size=1, max_size=4)
streams = st.lists(st.integers(-50, 700), max_size=40).map(
    lambda given: encoded(torch.tensor(given, dtype=torch.int32))
)


@st.composite
def plain(draw):
    """A small tensor of any dtype."""
    flat = torch.tensor(draw(values), dtype=torch.float64).to(draw(st.sampled_from(KINDS_OF_PARTS)))
    return flat[0] if draw(st.booleans()) else flat.reshape(draw(st.sampled_from(((-1,), (1, -1), (-1, 1)))))


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(("normal", "low", "sparse")),
    shape=st.sampled_from(((), (0,), (7,), (6, 4), (40, 30), (4, 3, 2))),
    wrong=st.dictionaries(st.sampled_from(NAMES), plain() | streams, max_size=4),
    without=st.sets(st.sampled_from(NAMES), max_size=1),
    form=st.sampled_from((*MAKERS, "exact")),
    own=st.booleans(),
)
def test_wrong_parts_are_refused_and_raise_nothing_else(kind, shape, wrong, without, form, own):
    packed = pack(*pair(kind, (40, 30), 1), 0.1)
    parts = {name: part for name, part in {**packed.parts, **wrong}.items() if name not in without}
    base = torch.zeros(shape)
    try:
        restored = unpack(packed.form if own else form, parts, base, torch.float32)
    except MergeError:
        return
    assert (restored.shape, restored.dtype) == (base.shape, torch.float32)


def test_places_that_go_back_are_refused():
    base = torch.zeros(200)
    parts = {"codes": [1, 1, 1], "places": [5, 500, -400]}
    parts = {name: encoded(torch.tensor(each, dtype=torch.int32)) for name, each in parts.items()}
    parts |= {"step": torch.tensor([0.1], dtype=torch.float64), "count": torch.tensor([3])}
    with pytest.raises(MergeError, match="no change of the form 'sparse'"):
        unpack("sparse", parts, base, torch.float32)
    parts["places"] = encoded(torch.tensor([5, 3, -2], dtype=torch.int32))  # one of them twice
    with pytest.raises(MergeError, match="no change of the form 'sparse'"):
        unpack("sparse", parts, base, torch.float32)


def test_factors_of_a_rank_that_no_matrix_has_take_no_memory():
    few, base = encoded(torch.zeros(0, dtype=torch.int32)), torch.zeros(2000, 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rank in (0, 21, 20_000):
        parts = {"left": few, "right": few, "scale": torch.ones(rank, dtype=torch.float64)}
        with pytest.raises(MergeError, match="no change of the form 'factors'"):
            unpack("factors", parts, base, torch.float32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
