"""One tensor of the second pass: what is served, from the base and the state, with its digest."""

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from flows.faults import blamed, unfoldable
from flows.plan import LEFT, RIGHT, Plan, state_in
from flows.pool import Job
from registry.records import FoldinError

if TYPE_CHECKING:
    from torch import Tensor

    from merging.method import State, Stats
    from merging.read import Reading
    from registry.weights import Checkpoint


class Read(NamedTuple):
    """One serving tensor."""

    name: str
    pieces: "list[Tensor]"  # of the serving tensor, flat, in order
    sha256: str  # of the tensor
    moved: float
    lost: float


def read_job(plan: Plan, slots: "Checkpoint | None", stats: "Stats", name: str) -> Job:
    """`read_tensor` as a job of a pool."""

    def expect() -> None:
        plan.base.expect(name)
        if slots is not None:
            expect_slots(slots, name)

    stored = plan.base.stored[name]
    need = 2 * stored.bytes + 4 * prod(stored.spec.shape)
    return Job(lambda device: read_tensor(plan, slots, stats, name, device), need, expect)


def expect_slots(slots: "Checkpoint", name: str) -> None:
    """Tell the system that what is kept of a tensor is read soon."""
    for key in (f"{name}:total", f"{name}:total.{LEFT}", f"{name}:total.{RIGHT}"):
        if key in slots:
            slots.expect(key)


def read_tensor(plan: Plan, slots: "Checkpoint | None", stats: "Stats", name: str, device: str) -> Read:
    """One serving tensor with its digest."""
    from registry.headers import start_digest
    from registry.weights import raw_bytes

    kept, ending = plan.kinds.same.get(name, name), list["Reading"]()
    digest, pieces = start_digest(plan.base.stored[name].spec), list["Tensor"]()
    if slots is not None and kept in plan.names_set:
        merged = _merged_variance if kept in plan.kinds.variances else _merged
        source = merged(plan, slots, stats, kept, device, ending)
    else:
        source = iter([plan.base[kept]])
    with blamed(kept):
        for piece in source:
            pieces.append(piece.cpu())
            digest.update(raw_bytes(pieces[-1]))
    for each in ending:
        _check_finite(plan, kept, each)
    # Running statistics, and the second name of a tied tensor, do not count.
    found = ending[0] if ending and kept == name and not plan.is_statistic(name) else None
    return Read(name, pieces, digest.hexdigest(), found.moved if found else 0.0, found.lost if found else 0.0)


def _check_finite(plan: Plan, name: str, found: "Reading") -> None:
    if not found.finite:
        what = f"a value is beyond the range of {plan.base.stored[name].spec.dtype}"
        raise FoldinError(unfoldable(name, "the merged tensor is not finite", what))


def _merged(
    plan: Plan, slots: "Checkpoint", stats: "Stats", name: str, device: str, ending: "list[Reading]"
) -> "Iterator[Tensor]":
    """A merged tensor piece by piece; `ending` gets what came of it. Only factors are on the device as a whole."""
    import torch

    from merging.lowrank import Factors, dense_state
    from merging.read import read_pieces

    method, base = plan.method_for(name), plan.tensor(plan.base, name)
    kept = state_in(slots, name, method, "cpu")
    state = dense_state(Factors(*(side.to(device) for side in kept)) if isinstance(kept, Factors) else kept)
    ending.append((yield from read_pieces(method, base, state, stats, torch.device(device))))


def _merged_variance(
    plan: Plan, slots: "Checkpoint", stats: "Stats", name: str, device: str, ending: "list[Reading]"
) -> "Iterator[Tensor]":
    """A merged running variance: of the mean square about the base's mean, less the mean's own move squared."""
    import torch

    from merging.lowrank import Factors
    from merging.read import Reading
    from merging.statistics import merged_variance

    base, moved = plan.base[name].to(device), []
    for each in (plan.kinds.variances[name], name):
        state = state_in(slots, each, plan.method_for(each), device)
        assert not isinstance(state, Factors), "a vector has no factors"
        moved.append(torch.zeros_like(base) if state is None else plan.method_for(each).read(state, stats))
    merged = merged_variance(base, *moved)
    ending.append(Reading(0.0, 0.0, bool(torch.isfinite(merged).all())))
    yield merged


class Reader:
    """Makes a serving tensor out of the pieces of its state, while they are at hand."""

    def __init__(self, plan: Plan, name: str, stats: "Stats") -> None:
        from registry.headers import start_digest

        self._plan, self._name, self._stats = plan, name, stats
        self._digest = start_digest(plan.base.stored[name].spec)
        self._pieces: list[Tensor] = []
        self._room: Tensor | None = None
        self._sums: Tensor | None = None

    def take(self, base: "Tensor", state: "State") -> None:
        """The next piece: of the base, (n,), and of the slots."""
        from merging.read import merged_piece, reading_room
        from registry.weights import raw_bytes

        update = self._plan.method_for(self._name).read(state, self._stats)
        if self._room is None or self._room.shape[1] < len(base):
            self._room = reading_room(base)
        merged, sums = merged_piece(base, update, self._room)
        self._pieces.append(merged.cpu())
        self._digest.update(raw_bytes(self._pieces[-1]))
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self) -> "Read":
        """The whole tensor."""
        from merging.read import reading_of

        assert self._sums is not None, "every tensor has a piece"
        found = reading_of(self._sums)
        _check_finite(self._plan, self._name, found)
        return Read(self._name, self._pieces, self._digest.hexdigest(), found.moved, found.lost)
