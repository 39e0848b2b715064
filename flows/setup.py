"""`foldin init` and `foldin add`: a line written into foldin.toml, an expert registered."""

from pathlib import Path
from typing import TYPE_CHECKING

from flows.config import Config, load
from registry.files import write_atomic
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from flows.wiring import House


def write_line(config_file: Path, line: str, base: Path | None, experts: list[str], method: str | None) -> Config:
    """The configuration with a table for the line; what is in the file already, comments included, stays as it is.

    Raises:
        FoldinError: E_CONFIG when the line is not in the file and no base was given, or is there with another base.
    """
    import tomlkit

    config = load(config_file)
    if line in config.lines:
        _check_same(config, line, base, config_file)
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
    document = tomlkit.parse(config_file.read_text(encoding="utf-8")) if config_file.exists() else tomlkit.document()
    lines = document.setdefault("lines", tomlkit.table(is_super_table=True))
    lines[line] = {
        "base": str(base),
        "experts": experts or [f"{line}-experts"],
        **({"method": method} if method else {}),
    }
    write_atomic(config_file, tomlkit.dumps(document).encode())
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
        FoldinError: E_SOURCE for a folder or suite that is not there, E_LINE for a model that the line does not watch.
    """
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
    tags = {"foldin.task": task, "foldin.base_sha256": house.ledger.line(line).base_sha256}
    return model, house.mlflow.register_expert(model, folder, extra, tags)


def _check_same(config: Config, line: str, base: Path | None, config_file: Path) -> None:
    configured = config.lines[line].base
    if base is not None and config.path(configured) != base.resolve():
        raise FoldinError(
            Refusal(
                code="E_CONFIG",
                what=f"[lines.{line}] names another base",
                where=str(config_file),
                expected=configured,
                found=str(base),
                remedy="start a new line for the new base",
            )
        )
