"""How an expert is folded: what the line is configured to do, and what a search found to do instead."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from flows.memory import Memory
from flows.options import LineConfig


class Recipe(NamedTuple):
    """What decides a fold besides the tensors."""

    method: str
    parameters: Mapping[str, Any]  # of the method
    weight: float = 1.0  # over the expert's own
    factor: float = 1.0  # of the configured strength that the parameters hold

    def stronger(self, factor: float) -> "Recipe":
        """The same, its total read `factor` times as strongly; a method without a strength only remembers it."""
        key, factors = strength_of(self.method), round(self.factor * factor, 6)
        if not key:
            return self._replace(factor=factors)
        return self._replace(parameters={**self.parameters, key: round(strength(self) * factor, 6)}, factor=factors)


def recipe_of(settings: LineConfig, memory: Memory) -> Recipe:
    """What the line is configured to do, at the strength that a search chose for the version that is folded into.

    A factor is of the configured strength: when a person configures another, what was found for the old one is void.
    """
    plain = Recipe(settings.method, dict(settings.parameters))
    return plain.stronger(memory.factor) if memory.factor != 1 and _still_holds(memory, plain) else plain


def _still_holds(memory: Memory, plain: Recipe) -> bool:
    """Whether a version's factor is of the strength that is configured now; a method without one only remembers it."""
    key = strength_of(memory.method)
    if key not in memory.parameters:
        return True
    # What a version remembers is rounded.
    return math.isclose(memory.parameters[key] / memory.factor, strength(plain), rel_tol=1e-4)


def strength_of(method: str) -> str:
    """The name of a method's strength; "" where it has none."""
    from merging.catalogue import STRENGTH

    return STRENGTH.get(method, "")


def strength(recipe: Recipe) -> float:
    """How strongly the total is read: what the parameters say, or the method's default; 1 where it has no strength."""
    from merging.catalogue import parameters_of

    key = strength_of(recipe.method)
    if not key:
        return 1.0
    return cast("float", parameters_of(recipe.method, recipe.parameters)[key])
