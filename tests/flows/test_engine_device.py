"""The engine sends every tensor to the device of its plan, and fetches it from there: seen on a device in disguise."""

import importlib.util
from pathlib import Path

from benchmarks import ours
from benchmarks.shapes import decoder
from benchmarks.synthetic import make

SHAPE = decoder(hidden=256, layers=1, vocabulary=96)
FOLDS = (  # experts, in one pass each, and the fold before; three adapters are more than factors are kept for
    ("first", None, ["expert-1"]),
    ("second", "first", ["expert-2", "lora-1"]),
    ("factors", None, ["lora-1"]),
    ("more-factors", "factors", ["lora-1", "lora-1"]),
)


def disguise():
    path = Path(__file__).parents[1] / "merging/test_device_placement.py"
    spec = importlib.util.spec_from_file_location("device_placement", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folded(models, out, device):
    """Every fold on a device: file -> bytes."""
    for name, parent, experts in FOLDS:
        before, chosen = str(out / parent) if parent else None, [str(models / one) for one in experts]
        ours.fold(str(models / "base"), before, chosen, str(out / name), list(SHAPE.linear), device=device)
    return {file.relative_to(out): file.read_bytes() for file in out.rglob("*.safetensors")}


def test_a_fold_on_a_device_writes_what_one_on_the_processor_writes(tmp_path, monkeypatch):
    models = make(tmp_path / "models", SHAPE, experts=2, adapter=True)
    here = folded(models, tmp_path / "here", "cpu")
    away = disguise()
    monkeypatch.setattr(ours, "devices_of", lambda device, workers=0: (str(away.AWAY),))
    with away.Disguise():
        there = folded(models, tmp_path / "there", str(away.AWAY))
    assert len(here) == 8
    assert there == here
