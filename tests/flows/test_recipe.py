"""How an expert is folded: the configured way, and the same more or less strongly."""

import pytest

from flows.memory import Memory
from flows.options import LineConfig
from flows.recipe import Recipe, recipe_of, strength
from merging import METHODS


def settings(method="opcm", **parameters):
    return LineConfig(base="base", experts=("experts",), method=method, parameters=parameters)


def made(recipe):
    """The memory of a version that was folded like that."""
    return Memory(recipe.method, recipe.parameters, "0" * 64, "0" * 64, factor=recipe.factor)


FIRST = made(Recipe("opcm", {}))


def test_the_configured_recipe_is_what_the_line_says():
    assert recipe_of(settings(energy=0.3), FIRST) == Recipe("opcm", {"energy": 0.3})


def test_what_a_search_chose_is_carried_to_the_next_fold():
    found = recipe_of(settings(strength=1.2), FIRST).stronger(1.5)
    assert found == Recipe("opcm", {"strength": 1.8}, 1.0, 1.5)
    assert recipe_of(settings(strength=1.2), made(found)) == found
    scale = recipe_of(settings("task_arithmetic"), FIRST).stronger(0.5)
    assert scale == Recipe("task_arithmetic", {"scale": 0.15}, 1.0, 0.5)
    assert recipe_of(settings("task_arithmetic"), made(scale)) == scale
    twice = recipe_of(settings(), made(recipe_of(settings(), FIRST).stronger(1.3))).stronger(0.5)
    assert (twice.factor, twice.parameters) == (0.65, {"strength": 0.65})


def test_a_strength_that_a_person_configures_anew_is_taken_as_it_is():
    found = made(recipe_of(settings(strength=1.0), FIRST).stronger(1.6))
    assert recipe_of(settings(strength=1.6), found) == Recipe("opcm", {"strength": 1.6})
    assert recipe_of(settings(strength=1.0, energy=0.2), found).parameters == {"strength": 1.6, "energy": 0.2}


@pytest.mark.parametrize("configured", [1 / 3, 0.0123456789, 7.7777777])
def test_the_rounding_of_what_is_remembered_does_not_look_like_another_strength(configured):
    found = recipe_of(settings(strength=configured), FIRST).stronger(1.3)
    assert recipe_of(settings(strength=configured), made(found)).factor == 1.3


def test_a_fallback_to_a_method_without_a_strength_remembers_it():
    fallback = made(Recipe("average", {}, factor=1.3))
    assert recipe_of(settings(), fallback) == Recipe("opcm", {"strength": 1.3}, 1.0, 1.3)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_read_at_twice_its_strength_or_has_none(method):
    recipe = Recipe(method, {})
    stronger = recipe.stronger(2.0)
    assert stronger.factor == 2.0
    assert stronger.parameters == {} or strength(stronger) == 2 * strength(recipe)
    METHODS[method](**stronger.parameters)
