"""How an expert is folded: the configured way, and the same more or less strongly."""

import pytest

from flows.config import LineConfig
from flows.recipe import Recipe, recipe_of, strength
from merging import METHODS


def settings(method="opcm", **parameters):
    return LineConfig(base="base", experts=("experts",), method=method, parameters=parameters)


def test_the_configured_recipe_is_what_the_line_says():
    assert recipe_of(settings(energy=0.3), 1.0) == Recipe("opcm", {"energy": 0.3})


def test_a_factor_multiplies_the_configured_strength_or_the_methods_default():
    assert recipe_of(settings(strength=1.2), 1.5).parameters == {"strength": 1.8}
    assert recipe_of(settings("task_arithmetic"), 0.5) == Recipe("task_arithmetic", {"scale": 0.15}, 1.0, 0.5)
    twice = recipe_of(settings(), 1.3).stronger(0.5)
    assert (twice.factor, twice.parameters) == (0.65, {"strength": 0.65})


def test_a_method_without_a_strength_stays_as_it_is():
    assert recipe_of(settings("average"), 1.5) == Recipe("average", {})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_read_at_twice_its_strength_or_has_none(method):
    recipe = Recipe(method, {})
    stronger = recipe.stronger(2.0)
    assert stronger == recipe or strength(stronger) == 2 * strength(recipe)
    METHODS[method](**stronger.parameters)
