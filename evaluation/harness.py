"""Suites of kind lm-eval: a task of EleutherAI's lm-evaluation-harness, run on the model at hand.

The harness is the optional extra foldin[lm-eval], and only this file imports it. Whether it may reach the network is
for HF_HUB_OFFLINE and HF_DATASETS_OFFLINE to say; a task's own YAML and data beside suite.json need none.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from threading import get_ident
from typing import Any

from evaluation.clock import Clock, within
from evaluation.escape import clean
from evaluation.language import Language
from evaluation.measures import NOT_FINITE, Measure, mean_score
from evaluation.suites import Suite

SHOTS_SEED = 1234  # the harness's own default for choosing examples to show
CALLS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
Sample = Mapping[str, Any]  # what the harness logs of one document


def measure(suite: Suite, known: Language, split: str, sample: int, batch_size: int, clock: Clock) -> Measure | str:
    """What the harness's task gives for each of its documents, or why it gives nothing.

    A harness's task has no rows for tuning; its canary is its first `sample` documents. Whatever the harness raises is
    a reason. Raises TimeoutError when the time is over; the harness goes on in its thread (`clock.within`).
    """
    if split == "tune":
        return "a task of lm-evaluation-harness has no rows kept for tuning"
    limit = sample if split == "canary" else None
    # The harness draws bars. They are silenced from here, so that it ends when nobody waits any more.
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        return within(clock, lambda: _tried(suite, known, limit, batch_size))


def _tried(suite: Suite, known: Language, limit: int | None, batch_size: int) -> Measure | str:
    try:
        return _run(suite, known, limit, batch_size)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code, and its tasks'
        return f"lm-evaluation-harness failed with {type(error).__name__}: {clean(str(error), 300)}"


def _run(suite: Suite, known: Language, limit: int | None, batch_size: int) -> Measure | str:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = _loaded(suite)
    if isinstance(loaded, str):
        return loaded
    ((name, task),) = loaded["tasks"].items()
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SHOTS_SEED)
    model = HFLM(pretrained=known.model, tokenizer=known.tokenizer, max_length=known.context, batch_size=batch_size)
    for call in CALLS:
        setattr(model, call, partial(getattr(model, call), disable_tqdm=True))
    watch = known.model.register_forward_hook(partial(_check_finite, get_ident()))
    try:
        found = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0)
    except FloatingPointError:
        return NOT_FINITE
    finally:
        watch.remove()
    return _measure(suite, found["samples"][name], found["higher_is_better"].get(name, {}))


def _loaded(suite: Suite) -> Any:  # noqa: ANN401 - the harness's own
    """The task, from the suite's own folder where that has it, else from those of the harness; or why there is none."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    own = TaskManager(include_path=str(suite.include), include_defaults=False) if suite.include else None
    manager = own if own and suite.harness_task in own.task_index else _shipped()
    entry = manager.task_index.get(suite.harness_task)
    if entry is None:
        return f"lm-evaluation-harness has no task {suite.harness_task}"
    if entry.kind.name not in ("TASK", "PY_TASK"):
        return f"{suite.harness_task} is several tasks; name one of them"
    if own and manager is own and entry.kind.name == "TASK":
        return own.load(_with_data(load_yaml(entry.yaml_path), entry.yaml_path.parent))
    return manager.load(suite.harness_task)


@cache
def _shipped() -> Any:  # noqa: ANN401 - the harness's own
    """The tasks that come with the harness; reading their thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _with_data(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The task with the paths of its data files taken from its own folder; the harness's hang on where it is run."""
    options = task.get("dataset_kwargs") or {}
    if "data_files" not in options:
        return task
    return {**task, "dataset_kwargs": {**options, "data_files": _placed(options["data_files"], folder)}}


def _placed(files: Any, folder: Path) -> Any:  # noqa: ANN401 - a name, a list of names, or names by split
    if isinstance(files, Mapping):
        return {split: _placed(each, folder) for split, each in files.items()}
    if isinstance(files, list):
        return [_placed(each, folder) for each in files]
    return str(folder / files) if (folder / files).is_file() else files


def _check_finite(thread: int, module: Any, given: Any, output: Any) -> None:  # noqa: ANN401 - as torch calls a hook
    """The harness would take the first of answers that are all NaN for the model's choice.

    Only in its own thread: once that is abandoned, other suites go on with the same model.
    """
    if get_ident() == thread and not output.logits.isfinite().all():
        raise FloatingPointError(NOT_FINITE)


def _measure(suite: Suite, samples: Sequence[Sample], higher: Mapping[str, bool | None]) -> Measure | str:
    """One number a document: of the suite's measure, or the task's first; of the task's first filter."""
    chosen = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    if not chosen:
        return f"{suite.harness_task} has no documents"
    name = suite.measure or chosen[0]["metrics"][0]
    if name not in chosen[0]["metrics"]:
        return f"{suite.harness_task} has no measure {name}, only {', '.join(chosen[0]['metrics'])}"
    if higher.get(name) is False:
        return f"{name} of {suite.harness_task} is better when it is smaller"
    ordered = sorted(chosen, key=lambda sample: int(sample["doc_id"]))
    points = [_number(sample[name]) for sample in ordered]
    if suite.metric == "score":
        return mean_score(points, f"{name} of {suite.harness_task}")
    if not all(point in (0.0, 1.0) for point in points):
        return f'{name} of {suite.harness_task} is not 0 or 1 for each document; set "metric": "score" in suite.json'
    correct = tuple(point == 1.0 for point in points)
    return Measure(sum(correct) / len(correct), correct=correct)


def _number(value: Any) -> float:  # noqa: ANN401 - a number of Python or numpy
    """A document's number; NaN for what is none, such as the pairs of a measure that has no value a document."""
    return float(value) if isinstance(value, int | float) or hasattr(value, "item") else math.nan
