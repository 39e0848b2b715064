"""The digits study by stages, as dvc.yaml runs it: `python -m experiments.digits zoo | fold | score | compare`."""

import argparse
import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from evaluation.metrics import summary
from evaluation.pictures import bar_chart, heat_map
from experiments.digit_zoo import Settings, make_zoo
from experiments.study import accuracies, fold_in_order, open_base, own_accuracies
from registry.files import write_json
from registry.weights import Checkpoint
from registry.writer import write_checkpoint

Row = Mapping[str, float]  # task -> accuracy in [0, 1]


def experts_of(zoo: Path, order: Sequence[str]) -> dict[str, Path]:
    """Task -> folder of its expert, in the order in which they are folded."""
    return {task: zoo / "experts" / task for task in order}


def fold(zoo: Path, out: Path, order: Sequence[str], method: str, parameters: Mapping[str, object]) -> None:
    """Writes the model after each expert into `out`/1, `out`/2, ...: the tensors of the base, merged."""
    base = open_base(zoo / "base")
    merged = fold_in_order(zoo / "base", list(experts_of(zoo, order).values()), method, parameters)
    for count, tensors in enumerate(merged, start=1):
        write_checkpoint(out / str(count), base.specs, tensors.__getitem__, layout=base.layout)
        shutil.copyfile(zoo / "base" / "config.json", out / str(count) / "config.json")


def score(zoo: Path, folded: Path, order: Sequence[str]) -> dict[str, Any]:
    """The accuracies after each fold and what they say: {"last": row, "matrix": rows, "average_accuracy": ..., ...}."""
    experts = experts_of(zoo, order)
    rows = [
        accuracies(zoo / "base", experts, Checkpoint.open(folded / str(count))) for count in range(1, len(order) + 1)
    ]
    arrivals = {task: row for row, task in enumerate(order)}
    return {**summary(rows, arrivals), "last": rows[-1], "matrix": rows}


def compare(zoo: Path, scores: Path, out: Path, order: Sequence[str]) -> None:
    """Writes metrics.json, accuracy.csv, accuracy.png and folds.png into `out`."""
    base, experts = zoo / "base", experts_of(zoo, order)
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(scores.glob("*.json"))}
    series: dict[str, Row] = {
        "base": accuracies(base, experts, open_base(base)),
        **{method: one["last"] for method, one in found.items()},
        "experts": own_accuracies(base, experts),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", {name: {**row, "mean": _mean(row, order)} for name, row in series.items()})
    _write_table(out / "accuracy.csv", series, order)
    bar_chart(order, {name: [row[task] for task in order] for name, row in series.items()}, out / "accuracy.png")
    _draw_folds(found, order, out / "folds.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one stage with the parameters of params.yaml in the current folder."""
    given = parser().parse_args(arguments)
    parameters = yaml.safe_load(given.params.read_text("utf-8"))
    # With tensors this small a second thread saves no time, and with one the bytes do not depend on the cores.
    torch.set_num_threads(1)
    if given.stage == "zoo":
        make_zoo(given.out, Settings(**parameters["zoo"]))
    elif given.stage == "fold":
        fold(given.zoo, given.out, parameters["order"], given.method, parameters["methods"][given.method])
    elif given.stage == "score":
        write_json(given.out, score(given.zoo, given.folded, parameters["order"]))
    else:
        compare(given.zoo, given.scores, given.out, parameters["order"])


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand per stage of dvc.yaml."""
    root = argparse.ArgumentParser(prog="python -m experiments.digits", description=__doc__)
    root.add_argument("--params", type=Path, default=Path("params.yaml"), help="YAML file of the parameters")
    stages = root.add_subparsers(dest="stage", required=True)
    zoo = stages.add_parser("zoo", help="train the base and one expert per view of the digits")
    folding = stages.add_parser("fold", help="fold the experts in order with one method")
    folding.add_argument("--method", required=True, help="a key of methods in the parameters")
    scoring = stages.add_parser("score", help="score the model after each fold on every task")
    scoring.add_argument("--folded", type=Path, required=True, help="folder that fold wrote")
    comparing = stages.add_parser("compare", help="tables and pictures of all methods")
    comparing.add_argument("--scores", type=Path, required=True, help="folder of the files that score wrote")
    for stage in (folding, scoring, comparing):
        stage.add_argument("--zoo", type=Path, required=True, help="folder that zoo wrote")
    for stage in (zoo, folding, scoring, comparing):
        stage.add_argument("--out", type=Path, required=True, help="file or folder to write")
    return root


def _mean(row: Row, order: Sequence[str]) -> float:
    return sum(row[task] for task in order) / len(order)


def _write_table(path: Path, series: Mapping[str, Row], order: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("model", "task", "accuracy"))
        table.writerows((name, task, row[task]) for name, row in series.items() for task in order)


def _draw_folds(found: Mapping[str, Mapping[str, Any]], order: Sequence[str], path: Path) -> None:
    """The heat map of every method's matrix, one below the other; a task is left out before it has arrived."""
    rows = [f"{method} {count}" for method in found for count in range(1, len(order) + 1)]
    values = [
        [row[task] if place <= count else None for place, task in enumerate(order)]
        for one in found.values()
        for count, row in enumerate(one["matrix"])
    ]
    heat_map(rows, order, values, path)


if __name__ == "__main__":
    main()
