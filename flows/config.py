"""foldin.toml, read: an unknown key, or a value that cannot be, is an error."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from evaluation.approval import APPROVALS
from flows.line_checks import (
    check_access,
    check_batch,
    check_blackout,
    check_experts,
    check_runner,
    check_search,
    check_seconds,
    check_timezone,
)
from flows.options import (
    LineConfig,
    ReceiverConfig,
    RegistryConfig,
    SigningConfig,
    StackConfig,
)
from flows.tables import as_table, check_keys, check_number, read_table, refused
from registry.records import FoldinError, Refusal

DEFAULT_FILE = Path("foldin.toml")
TRIGGERS = ("on-register", "nightly", "manual")
BLOCK = re.compile(r"[a-z0-9][a-z0-9-]*/[A-Za-z0-9][A-Za-z0-9_-]*")  # of Prefect: TYPE/NAME
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a line: names a registered model, a folder, deployments
PLAIN = "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit"
LOCAL_DATABASE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:)(.+)")


@dataclass(frozen=True)
class Config:
    """One foldin.toml with its folder; relative paths are relative to that folder."""

    folder: Path
    registry: RegistryConfig
    lines: Mapping[str, LineConfig]
    receiver: ReceiverConfig = field(default_factory=ReceiverConfig)
    stack: StackConfig = field(default_factory=StackConfig)
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
        none = f"a [lines.NAME] table in {self.folder / self.file}"
        expected = f"one of {', '.join(sorted(self.lines))}" if self.lines else none
        remedy = f"correct the name, or start it with `foldin init {name} --base DIR`"
        raise FoldinError(Refusal("E_LINE", "there is no such line", f"line {name}", expected=expected, remedy=remedy))

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
            raise refused(path, "there is no such file", "a foldin.toml", remedy=remedy) from error
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise refused(path, "the file cannot be read", "text in UTF-8", str(error)) from error
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """The configuration that a foldin.toml at `path` (absolute) with this text stands for; raises like `load`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise refused(path, "the file is not TOML", "TOML 1.0", str(error)) from error
    check_keys(path, "", table, {"registry", "receiver", "stack", "lines"})
    lines = as_table(path, "lines", table.get("lines", {}))
    return Config(
        folder=path.parent,
        registry=_registry(path, table.get("registry", {})),
        lines={name: _line(path, name, row) for name, row in lines.items()},
        receiver=_receiver(path, table.get("receiver", {})),
        stack=_stack(path, table.get("stack", {})),
        file=path.name,
    )


def _registry(path: Path, value: object) -> RegistryConfig:
    """`[registry]`, its relative places made absolute: the ledger must not depend on where a process was started."""
    found = read_table(path, "registry", RegistryConfig, value)
    check_seconds(path, "[registry] lease_seconds", found.lease_seconds, 0.1)
    check_number(path, "[registry] cache", found.cache, "gigabytes, 0 or more", 0)
    for key in ("keep", "keep_thin"):
        check_number(path, f"[registry] {key}", getattr(found, key), "a whole number from 0", 0, whole=True)
    home = _absolute(path, found.home)
    if home.exists() and not home.is_dir():
        raise refused(path, "[registry] home is not a folder", "a folder", str(home))
    root, events = found.artifact_root, found.openlineage
    if "://" in events and not events.startswith(("http://", "https://")):
        raise refused(
            path, "[registry] openlineage is neither a server nor a file", "http(s)://SERVER, or a path", events
        )
    return replace(
        found,
        openlineage=str(_absolute(path, events)) if events and "://" not in events else events,
        tracking_uri=_anchored(path, found.tracking_uri),
        ledger_url=_anchored(path, found.ledger_url),
        artifact_root=_absolute(path, root).as_uri() if root and "://" not in root else root,
    )


def _receiver(path: Path, value: object) -> ReceiverConfig:
    found = read_table(path, "receiver", ReceiverConfig, value)
    _check_port(path, "[receiver] port", found.port)
    if found.url and not found.url.startswith(("http://", "https://")):
        raise refused(path, "[receiver] url is no address", "http(s)://HOST/PATH", found.url)
    return found


def _stack(path: Path, value: object) -> StackConfig:
    found = read_table(path, "stack", StackConfig, value)
    for key in ("mlflow_port", "prefect_port", "s3_port"):
        _check_port(path, f"[stack] {key}", getattr(found, key))
    if found.s3_command and "{port}" not in " ".join(found.s3_command):
        raise refused(path, "[stack] s3_command names no {port}", "a command with {port} in it", str(found.s3_command))
    return found


def _check_port(path: Path, where: str, port: float) -> None:
    check_number(path, where, port, "a whole number from 1 to 65535", 1, 65535, whole=True)


def _line(path: Path, name: str, value: object) -> LineConfig:
    if not NAME.fullmatch(name):
        raise refused(path, "the line's name is not plain", PLAIN, repr(name))
    where = f"[lines.{name}]"
    if isinstance(value, dict) and type(value.get("workers")) is int:
        value = {**value, "workers": str(value["workers"])}  # a number may stand without quotes
    line = read_table(path, f"lines.{name}", LineConfig, value)
    for key, known in {"trigger": TRIGGERS, "approval": APPROVALS}.items():
        if getattr(line, key) not in known:
            raise refused(path, f"{where} {key} is unknown", f"one of {', '.join(known)}", repr(getattr(line, key)))
    for slug in line.notify:
        if not BLOCK.fullmatch(slug):
            raise refused(path, f"{where} notify names no block", "TYPE/NAME, such as slack-webhook/ops", repr(slug))
    for key, least in {"interval": 0.1, "upload_patience": 0.0, "evaluation_seconds": 0.1}.items():
        check_seconds(path, f"{where} {key}", getattr(line, key), least)
    check_batch(path, f"{where} batch", line.batch)
    check_blackout(path, f"{where} blackout", line.blackout)
    check_timezone(path, f"{where} timezone", line.timezone)
    check_experts(path, f"{where} experts", name, line.experts)
    check_runner(path, f"[lines.{name}.runner]", line.runner)
    check_search(path, f"[lines.{name}.search]", line.search)
    check_access(path, f"[lines.{name}.access]", line.access)
    suites, guards = (
        {task: str(_absolute(path, folder)) for task, folder in each.items()} for each in (line.suites, line.guards)
    )
    for guard in guards:
        if not NAME.fullmatch(guard):
            raise refused(path, f"{where} names a guard that is not plain", PLAIN, repr(guard))
    both = sorted(suites.keys() & guards.keys())
    if both:
        raise refused(path, f"{where} names a task in suites and guards", "one of the two", repr(both[0]))
    return replace(line, suites=suites, guards=guards, signing=_signing(path, f"[lines.{name}.signing]", line.signing))


def _signing(path: Path, where: str, found: SigningConfig) -> SigningConfig:
    for key, needed in (("certificate", "key"), ("key", "versions")):
        if getattr(found, key) and not getattr(found, needed):
            raise refused(path, f"{where} has {key} and no {needed}", f"{needed} as well")
    key, certificate = (str(_absolute(path, each)) if each else "" for each in (found.key, found.certificate))
    versions, experts = (tuple(str(_absolute(path, each)) for each in some) for some in (found.versions, found.experts))
    return SigningConfig(key, certificate, versions, experts)


def _absolute(path: Path, text: str) -> Path:
    return (path.parent / Path(text).expanduser()).resolve()


def _anchored(path: Path, url: str) -> str:
    """A database URL whose relative file is taken from the configuration's folder."""
    local = LOCAL_DATABASE.fullmatch(url)
    return f"{local[1]}{_absolute(path, local[2])}" if local else url
