"""One tensor's change in few bytes, within an error that is measured: what an archived expert is made of.

Forms: "same" as the base; "dense", "sparse" and "factors" as in `merging.forms`; "exact", the expert's own tensor,
where nothing smaller is near enough.

>>> base = torch.zeros(64, 48)
>>> expert = base + torch.outer(torch.linspace(-1, 1, 64), torch.linspace(0, 1, 48))
>>> packed = pack(base, expert, tolerance=0.01)
>>> packed.form, packed.error <= 0.01, packed.size < expert.nbytes / 20
('factors', True, True)
>>> unpack(packed.form, packed.parts, base, expert.dtype).shape
torch.Size([64, 48])
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from merging.forms import Parts, dense, factors, read_dense, read_factors, read_sparse, sparse
from merging.measure import blocks
from merging.method import MergeError
from merging.target import Target, added, norm, wide

LEAST = 1e-4  # the smallest tolerance; below it the tensor itself is hardly larger
HEADER = 100  # bytes that a file's header says about one part, about
MAKERS: Mapping[str, Callable[[Target], Parts | None]] = {"factors": factors, "sparse": sparse, "dense": dense}
READERS: Mapping[str, Callable[[Parts, torch.Size], Tensor]] = {
    "factors": read_factors,
    "sparse": read_sparse,
    "dense": read_dense,
}


class Packed(NamedTuple):
    """A tensor's change as it is kept."""

    form: str
    parts: Parts  # what is stored, by name
    error: float = 0.0  # ||restored - expert|| / ||expert - base||, as measured; 0 for "same" and "exact"
    norm: float = 0.0  # ||expert - base||, Frobenius, in weight units; 0 for tensors that are no floating point

    @property
    def size(self) -> int:
        """Bytes, with about what a file's header says of them."""
        return sum(part.nbytes + HEADER for part in self.parts.values())


def pack(
    base: Tensor,  # any shape and dtype
    expert: Tensor,  # shape of the base, any dtype
    tolerance: float,  # of the relative error, in [LEAST, 1)
) -> Packed:
    """The form of the fewest bytes whose error is within the tolerance.

    What is measured is the tensor that `unpack` gives, rounded to the expert's dtype.

    Raises:
        MergeError: the tolerance is out of its range, or the change is not finite.
    """
    if not LEAST <= tolerance < 1:
        raise MergeError(f"tolerance is {tolerance}, expected {LEAST} <= tolerance < 1; 0.01 is usual")
    if torch.equal(expert, base.to(expert.dtype)):
        return Packed("same", {})
    exact = Packed("exact", {"exact": expert})
    if not (base.is_floating_point() and expert.is_floating_point()):
        return exact
    work = wide(base, expert.dtype)
    change = expert.to(work) - base.to(work)
    size = norm(change.reshape(-1)[part] for part in blocks(change.reshape(-1)))
    if not math.isfinite(size):
        raise MergeError("the change is not finite; an expert with NaN or infinity is never folded")
    exact = exact._replace(norm=size)
    return _smallest(Target(base, expert, change, size, tolerance), exact) if size else exact


def unpack(form: str, parts: Parts, base: Tensor, dtype: torch.dtype) -> Tensor:  # -> shape of the base
    """The expert's tensor, restored in its dtype: the same bytes on every processor.

    Raises:
        MergeError: the parts are not those of this form and shape.
    """
    if form == "same":
        return base.to(dtype)
    try:
        restored = parts["exact"] if form == "exact" else added(base, READERS[form](parts, base.shape), dtype)
    except (KeyError, RuntimeError, ValueError) as error:
        raise MergeError(f"what is kept is no change of the form {form!r}; restore it from a copy") from error
    if (restored.shape, restored.dtype) != (base.shape, dtype):
        found, expected = f"shape {list(restored.shape)} of {restored.dtype}", f"{list(base.shape)} of {dtype}"
        raise MergeError(f"what is kept has {found}, expected {expected}; restore it from a copy")
    return restored


def _smallest(target: Target, best: Packed) -> Packed:
    """The smallest form that, read back, is near enough."""
    for form, make in MAKERS.items():
        parts = make(target)
        found = Packed(form, parts, 0.0, target.norm) if parts else best
        if found.size < best.size:
            error = target.distance(unpack(form, found.parts, target.base, target.expert.dtype))
            best = found._replace(error=error) if error <= target.tolerance else best
    return best
