"""Which experts may be folded: schema and finiteness findings."""

import pytest
import torch

from merging.check import MAX_PAIRS, Finding, check_finite, check_schema
from registry.records import TensorSpec

BASE = {
    "h.0.weight": TensorSpec("F32", (4, 3)),
    "h.0.bias": TensorSpec("F32", (4,)),
    "position_ids": TensorSpec("I64", (1, 7)),
}


def schema(expert):
    return check_schema(BASE, expert, heads=lambda name: name.startswith("classifier."))


def without(name: str):
    return {key: spec for key, spec in BASE.items() if key != name}


@pytest.mark.parametrize(
    "expert",
    [
        BASE,
        BASE | {"h.0.bias": TensorSpec("BF16", (4,))},
        BASE | {"h.0.bias": TensorSpec("float16", (4,))},
        BASE | {"position_ids": TensorSpec("I32", (1, 7))},
        BASE | {"classifier.weight": TensorSpec("F32", (2, 4))},
    ],
)
def test_an_expert_of_the_same_schema_has_no_findings(expert):
    assert schema(expert) == []


@pytest.mark.parametrize("name", BASE)
def test_a_tensor_that_the_expert_lacks_counts_as_unchanged(name):
    assert schema(without(name)) == []


def test_an_expert_with_no_tensor_of_the_base_is_refused():
    found = schema({"classifier.weight": TensorSpec("F32", (2, 4))})
    assert [one.tensor for one in found] == list(BASE)
    assert {one[:1] + one[2:3] for one in found} == {("E_SCHEMA", "the expert has no tensor of the base")}


@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 3, 1), (4, 4)])
def test_another_shape_is_found_even_with_as_many_elements(shape):
    expert = BASE | {"h.0.weight": TensorSpec("F32", shape)}
    assert schema(expert) == [Finding("E_SCHEMA", "h.0.weight", "the shapes differ", "(4, 3)", str(shape))]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("h.0.bias", "I32"), ("h.0.bias", "BOOL"), ("h.0.bias", "C64"), ("position_ids", "F32"), ("position_ids", "bool")],
)
def test_another_kind_of_number_is_found(name, dtype):
    (finding,) = schema(BASE | {name: BASE[name]._replace(dtype=dtype)})
    assert (finding.tensor, finding.what, finding.found) == (name, "the kinds of number differ", dtype)


def test_an_extra_tensor_is_found():
    expert = BASE | {"../../evil": TensorSpec("F32", (1,))}
    assert schema(expert) == [
        Finding("E_SCHEMA", "../../evil", "the base has no such tensor", "no tensor of this name", "F32 (1,)")
    ]


@pytest.mark.parametrize("name", ["h.0.waight", "h.0.weigh", "h.0_weight", "h.0.weight "])
def test_a_name_off_by_a_character_gets_a_suggestion(name):
    expert = without("h.0.weight") | {name: BASE["h.0.weight"]}
    assert [(one.tensor, one.expected) for one in schema(expert) if one.tensor == name] == [
        (name, "did you mean 'h.0.weight'?")
    ]


def test_all_problems_are_listed():
    expert = {"h.0.weight": TensorSpec("I32", (1,)), "other": TensorSpec("F32", (1,))}
    assert [one.tensor for one in schema(expert)] == ["other", "h.0.weight", "h.0.weight"]


def test_an_expert_of_another_architecture_is_answered_without_suggestions():
    side = int(MAX_PAIRS**0.5) + 1
    base = {f"block.{i}": TensorSpec("F32", (1,)) for i in range(side)}
    expert = {f"blocks.{i}": TensorSpec("F32", (1,)) for i in range(side)}
    findings = check_schema(base, expert, heads=lambda name: False)
    assert len(findings) == 2 * side
    assert not any("did you mean" in one.expected for one in findings)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("index", [0, 5, 11])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_nan_is_found_in_every_float_dtype(dtype, index):
    tensor = torch.ones(12)
    tensor[index] = float("nan")
    finding = check_finite("w", tensor.to(dtype).view(3, 4))
    assert finding is not None
    assert (finding.code, finding.tensor) == ("E_NONFINITE", "w")
    assert finding.found == f"1 of 12 not finite, the first at flat index {index}: nan"


def test_infinities_are_counted():
    finding = check_finite("w", torch.tensor([1.0, float("-inf"), float("inf"), float("nan")]))
    assert finding is not None
    assert finding.found == "3 of 4 not finite, the first at flat index 1: -inf"


def test_the_flat_index_of_a_transposed_tensor_is_in_its_own_order():
    tensor = torch.ones(2, 3)
    tensor[0, 1] = float("nan")
    finding = check_finite("w", tensor.T)
    assert finding is not None
    assert "flat index 2:" in finding.found


@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.ones(4).to(dtype) for dtype in FLOATS),
        torch.tensor([1e300], dtype=torch.float64),
        torch.ones(0),
        torch.tensor(2.0),
        torch.arange(3),
        torch.tensor([True]),
    ],
)
def test_finite_tensors_pass(tensor):
    assert check_finite("w", tensor) is None
