"""Every module of merging carries an example, and the examples are true."""

import doctest
import importlib
import pkgutil

import pytest

import merging

MODULES = [module.name for module in pkgutil.iter_modules(merging.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"merging.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_public_names_are_few_and_exist():
    assert len(merging.__all__) <= 8
    assert all(hasattr(merging, name) for name in merging.__all__)
