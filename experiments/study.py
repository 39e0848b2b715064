"""What any comparison of methods needs: experts folded one after the other, and every model scored on every task."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from evaluation.architecture import linear_weights
from evaluation.models import base_prefix
from evaluation.score import anchors, score_all
from evaluation.suites import load_suite
from merging import merge
from registry.weights import Checkpoint

Weights = Mapping[str, Tensor]


class Expert(NamedTuple):
    """An expert's tensors, told apart."""

    body: Checkpoint  # under the base's names
    head: Weights  # what the base lacks


def open_base(base: Path) -> Checkpoint:
    """The base's tensors that are folded, lazily."""
    return Checkpoint.open(base, f"base {base.name}")


def open_expert(base: Path, folder: Path) -> Expert:
    """The expert in `folder` as body and head."""
    known = open_base(base)
    found = Checkpoint.open(folder, f"expert {folder.name}").prefixed(base_prefix(base, known))
    rest = found.only(name for name in found if name not in known)
    return Expert(found.only(known), dict(rest))


def fold_in_order(
    base: Path,
    experts: Sequence[Path],
    method: str,
    parameters: Mapping[str, object],
) -> Iterator[dict[str, Tensor]]:
    """The merged tensors after the first expert, after the second, and so on; names, shapes and dtypes of the base."""
    start = dict(open_base(base))
    projected = linear_weights(base, start)
    bodies = [dict(open_expert(base, folder).body) for folder in experts]
    for count in range(1, len(bodies) + 1):
        yield merge(start, bodies[:count], method, projected=projected, **parameters)


def accuracies(
    base: Path,
    experts: Mapping[str, Path],  # task -> folder with suite and head
    weights: Weights,  # under the base's names
) -> dict[str, float]:
    """Task -> accuracy in [0, 1] of these weights on the gate examples, with the head or the prompts of the task."""
    suites = {task: load_suite(folder, task=task, where=f"expert {task}") for task, folder in experts.items()}
    zero_shot = {task: suite for task, suite in suites.items() if suite.kind == "zero-shot-text"}
    start = open_base(base)
    scores = score_all(
        base,
        weights,
        suites,
        anchors={task: anchors(base, start, suite) for task, suite in zero_shot.items()},
        heads={task: open_expert(base, folder).head for task, folder in experts.items()},
    )
    return {task: score.value for task, score in scores.items()}


def own_accuracies(base: Path, experts: Mapping[str, Path]) -> dict[str, float]:
    """Task -> accuracy in [0, 1] of the task's own expert: what merging cannot be expected to exceed."""
    return {
        task: accuracies(base, {task: folder}, open_expert(base, folder).body)[task] for task, folder in experts.items()
    }
