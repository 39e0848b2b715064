"""foldin.toml: what this deployment is made of. One frozen dataclass a table; an unknown key is an error."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from registry.records import FoldinError, Refusal

DEFAULT_FILE = Path("foldin.toml")
TRIGGERS = ("on-register", "nightly", "manual")


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

    base: str  # folder of the base checkpoint, or an MLflow URI of it
    experts: tuple[str, ...]  # registered models whose versions are folded
    base_sha256: str = ""  # content digest, or the SHA-256 of the one weight file; "" = whatever base holds
    method: str = "opcm"  # a key of merging.METHODS
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the method, such as energy and strength
    plain: tuple[str, ...] = ()  # patterns of linear weights that are added plainly, never projected
    suites: Mapping[str, str] = field(default_factory=dict)  # task -> folder with suite.json, instead of the expert's
    gate: Mapping[str, Any] = field(default_factory=dict)  # the fields of evaluation.gate.Rules
    trigger: str = "on-register"  # on-register: watch by interval; nightly: on schedule; manual: only by hand
    interval: float = 60.0  # seconds between two looks at the registry
    schedule: str = "0 2 * * *"  # cron of the nightly fold
    timezone: str = "UTC"  # of the schedule
    device: str = "cpu"  # torch device the fold and the evaluation run on
    upload_patience: float = 3600.0  # seconds an expert may stay unfinished before it is set aside


@dataclass(frozen=True)
class Config:
    """One foldin.toml with its folder; relative paths are relative to that folder."""

    folder: Path
    registry: RegistryConfig
    lines: Mapping[str, LineConfig]

    @property
    def home(self) -> Path:
        """Where foldin keeps its own files."""
        return (self.folder / self.registry.home).resolve()

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
                else "a [lines.NAME] table in foldin.toml",
                remedy=f"start it with `foldin init {name} --base DIR`",
            )
        )

    def path(self, text: str) -> Path:
        """A path of the file, made absolute."""
        return (self.folder / Path(text).expanduser()).resolve()


def load(path: Path = DEFAULT_FILE) -> Config:
    """Read foldin.toml; a missing file is an empty one.

    Raises:
        FoldinError: E_CONFIG with the key, what was expected and found, and the nearest known key.
    """
    path = path.absolute()
    if not path.exists():
        return Config(path.parent, RegistryConfig(), {})
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FoldinError(_refused(path, "the file is not TOML", found=str(error))) from error
    _check_keys(path, "", table, {"registry", "lines"})
    lines = table.get("lines", {})
    return Config(
        folder=path.parent,
        registry=_read(path, "registry", RegistryConfig, table.get("registry", {})),
        lines={name: _line(path, name, row) for name, row in lines.items()},
    )


T = TypeVar("T", RegistryConfig, LineConfig)


def _line(path: Path, name: str, table: Mapping[str, Any]) -> LineConfig:
    line = _read(path, f"lines.{name}", LineConfig, table)
    if line.trigger not in TRIGGERS:
        what = f"[lines.{name}] trigger is unknown"
        raise FoldinError(_refused(path, what, expected=f"one of {', '.join(TRIGGERS)}", found=repr(line.trigger)))
    return line


def _read(path: Path, where: str, kind: type[T], table: Mapping[str, Any]) -> T:
    hints = get_type_hints(kind)
    _check_keys(path, where, table, set(hints))
    missing = [key for key in ("base", "experts") if key in hints and key not in table]
    if missing:
        raise FoldinError(_refused(path, f"[{where}] has no {missing[0]}", expected=f"{missing[0]} = …"))
    values = {key: _typed(path, f"[{where}] {key}", value, hints[key]) for key, value in table.items()}
    return kind(**values)


WORDS = {str: "a text", float: "a number", tuple: "a list of texts", Mapping: "a table"}


def _typed(path: Path, where: str, value: Any, hint: Any) -> Any:  # noqa: ANN401 - TOML values
    """The value as the field wants it: lists become tuples, whole numbers may stand for floats."""
    kind = get_origin(hint) or hint
    fits = {
        str: isinstance(value, str),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        tuple: isinstance(value, list) and all(isinstance(each, str) for each in value),
    }.get(kind, isinstance(value, dict))
    if not fits:
        words = WORDS.get(kind, "a table")
        raise FoldinError(_refused(path, f"{where} has the wrong type", expected=words, found=repr(value)))
    return tuple(value) if isinstance(value, list) else value


def _check_keys(path: Path, where: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            what = f"unknown key {key!r} in [{where}]" if where else f"unknown table [{key}]"
            raise FoldinError(
                _refused(path, what, expected=f"one of {', '.join(sorted(known))}", remedy=f"did you mean {near[0]!r}?")
            )


def _refused(path: Path, what: str, *, expected: str = "", found: str = "", remedy: str = "") -> Refusal:
    return Refusal(
        code="E_CONFIG",
        what=what,
        where=str(path),
        expected=expected,
        found=found,
        remedy=remedy or f"edit {path.name}",
    )
