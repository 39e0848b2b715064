"""foldin.toml: what this deployment is made of. One frozen dataclass a table; an unknown key is an error."""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from evaluation.approval import APPROVALS
from registry.records import FoldinError, Refusal

DEFAULT_FILE = Path("foldin.toml")
TRIGGERS = ("on-register", "nightly", "manual")
BLOCK = re.compile(r"[a-z0-9][a-z0-9-]*/[A-Za-z0-9][A-Za-z0-9_-]*")  # of Prefect: TYPE/NAME
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a line: names a registered model, a folder, deployments
LOCAL_DATABASE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:)(.+)")


@dataclass(frozen=True)
class RegistryConfig:
    """`[registry]`: where things are kept. Everything defaults to embedded, below `home`."""

    home: str = ".foldin"  # folder for scratch, the content store, caches and the embedded databases
    tracking_uri: str = ""  # MLflow; "" = SQLite in home
    artifact_root: str = ""  # where MLflow keeps files; "" = a folder in home, or the server's own choice
    ledger_url: str = ""  # SQLAlchemy URL; "" = SQLite in home
    lease_seconds: float = 60.0  # a worker that says nothing for so long may be taken over


@dataclass(frozen=True)
class LineConfig:
    """`[lines.NAME]`: one running model."""

    base: str  # folder of the base checkpoint: config.json, *.safetensors, tokenizer
    experts: tuple[str, ...]  # registered models whose versions are folded
    base_sha256: str = ""  # content digest, or the SHA-256 of the one weight file; "" = whatever base holds
    method: str = "opcm"  # a key of merging.METHODS
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the method, such as energy and strength
    plain: tuple[str, ...] = ()  # patterns of linear weights that are added plainly, never projected
    project: tuple[str, ...] = ()  # patterns of other tensors, such as convolutions, that are projected as (out, rest)
    suites: Mapping[str, str] = field(default_factory=dict)  # task -> folder with suite.json, instead of the expert's
    gate: Mapping[str, Any] = field(default_factory=dict)  # the fields of evaluation.gate.Rules
    approval: str = "never"  # which candidates wait for a person: never, on-reject (soft rejections) or always (all)
    notify: tuple[str, ...] = ()  # notification blocks of Prefect that hear what became of an expert, as TYPE/NAME
    trigger: str = "on-register"  # on-register: watch by interval; nightly: on schedule; manual: only by hand
    interval: float = 60.0  # seconds between two looks at the registry
    schedule: str = "0 2 * * *"  # cron of the nightly fold
    timezone: str = "UTC"  # of the schedule
    device: str = "cpu"  # cpu, cuda (the fold on every GPU, the evaluation on the first) or cuda:N
    workers: str = ""  # of the fold: "" = every core or GPU, a number of cores, or a Dask scheduler, tcp://HOST:PORT
    upload_patience: float = 3600.0  # seconds an expert may stay unfinished before it is set aside


@dataclass(frozen=True)
class Config:
    """One foldin.toml with its folder; relative paths are relative to that folder."""

    folder: Path
    registry: RegistryConfig
    lines: Mapping[str, LineConfig]
    file: str = DEFAULT_FILE.name  # in that folder

    @property
    def home(self) -> Path:
        """Where foldin keeps its own files."""
        return self.path(self.registry.home)

    def line(self, name: str) -> LineConfig:
        """One line's settings.

        Raises:
            FoldinError: E_LINE when the file has no such line.
        """
        if name in self.lines:
            return self.lines[name]
        raise FoldinError(
            Refusal(
                code="E_LINE",
                what="there is no such line",
                where=f"line {name}",
                expected=f"one of {', '.join(sorted(self.lines))}"
                if self.lines
                else f"a [lines.NAME] table in {self.folder / self.file}",
                remedy=f"correct the name, or start it with `foldin init {name} --base DIR`",
            )
        )

    def path(self, text: str) -> Path:
        """A path of the file, made absolute."""
        return _absolute(self.folder / self.file, text)


def load(path: Path = DEFAULT_FILE, *, new: bool = False) -> Config:
    """Read foldin.toml; with `new`, a missing file is an empty one.

    Raises:
        FoldinError: E_CONFIG with the key, what was expected and found, and the nearest known key.
    """
    path = path.absolute()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not new:
            remedy = "go to its folder, name it with --config, or start a line with `foldin init LINE --base DIR`"
            raise _refused(path, "there is no such file", "a foldin.toml", remedy=remedy) from error
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, "the file cannot be read", "text in UTF-8", str(error)) from error
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """The configuration that a foldin.toml at `path` (absolute) with this text stands for; raises like `load`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _refused(path, "the file is not TOML", "TOML 1.0", str(error)) from error
    _check_keys(path, "", table, {"registry", "lines"})
    lines = _table(path, "lines", table.get("lines", {}))
    return Config(
        folder=path.parent,
        registry=_registry(path, table.get("registry", {})),
        lines={name: _line(path, name, row) for name, row in lines.items()},
        file=path.name,
    )


def _registry(path: Path, value: object) -> RegistryConfig:
    """`[registry]`, its relative places made absolute: the ledger must not depend on where a process was started."""
    found = _read(path, "registry", RegistryConfig, value)
    _check_seconds(path, "[registry] lease_seconds", found.lease_seconds, 0.1)
    home = _absolute(path, found.home)
    if home.exists() and not home.is_dir():
        raise _refused(path, "[registry] home is not a folder", "a folder", str(home))
    root = found.artifact_root
    return replace(
        found,
        tracking_uri=_anchored(path, found.tracking_uri),
        ledger_url=_anchored(path, found.ledger_url),
        artifact_root=_absolute(path, root).as_uri() if root and "://" not in root else root,
    )


def _line(path: Path, name: str, value: object) -> LineConfig:
    if not NAME.fullmatch(name):
        expected = "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit"
        raise _refused(path, "the line's name is not plain", expected, repr(name))
    where = f"[lines.{name}]"
    if isinstance(value, dict) and type(value.get("workers")) is int:
        value = {**value, "workers": str(value["workers"])}  # a number may stand without quotes
    line = _read(path, f"lines.{name}", LineConfig, value)
    for key, known in {"trigger": TRIGGERS, "approval": APPROVALS}.items():
        if getattr(line, key) not in known:
            raise _refused(path, f"{where} {key} is unknown", f"one of {', '.join(known)}", repr(getattr(line, key)))
    for slug in line.notify:
        if not BLOCK.fullmatch(slug):
            raise _refused(path, f"{where} notify names no block", "TYPE/NAME, such as slack-webhook/ops", repr(slug))
    _check_seconds(path, f"{where} interval", line.interval, 0.1)
    _check_seconds(path, f"{where} upload_patience", line.upload_patience, 0.0)
    _check_experts(path, f"{where} experts", name, line.experts)
    return replace(line, suites={task: str(_absolute(path, folder)) for task, folder in line.suites.items()})


def _check_experts(path: Path, where: str, line: str, experts: tuple[str, ...]) -> None:
    """Registered models that MLflow can have, and not the line's own: it would fold its own versions for ever."""
    wrong = [name for name in experts if not name.strip() or "/" in name or ":" in name]
    if not experts or wrong:
        found = repr(wrong[0]) if wrong else "[]"
        raise _refused(path, f"{where} names no registered model", EXAMPLES["experts"], found)
    if line in experts:
        remedy = f"register experts under another name, such as {line}-experts"
        raise _refused(path, f"{where} names the line's own registered model", "other models", repr(line), remedy)


def _check_seconds(path: Path, where: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise _refused(path, f"{where} is out of range", f"a number of seconds, {least:g} or more", repr(value))


def _absolute(path: Path, text: str) -> Path:
    return (path.parent / Path(text).expanduser()).resolve()


def _anchored(path: Path, url: str) -> str:
    """A database URL whose relative file is taken from the configuration's folder."""
    local = LOCAL_DATABASE.fullmatch(url)
    return f"{local[1]}{_absolute(path, local[2])}" if local else url


T = TypeVar("T", RegistryConfig, LineConfig)
EXAMPLES = {"base": '"a folder"', "experts": '["a registered model"]'}
WORDS = {str: "a text", float: "a number", tuple: "a list of texts"}


def _read(path: Path, where: str, kind: type[T], value: object) -> T:
    table, hints = _table(path, where, value), get_type_hints(kind)
    _check_keys(path, where, table, set(hints))
    for key, example in EXAMPLES.items():
        if key in hints and key not in table:
            raise _refused(path, f"[{where}] has no {key}", f"{key} = {example}", remedy=f"add it to {path.name}")
    values = {key: _typed(path, f"[{where}] {key}", value, hints[key]) for key, value in table.items()}
    return kind(**values)


def _typed(path: Path, where: str, value: Any, hint: Any) -> Any:  # noqa: ANN401 - TOML values
    """The value as the field wants it: lists become tuples, whole numbers may stand for floats."""
    kind, texts = get_origin(hint) or hint, get_args(hint)[1:] == (str,)
    fits = {
        str: isinstance(value, str),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        tuple: isinstance(value, list) and all(isinstance(each, str) for each in value),
    }.get(kind, isinstance(value, dict) and (not texts or all(isinstance(each, str) for each in value.values())))
    if not fits:
        words = WORDS.get(kind, "a table of texts" if texts else "a table")
        raise _refused(path, f"{where} has the wrong type", words, repr(value))
    return tuple(value) if isinstance(value, list) else value


def _table(path: Path, where: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise _refused(path, f"{where} is not a table", f"a table [{where}]", repr(value))


def _check_keys(path: Path, where: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            what = f"unknown key {key!r} in [{where}]" if where else f"unknown table {key!r}"
            raise _refused(path, what, f"one of {', '.join(sorted(known))}", remedy=f"did you mean {near[0]!r}")


def _refused(path: Path, what: str, expected: str, found: str = "", remedy: str = "") -> FoldinError:
    refusal = Refusal("E_CONFIG", what, str(path), "", "", expected, found, remedy or f"correct it in {path.name}")
    return FoldinError(refusal)
