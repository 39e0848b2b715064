"""The digits zoo and the stages of its study, with a model that trains in a second."""

import csv
import json
from pathlib import Path

import pytest
import torch

from evaluation.suites import load_suite, read_examples
from experiments import digits, study
from experiments.digit_zoo import GATE, TUNE, VIEWS, Settings, make_zoo, split_digits
from registry.weights import Checkpoint

pytestmark = pytest.mark.integration  # it trains; fifteen seconds in all

TINY = Settings(width=16, layers=1, pretraining_steps=150, pretraining_rate=3e-3, expert_steps=5)
ORDER = ("plain", "flipped", "inverted")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"), TINY)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(folder))


def test_no_image_is_in_two_splits():
    splits = split_digits()
    assert [len(part.labels) for part in splits] == [1797 - GATE - TUNE, TUNE, GATE]
    rows = [tuple(image.flatten().tolist()) for part in splits for image in part.images]
    assert len(set(rows)) == len(rows) == 1797  # scikit-learn's count; no image stands twice


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_view_moves_or_inverts_pixels_and_loses_none(view):
    images = split_digits().gate.images
    seen = VIEWS[view](images)
    sign = -1 if view == "inverted" else 1
    assert seen.shape == images.shape
    assert torch.equal(seen.flatten(1).sort().values, (sign * images).flatten(1).sort().values)
    assert torch.equal(seen, images) == (view == "plain")


def test_the_base_has_no_classifier_and_experts_add_only_theirs(zoo):
    base = study.open_base(zoo / "base")
    for view in VIEWS:
        expert = study.open_expert(zoo / "base", zoo / "experts" / view)
        assert expert.body.specs == base.specs
        assert set(expert.head) == {"classifier.weight", "classifier.bias"}


def test_experts_differ_from_the_base_and_from_each_other(zoo):
    base = tensors(zoo / "base")
    bodies = [dict(study.open_expert(zoo / "base", zoo / "experts" / view).body) for view in VIEWS]
    name = next(name for name in base if name.endswith("fc1.weight") or "intermediate" in name)
    matrices = [base[name], *(body[name] for body in bodies)]
    assert all(not torch.equal(one, other) for i, one in enumerate(matrices) for other in matrices[:i])


def test_each_expert_carries_the_suite_of_its_view(zoo):
    gate = split_digits().gate
    examples = read_examples(load_suite(zoo / "experts" / "rotated", task="rotated", where="test"))
    assert examples.labels == gate.labels.tolist()
    assert torch.equal(torch.tensor(examples.inputs[0]), VIEWS["rotated"](gate.images[:1]).flatten())


def test_even_the_tiny_zoo_beats_chance(zoo):
    own = study.own_accuracies(zoo / "base", digits.experts_of(zoo, ORDER))
    assert min(own.values()) > 0.15  # ten balanced classes: chance is 0.1


def test_equal_settings_give_equal_bytes_whatever_the_random_state(tmp_path):
    brief = TINY._replace(pretraining_steps=5)
    one, other = make_zoo(tmp_path / "one", brief), tmp_path / "other"
    torch.rand(1)
    make_zoo(other, brief)
    for file in ("base/model.safetensors", "experts/permuted/model.safetensors", "experts/permuted/suite.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_folding_one_expert_by_averaging_gives_that_expert(zoo):
    experts = digits.experts_of(zoo, ORDER)
    first = next(study.fold_in_order(zoo / "base", list(experts.values()), "average", {}))
    own = study.open_expert(zoo / "base", experts["plain"]).body
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, own[name])


def test_opcm_projects_something_and_average_does_not(zoo):
    experts = list(digits.experts_of(zoo, ORDER).values())
    *_, mean = study.fold_in_order(zoo / "base", experts, "average", {})
    bodies = [dict(study.open_expert(zoo / "base", folder).body) for folder in experts]
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, sum(body[name] for body in bodies) / 3)
    *_, opcm = study.fold_in_order(zoo / "base", experts, "opcm", {"strength": 1.0})
    assert any(not torch.allclose(opcm[name], mean[name]) for name in mean)


def test_the_stages_hand_their_files_on(zoo, tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"order": ORDER, "methods": {"average": {}, "opcm": {"strength": 1.0}}}))
    for method in ("average", "opcm"):
        run(params, "fold", method=method, zoo=zoo, out=tmp_path / method)
        run(params, "score", zoo=zoo, folded=tmp_path / method, out=tmp_path / "scores" / f"{method}.json")
    run(params, "compare", zoo=zoo, scores=tmp_path / "scores", out=tmp_path / "compare")

    score = json.loads((tmp_path / "scores" / "opcm.json").read_text())
    assert score["last"] == score["matrix"][-1]
    assert score["average_accuracy"] == pytest.approx(sum(score["last"].values()) / 3)
    assert len(score["matrix"]) == 3
    metrics = json.loads((tmp_path / "compare" / "metrics.json").read_text())
    assert set(metrics) == {"base", "average", "opcm", "experts"}
    assert metrics["opcm"]["mean"] == pytest.approx(score["average_accuracy"])
    with (tmp_path / "compare" / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3  # four models, three tasks
    for picture in ("accuracy.png", "folds.png"):
        assert (tmp_path / "compare" / picture).read_bytes().startswith(b"\x89PNG")


def run(params: Path, stage: str, **options: object) -> None:
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    threads = torch.get_num_threads()
    try:
        digits.main(["--params", str(params), stage, *flags])
    finally:
        torch.set_num_threads(threads)
