"""`foldin init` and `foldin add`: a line written into foldin.toml, an expert registered."""

from pathlib import Path
from typing import TYPE_CHECKING

from flows.admission import TASK
from flows.config import Config, load, parse
from flows.options import LineConfig
from registry.files import write_atomic
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from flows.wiring import House


def write_line(config_file: Path, line: str, base: Path | None, experts: list[str], method: str | None) -> Config:
    """The configuration with a table for the line; what is in the file already, comments included, stays as it is.

    Raises:
        FoldinError: E_CONFIG when the line is not in the file and no base was given, is there with other settings, or
            could not be used; E_BASE when there is no such folder. The file is then as it was.
    """
    import tomlkit

    from flows.settings import check_settings

    config = load(config_file, new=True)
    if line in config.lines:
        _check_same(config, line, base, experts, method)
        return config
    if base is None:
        raise FoldinError(
            Refusal(
                "E_CONFIG",
                "the line is not in the file and no base was given",
                str(config_file),
                remedy=f"run `foldin init {line} --base DIR` with the folder of the base checkpoint",
            )
        )
    if not (base / "config.json").is_file():
        raise FoldinError(
            Refusal(
                code="E_BASE",
                what="there is no checkpoint in this folder",
                where=f"base of line {line}",
                file="config.json",
                expected="a folder with config.json and *.safetensors",
                found=str(base),
                remedy="give the folder that save_pretrained wrote with --base",
            )
        )
    document = tomlkit.parse(config_file.read_text(encoding="utf-8")) if config_file.exists() else tomlkit.document()
    lines = document.setdefault("lines", tomlkit.table(is_super_table=True))
    lines[line] = {
        "base": str(base),
        "experts": experts or [f"{line}-experts"],
        **({"method": method} if method else {}),
    }
    text = tomlkit.dumps(document)
    check_settings(parse(text, config_file.absolute()).line(line), line)
    write_atomic(config_file, text.encode())
    return load(config_file)


def add_expert(
    house: "House", line: str, folder: Path, task: str, suite: Path | None, model: str | None
) -> tuple[str, int]:
    """Register a folder as an expert of a line, as any MLflow client could; its registered model and version.

    Args:
        house: where to.
        line: name of the line.
        folder: the expert's files.
        task: what it was trained for.
        suite: a suite.json with its data beside it, when it is not in the folder already.
        model: registered model, when the line watches several.

    Raises:
        FoldinError: E_SOURCE for a folder or suite that is not there, E_LINE for a model that the line does not watch,
            E_TASK for a task whose name intake would refuse, E_SUITE for a suite that it would.
    """
    _check_names(task, suite)
    watched = house.config.line(line).experts
    model = model or watched[0]
    if model not in watched:
        raise FoldinError(
            Refusal(
                code="E_LINE",
                what="the line does not watch this registered model",
                where=f"line {line}",
                expected=f"one of {', '.join(watched)}",
                found=model,
                remedy="name one of them with --model",
            )
        )
    extra = [] if suite is None else [suite, *sorted(suite.parent.glob("*.parquet"))]
    for path, exists in ((folder, folder.is_dir()), *((each, each.is_file()) for each in extra)):
        if not exists:
            raise FoldinError(
                Refusal("E_SOURCE", "there is no such folder or file", str(path), remedy="correct the path")
            )
    _check_suite(house.config.line(line), line, task, folder, suite)
    tags = {"foldin.task": task}  # whatever the folder was trained from, nobody here knows it
    return model, house.mlflow.register_expert(model, folder, extra, tags)


def _check_suite(settings: LineConfig, line: str, task: str, folder: Path, suite: Path | None) -> None:
    """What intake would quarantine the expert for is better refused before anything is uploaded."""
    from evaluation.suites import load_suite

    if task not in settings.suites:
        load_suite(suite.parent if suite else folder, task=task, where=f"suite of {folder.name}")


def _check_names(task: str, suite: Path | None) -> None:
    """What intake would refuse later is better refused before anything is uploaded."""
    if not TASK.fullmatch(task):
        expected, remedy = "letters, digits, '.', '_' and '-', at most 64", "give a plain --task"
        raise FoldinError(Refusal("E_TASK", "the task's name is not plain", "", "", "", expected, ascii(task), remedy))
    if suite is not None and suite.name != "suite.json":
        what, remedy = "the suite has another file name", "rename it; its data lies beside it"
        raise FoldinError(Refusal("E_SUITE", what, str(suite), "", "", "suite.json", suite.name, remedy))


def _check_same(config: Config, line: str, base: Path | None, experts: list[str], method: str | None) -> None:
    """Nothing, when what is asked for is what the file says; an option that is ignored would be a lie."""
    settings = config.lines[line]
    asked = {
        "base": (str(config.path(settings.base)), str(base.resolve()) if base else ""),
        "experts": (", ".join(settings.experts), ", ".join(experts)),
        "method": (settings.method, method or ""),
    }
    for key, (there, given) in asked.items():
        if given and given != there:
            what, remedy = f"[lines.{line}] has another {key}", "correct it there while the line was never started"
            where, remedy = str(config.folder / config.file), f"{remedy}, else start a new line"
            raise FoldinError(Refusal("E_CONFIG", what, where, "", "", there, given, remedy))
