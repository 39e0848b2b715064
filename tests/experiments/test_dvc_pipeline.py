"""dvc.yaml and params.yaml against the command line they call, and once for real with DVC."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments import digits
from experiments.digit_zoo import VIEWS, Settings
from merging import build

ROOT = Path(digits.__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
METHODS = ("average", "task_arithmetic", "opcm")


def filled(text: str, method: str) -> str:
    return text.replace("${out}", PIPELINE["vars"][0]["out"]).replace("${item.method}", method)


@pytest.mark.parametrize("stage", sorted(PIPELINE["stages"]))
def test_every_stage_calls_a_subcommand_of_its_name_with_known_flags(stage):
    for method in METHODS:
        command = filled(PIPELINE["stages"][stage]["cmd"], method)
        assert command.startswith("python -m experiments.digits ")
        assert digits.parser().parse_args(command.split()[3:]).stage == stage


def test_every_subcommand_is_a_stage():
    help_text = digits.parser().format_help()
    subcommands = re.search(r"\{([a-z,]+)\}", help_text)
    assert subcommands is not None
    assert set(subcommands[1].split(",")) == set(PIPELINE["stages"])


@pytest.mark.parametrize("stage", ["fold", "score"])
def test_the_matrix_holds_every_method_of_the_parameters(stage):
    assert PIPELINE["stages"][stage]["matrix"] == {"method": list(METHODS)}
    assert set(PARAMS["methods"]) == set(METHODS)


@pytest.mark.parametrize("stage", sorted(PIPELINE["stages"]))
def test_dependencies_are_files_of_the_project_or_outputs_of_other_stages(stage):
    made = [filled(one, method) for method in METHODS for s in PIPELINE["stages"].values() for one in outputs(s)]
    for method in METHODS:
        for dependency in PIPELINE["stages"][stage]["deps"]:
            path = filled(dependency, method)
            assert path in made or (ROOT / path).exists(), path


def outputs(stage: dict[str, list[str | dict[str, object]]]) -> list[str]:
    listed = [one for key in ("outs", "metrics", "plots") for one in stage.get(key, [])]
    return [one if isinstance(one, str) else next(iter(one)) for one in listed]


def test_the_parameters_are_ones_that_the_code_knows():
    assert Settings(**PARAMS["zoo"]) == Settings()  # the defaults are the measured ones, and both are stated
    assert sorted(PARAMS["order"]) == sorted(VIEWS)
    for method, parameters in PARAMS["methods"].items():
        assert build(method, parameters)


@pytest.mark.chaos
def test_dvc_runs_the_pipeline_once_and_then_has_nothing_to_do(tmp_path):
    for package in ("experiments", "evaluation", "merging", "registry"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "out"))
    for file in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(ROOT / file, tmp_path / file)
    quick = {"width": 16, "layers": 1, "pretraining_steps": 20, "expert_steps": 2}
    parameters = {**PARAMS, "zoo": {**PARAMS["zoo"], **quick}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(parameters))
    dvc(tmp_path, "init", "--no-scm")
    shutil.copyfile(ROOT / ".dvc" / "config", tmp_path / ".dvc" / "config")
    dvc(tmp_path, "config", "core.no_scm", "true")

    assert "Running stage 'compare'" in dvc(tmp_path, "repro")
    metrics = json.loads((tmp_path / "experiments/out/compare/metrics.json").read_text())
    assert set(metrics) == {"base", *METHODS, "experts"}
    assert "Running stage" not in dvc(tmp_path, "repro")
    (tmp_path / "params.yaml").write_text(
        (tmp_path / "params.yaml").read_text().replace("strength: 1.0", "strength: 2.0")
    )
    again = dvc(tmp_path, "repro")
    assert "Running stage 'fold@opcm'" in again
    assert "Running stage 'fold@average'" not in again


def dvc(folder: Path, *arguments: str) -> str:
    scripts = str(Path(sys.executable).parent)  # `python` in dvc.yaml is found on the path
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
