"""The public implementation itself, as a program for an environment that has fusion-bench; not for foldin's own.

    PYTHON fusion_bench_run.py FOLDER OUT

folds FOLDER/expert-2 and expert-3 into expert-1, models that vit_b32 of benchmarks/shapes.py describes, writes the
merged weights to the file OUT, and prints the seconds of the second fold as JSON on the last line.
"""

import json
import sys
import time
from pathlib import Path

from fusion_bench import BaseModelPool
from fusion_bench.method.opcm.opcm_general import OPCM
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

PREFIX = "vision_model."  # before every name, in the transformers that fusion-bench works with


class Timed(OPCM):  # type: ignore[misc]  # its class is untyped
    """OPCM that notes how long its merge of each model took, evaluation, loading and saving not counted."""

    def profile(self, action: str) -> object:
        """Note when each stage begins; the next one, or the end, closes it."""
        self.begun = [*getattr(self, "begun", []), (action, time.perf_counter())]
        return super().profile(action)


def model(folder: Path) -> CLIPVisionModel:
    """One synthetic tower as a module."""
    facts = json.loads((folder / "config.json").read_text())
    known = {key: value for key, value in facts.items() if key not in ("model_type", "architectures", "dtype")}
    tower = CLIPVisionModel(CLIPVisionConfig(**known))
    tower.load_state_dict(
        {PREFIX + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}, strict=False
    )
    return tower


def main() -> None:
    """Run it."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    models = {"_pretrained_": model(folder / "base")}
    models |= {name: model(folder / name) for name in ("expert-1", "expert-2", "expert-3")}
    method = Timed(alpha=0.5, shuffle_order=False, seed=None, save_on_every_step=False, num_ray_actors=0)
    merged = method.run(BaseModelPool(models))
    seconds = time.perf_counter() - method.begun[-1][1]
    weights = {name.removeprefix(PREFIX): tensor.contiguous() for name, tensor in merged.state_dict().items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}, out)
    print(json.dumps({"step_seconds": seconds}))


if __name__ == "__main__":
    main()
