"""Which methods there are, and how to build one from its name and parameters.

>>> sorted(METHODS)
['average', 'magmax', 'opcm', 'task_arithmetic']
>>> build("average", {"scale": 0.4})
Traceback (most recent call last):
merging.method.MergeError: method 'average' has no parameter 'scale', expected none; correct it or leave it out
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches

from merging.arithmetic import average, task_arithmetic
from merging.magmax import magmax
from merging.method import MergeError, Method
from merging.opcm import opcm

METHODS: dict[str, Callable[..., Method]] = {
    "opcm": opcm,
    "average": average,
    "task_arithmetic": task_arithmetic,
    "magmax": magmax,
}

# The parameter by which a method's total is read more or less strongly; it changes no state. Methods that are not here
# have none.
STRENGTH = {"opcm": "strength", "task_arithmetic": "scale", "magmax": "scale"}


def build(name: str, parameters: Mapping[str, object]) -> Method:
    """The method called `name`, with `parameters` over its defaults.

    Raises:
        MergeError: no such method or parameter, or a value of the wrong kind or out of range.
    """
    if name not in METHODS:
        raise MergeError(f"there is no method {name!r}, expected one of {_choices(METHODS)}; {_advice(name, METHODS)}")
    known = inspect.signature(METHODS[name]).parameters
    for key, value in parameters.items():
        if key not in known:
            expected = f"expected one of {_choices(known)}" if known else "expected none"
            raise MergeError(f"method {name!r} has no parameter {key!r}, {expected}; {_advice(key, known)}")
        _check_kind(f"{name}: {key}", value, known[key].default)
    return METHODS[name](**parameters)


def parameters_of(name: str, parameters: Mapping[str, object]) -> dict[str, object]:
    """Every parameter of the method called `name`: those given, and the defaults of the others."""
    known = inspect.signature(METHODS[name]).parameters
    return {key: parameters.get(key, each.default) for key, each in known.items()}


def _check_kind(name: str, value: object, default: object) -> None:
    wanted, word = ((str,), "a text") if isinstance(default, str) else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise MergeError(f"{name} is {value!r}, expected {word}; the default is {default!r}")


def _choices(known: Iterable[str]) -> str:
    return ", ".join(known)


def _advice(word: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(word, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else "correct it or leave it out"
