"""What one pass folds: which tensors, in which form, by which rule, from where. Plain values, for any worker."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.fitting import Fitted
from flows.kinds import Kinds
from registry.records import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from merging.lowrank import Factors
    from merging.method import Method, Role, State
    from registry.weights import Checkpoint

LEFT, RIGHT = "left", "right"  # what the factors of a slot are called beside it: NAME:SLOT.left


@dataclass(frozen=True)
class Plan:
    """One pass over base and state for some experts, in the order in which they are folded."""

    method: str
    parameters: Mapping[str, Any]
    base: "Checkpoint"
    slots: "Checkpoint | None"  # the parent's, as NAME:SLOT; None: nothing was moved yet
    experts: tuple[Fitted, ...]
    kinds: Kinds
    stats: tuple[float, float, float]  # the parent's: count, norm_sum, total_norm
    names: tuple[str, ...]  # the tensors that one of these experts or an earlier one moved, in the base's file order
    stored: tuple[Mapping[str, str], ...]  # per expert: tensor -> the coarsest dtype so far, where not the base's
    ranks: Mapping[str, tuple[int, ...]]  # per tensor whose total is kept as factors: its rank after each expert; -1
    # from where on it is kept as a matrix. All others are kept as they are.
    profile: Mapping[str, str] = field(default_factory=dict)  # of the process that made the plan
    weights: tuple[float, ...] = ()  # per expert, what its change is multiplied by
    squares: float = 0.0  # of the weights of all experts before, summed: their roundings add up like that

    def __getstate__(self) -> dict[str, Any]:
        """Travels between processes without what was worked out from it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def sha256(self) -> str:
        """Digest of how each tensor is folded: a part that was made by another plan is not this one's.

        How strongly the total is read is not among it: it changes what is served, and no part of the state.
        """
        from merging.catalogue import STRENGTH

        kinds = [sorted(self.kinds.projected), sorted(self.kinds.stacked), sorted(self.kinds.means.items())]
        specs = {key: spec for name in self.names for key, spec in self.slot_specs(name).items()}
        folded = {key: value for key, value in self.parameters.items() if key != STRENGTH.get(self.method)}
        facts = [
            self.method,
            folded,
            kinds,
            self.ranks,
            self.stored,
            self.stats,
            self.names,
            specs,
            self.weights,
            self.squares,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode()).hexdigest()

    @cached_property
    def names_set(self) -> frozenset[str]:
        """The names, to ask whether one is among them."""
        return frozenset(self.names)

    @cached_property
    def rule(self) -> "Method":
        """The line's merge method."""
        from merging import build

        return build(self.method, self.parameters)

    @cached_property
    def one_pass(self) -> bool:
        """Whether state and serving weights can be made together; what depends on two tensors cannot."""
        return self.rule.one_pass and not self.kinds.means and not self.kinds.same

    def is_plain(self, name: str) -> bool:
        """Whether a tensor is folded entry by entry into a single slot, so that it can be written as it is made."""
        projected = name in self.kinds.projected and not self.method_for(name).one_pass
        return not projected and name not in self.ranks and len(self.slot_specs(name)) == 1

    def method_for(self, name: str) -> "Method":
        """The method that folds a tensor: statistics of batch norms are averaged whatever the line does."""
        from merging import build

        return build("average", {}) if self.is_statistic(name) else self.rule

    def is_statistic(self, name: str) -> bool:
        """Whether a tensor is a running mean or variance, which counts in no norm."""
        return name in self.kinds.means or name in self.kinds.variances

    def tensor(self, tensors: "Mapping[str, Tensor]", name: str) -> "Tensor":
        """A tensor of the base or of an expert as it is folded: in place of a running variance the second moment."""
        from merging.statistics import second_moment

        if name not in self.kinds.variances:
            return tensors[name]
        pair = (self.kinds.variances[name], name)
        mean, variance = (tensors[each] if each in tensors else self.base[each] for each in pair)
        return second_moment(self.base[pair[0]], mean, variance)

    def is_factored(self, name: str) -> bool:
        """Whether a tensor's total is kept as factors after this pass."""
        return name in self.ranks and self.ranks[name][-1] > 0

    def role(self, name: str, base: "Tensor", expert: int) -> "Role":
        """How a tensor takes part in the fold of the expert with this number."""
        from merging.fold import role_of
        from registry.weights import DTYPES

        stored = DTYPES[self.stored[expert].get(name, self.base.stored[name].spec.dtype)]
        projected, stacked = name in self.kinds.projected, name in self.kinds.stacked
        squares = self.squares + sum(weight * weight for weight in self.weights[:expert])
        return role_of(base, projected, squares, stored, stacked=stacked)

    def earlier(self, name: str, device: str) -> "State | Factors | None":
        """The parent's state of one tensor, in the form in which it is kept; None where no expert moved it."""
        return None if self.slots is None else state_in(self.slots, name, self.method_for(name), device)

    def slot_specs(self, name: str) -> dict[str, TensorSpec]:
        """Key -> dtype and shape of what is kept of one tensor after this pass."""
        import torch

        shape = self.base.stored[name].spec.shape
        if self.is_factored(name):
            sides = zip((LEFT, RIGHT), shape, strict=True)
            return {f"{name}:total.{side}": TensorSpec("F32", (length, self.ranks[name][-1])) for side, length in sides}
        slots = self.method_for(name).init(torch.empty(shape, device="meta"))
        return {f"{name}:{slot}": TensorSpec("F32", shape) for slot in sorted(slots)}


def numerics_profile(device: str) -> dict[str, str]:
    """What the bytes of a fold may depend on besides its inputs; how many cores there are is not among it."""
    import torch

    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": "1",
        "python": platform.python_version(),
    }


@cache
def _processor() -> str:
    """The kind of processor: libraries choose their routines by maker, model and instruction set."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    kind = [facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "model name")]
    return " ".join(filter(None, ("cpu", platform.machine(), *kind, torch.backends.cpu.get_cpu_capability())))


def state_in(slots: Mapping[str, "Tensor"], name: str, method: "Method", device: str) -> "State | Factors | None":
    """One tensor's state among some slots."""
    import torch

    from merging.lowrank import Factors

    if f"{name}:total.{LEFT}" in slots:
        return Factors(*(slots[f"{name}:total.{side}"].to(device) for side in (LEFT, RIGHT)))
    if f"{name}:total" not in slots:
        return None
    return {slot: slots[f"{name}:{slot}"].to(device) for slot in method.init(torch.empty(0))}
