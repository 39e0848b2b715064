"""What every method of the catalogue promises; a new row of METHODS is tested without touching this file."""

import math

import pytest
import torch
from safetensors.torch import load, save

from merging import METHODS, MergeError, Stats, build, merge
from merging.fold import advance, fold_tensor, role_of
from merging.method import Role
from merging.read import read_tensor

PROJECTED = {"fc.weight", "proj.weight"}
WHOLE_EXPERT = {"opcm", "average"}  # methods that promise to return a lone expert


@pytest.fixture(params=sorted(METHODS))
def method(request) -> str:
    return request.param


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (24, 8), "proj.weight": (8, 24), "fc.bias": (24,), "embed": (5, 8), "logit_scale": ()}
    found = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found["half"] = found["fc.bias"].bfloat16()
    return found | {"position_ids": torch.arange(5), "mask": torch.tensor([True, False])}


def moved(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    change = tensors(seed, 0.1)
    return {name: one + change[name] if one.is_floating_point() else one.bitwise_not() for name, one in base.items()}


BASE = tensors(0)
EXPERTS = [moved(BASE, seed) for seed in (1, 2, 3)]


def stream(method: str, base, experts, save_state: bool = False):
    """The driver's own loop, with states that may travel through safetensors bytes between experts."""
    rule, stats, states = build(method, {}), Stats(), {}
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    for expert in experts:
        measures = []
        for name in names:
            role = role_of(base[name], name in PROJECTED, stats.count)
            states[name], found = fold_tensor(rule, base[name], states.get(name), expert[name], role)
            measures.append(found)
        stats = advance(stats, measures)
        if save_state:
            states = {name: load(save(state)) for name, state in states.items()}
        states = {name: state for name, state in states.items() if any(slot.any() for slot in state.values())}
    return {name: read_tensor(rule, base[name], states.get(name), stats)[0] for name in base}


def same_bytes(left, right) -> bool:
    # Integer views tell -0.0 from 0.0 and compare NaN.
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def clone(model):
    return {name: tensor.clone() for name, tensor in model.items()}


def test_arguments_are_unchanged(method):
    base, experts = clone(BASE), [clone(expert) for expert in EXPERTS]
    merged = merge(base, experts, method, projected=PROJECTED)
    for tensor in merged.values():
        tensor.zero_()  # the result shares no memory with the arguments
    assert same_bytes(base, BASE)
    assert all(same_bytes(left, right) for left, right in zip(experts, EXPERTS, strict=True))


def test_a_fold_leaves_the_earlier_state_unchanged(method):
    rule, base = build(method, {}), BASE["fc.weight"]
    role = role_of(base, True, 1)
    state, _ = fold_tensor(rule, base, None, EXPERTS[0]["fc.weight"], role)
    kept = clone(state)
    fold_tensor(rule, base, state, EXPERTS[1]["fc.weight"], role)
    rule.read(state, Stats(1, 1, 1)).zero_()
    assert same_bytes(state, kept)


def test_names_shapes_and_dtypes_are_those_of_the_base(method):
    merged = merge(BASE, EXPERTS, method, projected=PROJECTED)
    assert [(name, one.shape, one.dtype) for name, one in merged.items()] == [
        (name, one.shape, one.dtype) for name, one in BASE.items()
    ]


def test_states_are_float32_and_start_at_zero(method):
    rule = build(method, {})
    state = rule.init(BASE["half"])
    assert not any(slot.any() for slot in state.values())
    assert "total" in state
    state, _ = fold_tensor(rule, BASE["half"], None, EXPERTS[0]["half"], role_of(BASE["half"], False, 0))
    assert {(slot.dtype, slot.shape) for slot in state.values()} == {(torch.float32, BASE["half"].shape)}


def test_experts_move_the_float_tensors_only(method):
    merged = merge(BASE, EXPERTS, method, projected=PROJECTED)
    unmoved = {name for name in BASE if torch.equal(merged[name], BASE[name])}
    assert unmoved == {"position_ids", "mask"}


def test_streaming_equals_the_in_memory_merge(method):
    merged = merge(BASE, EXPERTS, method, projected=PROJECTED)
    assert same_bytes(stream(method, BASE, EXPERTS), merged)


def test_saving_and_loading_the_state_changes_nothing(method):
    assert same_bytes(stream(method, BASE, EXPERTS, save_state=True), stream(method, BASE, EXPERTS))


def test_same_inputs_give_the_same_bytes(method):
    again = merge(clone(BASE), (clone(expert) for expert in EXPERTS), method, projected=PROJECTED)
    assert same_bytes(again, merge(BASE, EXPERTS, method, projected=PROJECTED))


def test_experts_equal_to_the_base_give_the_base(method):
    base = BASE | {"fc.bias": torch.full((24,), -0.0)}
    assert same_bytes(merge(base, [base, base], method, projected=PROJECTED), base)


def test_an_unmoved_expert_among_others_gives_finite_values(method):
    merged = merge(BASE, [EXPERTS[0], BASE, EXPERTS[1]], method, projected=PROJECTED)
    assert all(bool(torch.isfinite(one).all()) for one in merged.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_expert_that_is_not_finite_is_refused(method, value):
    with pytest.raises(MergeError, match="the fold is not finite"):
        fold_tensor(build(method, {}), torch.zeros(2), None, torch.tensor([0.0, value]), Role())


def test_a_transposed_expert_gives_a_contiguous_state(method):
    state, _ = fold_tensor(build(method, {}), torch.zeros(3, 2), None, torch.arange(6.0).view(2, 3).T, Role())
    assert all(slot.is_contiguous() for slot in state.values())


def test_reading_before_any_expert_gives_zeros(method):
    rule = build(method, {})
    assert torch.equal(rule.read(rule.init(torch.ones(3)), Stats()), torch.zeros(3))


def test_no_expert_gives_the_base(method):
    assert same_bytes(merge(BASE, [], method, projected=PROJECTED), BASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(WHOLE_EXPERT))
def test_one_expert_alone_gives_that_expert(name, dtype):
    base = {key: one.to(dtype) for key, one in BASE.items() if one.is_floating_point()}
    expert = {key: EXPERTS[0][key].to(dtype) for key in base}
    merged = merge(base, [expert], name, projected=PROJECTED)
    for key in base:
        # expert - base and base + delta each round once in float32, relative to the larger of the two.
        step = torch.finfo(torch.float32).eps * torch.maximum(base[key].abs(), expert[key].abs()).float()
        assert bool(((merged[key].float() - expert[key].float()).abs() <= step).all()), key


def test_a_parameter_that_requires_grad_can_be_merged(method):
    base = {"fc.weight": torch.nn.Parameter(BASE["fc.weight"].clone())}
    merged = merge(base, [{"fc.weight": EXPERTS[0]["fc.weight"]}], method, projected=PROJECTED & base.keys())
    assert not merged["fc.weight"].requires_grad


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("ocpm", {}, r"no method 'ocpm', expected one of opcm, average, task_arithmetic, magmax; did you mean 'opcm'"),
        ("opcm", {"enrgy": 0.5}, r"no parameter 'enrgy', expected one of .*; did you mean 'energy'"),
        ("average", {"scale": 1.0}, r"no parameter 'scale', expected none"),
        ("opcm", {"energy": "0.5"}, r"opcm: energy is '0.5', expected a number; the default is 0.5"),
        ("opcm", {"variant": 1}, r"opcm: variant is 1, expected a text"),
        ("opcm", {"energy": True}, r"energy is True, expected a number"),
        ("opcm", {"energy": 1.0}, r"energy is 1.0, expected 0 <= energy < 1"),
        ("opcm", {"energy": -0.1}, r"energy is -0.1"),
        ("opcm", {"energy": float("nan")}, r"energy is nan"),
        ("opcm", {"strength": 0}, r"strength is 0, expected a finite number above 0"),
        ("opcm", {"strength": float("inf")}, r"strength is inf"),
        ("opcm", {"variant": "release"}, r"variant is 'release', expected one of fusionbench, released, paper"),
        ("task_arithmetic", {"scale": -1}, r"task_arithmetic: scale is -1"),
        ("magmax", {"scale": float("nan")}, r"magmax: scale is nan"),
    ],
)
def test_wrong_names_and_values_are_refused(name, parameters, words):
    with pytest.raises(MergeError, match=words):
        build(name, parameters)
