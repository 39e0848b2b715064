"""May this expert's tensors be folded into this base? Answers are values, not exceptions.

>>> check_finite("h.0.bias", torch.tensor([0.0, float("nan"), 1.0]))
Finding(code='E_NONFINITE', tensor='h.0.bias', what='not every value is finite', expected='finite values', \
found='1 of 3 not finite, the first at flat index 1: nan')
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# A nearest-name search compares every pair of names; beyond this many pairs an expert is from another architecture.
MAX_PAIRS = 10_000


class Spec(Protocol):
    """What is known of a tensor without reading it. Dtypes may be spelled as safetensors (F32) or torch (float32)."""

    @property
    def dtype(self) -> str:
        """Name of the dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""


class Finding(NamedTuple):
    """One reason why an expert may not be folded."""

    code: str  # E_SCHEMA or E_NONFINITE
    tensor: str
    what: str
    expected: str
    found: str


def check_schema(
    base: Mapping[str, Spec], expert: Mapping[str, Spec], *, heads: Callable[[str], bool]
) -> list[Finding]:
    """Every way in which the expert's tensors are not the base's; empty when it may be folded.

    Tensors that the expert lacks count as unchanged, as long as it has any of the base's. It may have no others, except
    for those that `heads` accepts; shapes must be equal; a float tensor must meet a float tensor and an integer one an
    integer one, in any width.
    """
    missing = [name for name in base if name not in expert]
    extra = [name for name in expert if name not in base and not heads(name)]
    shared = [name for name in base if name in expert]
    return [
        *(
            Finding("E_SCHEMA", name, "the expert has no tensor of the base", _text(base[name]), "none")
            for name in missing
            if not shared
        ),
        *_extra(extra, missing, expert),
        *(finding for name in shared for finding in _mismatches(name, base[name], expert[name])),
    ]


def check_finite(name: str, tensor: Tensor) -> Finding | None:  # any shape, dtype and device
    """The first NaN or infinity and how many there are, or None when every value is finite."""
    if not tensor.is_floating_point():
        return None
    # 8-bit floats have no isfinite kernel; float32 holds all of their values.
    values = tensor.float() if tensor.itemsize == 1 else tensor
    if not values.numel() or bool(torch.isfinite(values.abs().max())):  # NaN is the largest of all; far cheaper
        return None
    wrong = ~torch.isfinite(values).flatten()
    count = int(wrong.sum())
    first = int(wrong.to(torch.uint8).argmax())
    place = f"{count} of {tensor.numel()} not finite, the first at flat index {first}: {values.flatten()[first].item()}"
    return Finding("E_NONFINITE", name, "not every value is finite", "finite values", place)


def _extra(extra: Collection[str], missing: Collection[str], expert: Mapping[str, Spec]) -> Iterator[Finding]:
    candidates = missing if len(extra) * len(missing) <= MAX_PAIRS else []
    for name in extra:
        nearest = get_close_matches(name, candidates, n=1, cutoff=0.8)
        expected = f"did you mean {nearest[0]!r}?" if nearest else "no tensor of this name"
        yield Finding("E_SCHEMA", name, "the base has no such tensor", expected, _text(expert[name]))


def _mismatches(name: str, base: Spec, expert: Spec) -> Iterator[Finding]:
    if tuple(base.shape) != tuple(expert.shape):
        yield Finding("E_SCHEMA", name, "the shapes differ", str(tuple(base.shape)), str(tuple(expert.shape)))
    if _kind(base.dtype) != _kind(expert.dtype):
        expected = f"{_kind(base.dtype)}, as {base.dtype}"
        yield Finding("E_SCHEMA", name, "the kinds of number differ", expected, expert.dtype)


def _kind(dtype: str) -> str:
    spelled = dtype.lower()
    if spelled.startswith("bool"):
        return "boolean"
    kinds = {"f": "float", "b": "float", "i": "integer", "u": "integer"}
    return kinds.get(spelled[:1], spelled)


def _text(spec: Spec) -> str:
    return f"{spec.dtype} {tuple(spec.shape)}"
