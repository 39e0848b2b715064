"""Steps of a flow take what they are given as it is."""

import pytest
from prefect import flow

from flows.steps import step

pytestmark = pytest.mark.integration


class Sealed(tuple):
    """Nobody may look into it."""

    def __iter__(self):
        raise AssertionError("somebody looked")


def test_prefect_looks_into_no_argument_of_a_step_nor_into_its_result(prefect):
    given, seen = Sealed((1, 2)), []

    @step("take")
    def take(first, *, second):
        """Hand on."""
        seen.extend((first, second))
        return {"first": first}

    @flow(persist_result=False)
    def some():
        return [take(given, second=given)["first"] is given]

    assert some() == [True]
    assert all(each is given for each in seen)
    assert (take.__name__, take.__doc__) == ("take", "Hand on.")
