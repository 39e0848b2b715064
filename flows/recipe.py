"""How an expert is folded: what the line is configured to do, and what a search found to do instead."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flows.config import LineConfig


class Recipe(NamedTuple):
    """What decides a fold besides the tensors."""

    method: str
    parameters: Mapping[str, Any]  # of the method
    weight: float = 1.0  # over the expert's own
    factor: float = 1.0  # of the configured strength that the parameters hold

    def stronger(self, factor: float) -> "Recipe":
        """The same, its total read `factor` times as strongly; the same where the method knows no strength."""
        key = strength_of(self.method)
        if not key:
            return self
        parameters = {**self.parameters, key: round(strength(self) * factor, 6)}
        return self._replace(parameters=parameters, factor=round(self.factor * factor, 6))


def recipe_of(settings: LineConfig, factor: float) -> Recipe:
    """What the line is configured to do, at the strength that a search chose for the version that is folded into."""
    plain = Recipe(settings.method, dict(settings.parameters))
    return plain if factor == 1 else plain.stronger(factor)


def strength_of(method: str) -> str:
    """The name of a method's strength; "" where it has none."""
    from merging.catalogue import STRENGTH

    return STRENGTH.get(method, "")


def strength(recipe: Recipe) -> float:
    """How strongly the total is read: what the parameters say, or the method's default."""
    from inspect import signature

    from merging import METHODS

    key = strength_of(recipe.method)
    return float(recipe.parameters.get(key, signature(METHODS[recipe.method]).parameters[key].default))
