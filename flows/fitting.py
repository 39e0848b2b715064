"""An expert's tensors by the base's names and in the base's shapes, whatever form it came in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from flows.faults import said_of
from flows.matching import untied, vocabulary_rows
from flows.versions import Version
from registry import intake
from registry.records import Refusal, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.architecture import Anatomy
    from registry.adapters import Adapter
    from registry.weights import Checkpoint


@dataclass(frozen=True, eq=False)
class Fitted(Mapping[str, "Tensor"]):
    """An expert's tensors as the base would hold them; those that it lacks are not among them."""

    tensors: "Checkpoint | Adapter"  # by the base's names
    base: "Checkpoint"
    moved: frozenset[str] = frozenset()  # names of the tensors that differ from the base's
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # per vocabulary tensor: `matched_rows`

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> dtype as stored, shape of the base's."""
        return {
            name: TensorSpec(spec.dtype, self.base.stored[name].spec.shape if name in self.rows else spec.shape)
            for name, spec in self.tensors.specs.items()
        }

    def __getitem__(self, name: str) -> "Tensor":
        """The full tensor, on the CPU; rows of tokens that the expert lacks are the base's."""
        import torch

        tensor = self.tensors[name]
        if name not in self.rows:
            return tensor
        places = torch.tensor(self.rows[name], dtype=torch.int64)
        known = places >= 0
        own = self.base[name]
        fitted = own.to(torch.promote_types(own.dtype, tensor.dtype))  # the base's rows are not rounded to the expert's
        fitted[known] = tensor[places[known]].to(fitted.dtype)
        return fitted

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; reads nothing."""
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.tensors)

    def factors(self, name: str) -> "tuple[Tensor, Tensor] | None":
        """(left (rows, r), right (cols, r)) with expert - base == left @ right.T, where the expert is kept so."""
        from registry.adapters import Adapter

        return self.tensors.factors(name) if isinstance(self.tensors, Adapter) else None

    def rank(self, name: str) -> int | None:
        """The rank of `factors`; None where there are none. Reads nothing."""
        from registry.adapters import Adapter

        return self.tensors.rank(name) if isinstance(self.tensors, Adapter) and name in self else None

    def rounded_to(self, name: str) -> str:
        """The dtype that a tensor's values were rounded to; a full checkpoint began as the base, rounded as it is."""
        import torch

        from registry.adapters import Adapter
        from registry.weights import DTYPES

        if isinstance(self.tensors, Adapter):
            return self.tensors.rounded_to(name)
        both = (self.base.stored[name].spec.dtype, self.tensors.stored[name].spec.dtype)
        return max(both, key=lambda dtype: torch.finfo(DTYPES[dtype]).eps)

    def expect(self, name: str) -> None:
        """Tell the system that a tensor is read soon."""
        from registry.adapters import Adapter

        if not isinstance(self.tensors, Adapter) and name in self:
            self.tensors.expect(name)


class Fit(NamedTuple):
    """An expert whose every tensor was looked at."""

    body: Fitted  # the tensors that the base has
    head: "Checkpoint"  # those it lacks
    sha256: str  # content digest of both


def fit(base: Version, files: intake.Admitted, has_head: bool, where: str) -> Fit | Refusal:
    """The expert's tensors as the base would hold them, or why they cannot be held so.

    Args:
        base: the version that holds the line's base.
        files: the expert's copy.
        has_head: whether tensors that the base lacks may be the task's head.
        where: names the expert in messages.

    Raises:
        FoldinError: as `Checkpoint` and `Adapter` do for files that are not sound; what is wrong with the base's is
            said of `base.where`.
    """
    from evaluation.architecture import anatomy

    with said_of(base.where):
        weights = base.weights()
        known = anatomy(base.folder, list(weights))
    if files.is_adapter:
        return _fit_adapter(base, weights, files, known, where)
    return _fit_checkpoint(base, weights, files, known, has_head, where)


def _fit_adapter(
    base: Version, weights: "Checkpoint", files: intake.Admitted, known: "Anatomy", where: str
) -> Fit | Refusal:
    from registry.adapters import Adapter

    adapter = Adapter.open(files.folder, weights, where)
    for name in adapter:
        if name in known.aliases and known.aliases[name] in weights:
            what = f"the adapter changes one of two tied tensors, {name} and {known.aliases[name]}"
            remedy = "train the adapter without the output head, or untie it in the base"
            return Refusal("E_ADAPTER", what, where, tensor=name, remedy=remedy)
    for tensors in (adapter.stored, adapter.head):
        for name in tensors:
            wrong = _not_finite(name, tensors[name], where, tensors.stored[name].file)
            if wrong:
                return wrong
    return Fit(Fitted(adapter, weights, frozenset(adapter)), adapter.head, adapter.sha256)


def _fit_checkpoint(
    base: Version, weights: "Checkpoint", files: intake.Admitted, known: "Anatomy", has_head: bool, where: str
) -> Fit | Refusal:
    from registry.weights import Checkpoint, content_sha256

    body = untied(_aligned(Checkpoint.open(files.folder, where), base, weights), weights, known.aliases, where)
    if isinstance(body, Refusal):
        return body
    rows = vocabulary_rows(weights, body, known.vocabulary, where)
    if isinstance(rows, Refusal):
        return rows
    fitted = Fitted(body, weights, rows=rows)
    refusal = _check_names(weights, fitted, has_head, where, base)
    if refusal:
        return refusal
    seen = _Seen(fitted, {name: stored.file for name, stored in body.stored.items()}, where)
    digest, _ = content_sha256(body, visit=seen.look)
    if seen.refusal:
        return seen.refusal
    own = replace(fitted, tensors=body.only([name for name in body if name in weights]), moved=frozenset(seen.moved))
    return Fit(own, body.only([name for name in body if name not in weights]), digest)


def _aligned(expert: "Checkpoint", base: Version, weights: "Checkpoint") -> "Checkpoint":
    """The expert by the base's names: task models store the base's tensors below a prefix such as `vit.`."""
    from evaluation.models import base_prefix

    if any(name in weights for name in expert):
        return expert
    with said_of(base.where):
        prefix = base_prefix(base.folder, list(weights))
    return expert.prefixed(prefix) if prefix else expert


def _check_names(base: "Checkpoint", expert: Fitted, has_head: bool, where: str, version: Version) -> Refusal | None:
    from merging.check import check_schema

    modules = {name.partition(".")[0] for name in base}
    findings = check_schema(
        base.specs, expert.specs, heads=lambda name: has_head and name.partition(".")[0] not in modules
    )
    if not findings:
        return None
    first, more = findings[0], len(findings) - 1
    what = first.what + (f" (and {more} more tensor{'s' * (more > 1)} differ{'s' * (more == 1)})" if more else "")
    return Refusal(first.code, what, where, "", first.tensor, first.expected, first.found, retrain(version))


class _Seen:
    """What one pass over an expert's tensors finds: a value that is not finite, and which tensors moved."""

    def __init__(self, expert: Fitted, files: Mapping[str, str], where: str) -> None:
        self._expert = expert
        self._files = files
        self._where = where
        self.refusal: Refusal | None = None
        self.moved: list[str] = []

    def look(self, name: str, tensor: "Tensor") -> None:
        """Look at one tensor of the expert, by the base's name."""
        import torch

        self.refusal = self.refusal or _not_finite(name, tensor, self._where, self._files[name])
        base = self._expert.base
        if name in base and (name in self._expert.rows or not torch.equal(tensor, base[name].to(tensor.dtype))):
            self.moved.append(name)


def _not_finite(name: str, tensor: "Tensor", where: str, file: str) -> Refusal | None:
    import torch

    from merging.check import check_finite

    # Folds are made in float32: a float64 value beyond its range is as bad as an infinity.
    found = check_finite(name, tensor.float() if tensor.dtype == torch.float64 else tensor)
    if not found:
        return None
    remedy = "train it again; a value that is not finite would spread to every tensor of the merged model"
    return Refusal(found.code, found.what, where, file, name, found.expected, found.found, remedy)


def retrain(base: Version) -> str:
    """What to do with an expert that is not of this base."""
    return f"fine-tune it from this line's base (weights {base.memory.base_sha256[:12]}), with its shapes and names"
