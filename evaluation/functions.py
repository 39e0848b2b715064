"""Suites of kind python: a function that the line's own configuration names scores the model as it sees fit."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation.clock import Clock, within
from evaluation.escape import clean
from evaluation.measures import Measure, mean_score


class Model(NamedTuple):
    """What a function is given of the model; it may not change the tensors."""

    folder: Path  # the base's config.json and tokenizer
    weights: Mapping[str, Tensor]  # under the base's names
    device: str  # "cpu", "cuda:0", ...


Rows = Sequence[Mapping[str, Any]]  # the Parquet file's rows; none without data
Function = Callable[[Model, Rows], Sequence[float]]  # one number in [0, 1] for each example, more is better


def measure(name: str, model: Model, examples: Rows, clock: Clock) -> Measure | str:
    """The mean of what the function `name` ("module:name") gives, or why there is none.

    The module is imported now. Whatever it or the function raises is a reason, and so are weights that are not finite.
    Raises TimeoutError when the time is over; the function goes on in its thread (`clock.within`).
    """
    if not all(bool(tensor.isfinite().all()) for tensor in model.weights.values()):
        return "the model's weights are not finite"
    points = within(clock, lambda: _points(name, model, examples))
    if isinstance(points, str):
        return points
    if examples and len(points) != len(examples):
        return f"{name} gave {len(points)} numbers for {len(examples)} examples"
    return mean_score(points, name)


def _points(name: str, model: Model, examples: Rows) -> list[float] | str:
    try:
        return [float(point) for point in _function(name)(model, examples)]
    except (MemoryError, torch.OutOfMemoryError):
        raise  # the machine's fault, and nothing against the model
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code
        return f"{name} failed with {type(error).__name__}: {clean(str(error), 300)}"


def _function(name: str) -> Function:
    module, _, attribute = name.partition(":")
    start: Any = import_module(module)
    found: Function = reduce(getattr, attribute.split("."), start)
    return found
