"""What is done with each of the base's tensors: projected, folded by entries, averaged, or left alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING

from flows.options import LineConfig
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from evaluation.architecture import Anatomy
    from registry.weights import Checkpoint


@dataclass(frozen=True)
class Kinds:
    """What is done with which of the base's tensors; all others of floats are folded entry by entry."""

    projected: frozenset[str]  # matrices, (out, in) or (out, ...)
    stacked: frozenset[str] = frozenset()  # those of `projected` that hold one matrix per index of the first axis
    means: Mapping[str, str] = field(default_factory=dict)  # running mean of a batch norm -> its running variance
    untouched: frozenset[str] = frozenset()  # stay the base's: what the model computes itself
    same: Mapping[str, str] = field(default_factory=dict)  # tied weights stored twice -> the folded one

    @cached_property
    def variances(self) -> Mapping[str, str]:
        """Running variance -> the running mean beside it."""
        return {variance: mean for mean, variance in self.means.items()}


def kinds_of(settings: LineConfig, base: "Checkpoint", anatomy: "Anatomy") -> Kinds:
    """What the architecture and the line's patterns say about the base's tensors.

    Raises FoldinError (E_CONFIG) for a pattern that matches none of them.
    """

    def named(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    for key, patterns in (("plain", settings.plain), ("project", settings.project)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in base):
                raise FoldinError(_matches_nothing(key, pattern, base))
    linear = {name for name in anatomy.linear | anatomy.stacked if not named(name, settings.plain)}
    asked = {name for name in base if len(base.stored[name].spec.shape) > 1 and named(name, settings.project)}
    return Kinds(
        projected=frozenset(linear | asked),
        stacked=anatomy.stacked,
        means=anatomy.means,
        untouched=anatomy.derived,
        same={name: kept for name, kept in anatomy.aliases.items() if stored_twice(base, name, kept)},
    )


def _matches_nothing(key: str, pattern: str, base: "Checkpoint") -> Refusal:
    what, remedy = f"a pattern of {key} matches no tensor of the base", f"correct it, or take it out of {key}"
    return Refusal(
        "E_CONFIG", what, "foldin.toml", expected=f"names such as {next(iter(base))}", found=pattern, remedy=remedy
    )


def stored_twice(base: "Checkpoint", name: str, kept: str) -> bool:
    """Whether a tied weight lies in the base under both names, with the same values; else it is no tie."""
    import torch

    both = name in base and kept in base and base.stored[name].spec == base.stored[kept].spec
    return both and torch.equal(base[name], base[kept])
