"""The one place where configuration becomes living things, and where the process's environment is set."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.config import Config, load
from flows.options import LineConfig

if TYPE_CHECKING:
    from registry.ledger import Ledger
    from registry.mlflow_store import MlflowStore

CODE_FORMAT = 6  # part of every merge key; raised when the same inputs would give other bytes


@dataclass(frozen=True)
class House:
    """Everything a flow works with: the configuration, the ledger, MLflow and the folders."""

    config: Config
    ledger: "Ledger"

    @cached_property
    def mlflow(self) -> "MlflowStore":
        """MLflow, imported by who needs it first: that takes seconds."""
        from registry.mlflow_store import MlflowStore

        return MlflowStore(tracking_uri(self.config), artifact_root(self.config), self.config.home / "downloads")

    @property
    def experts(self) -> Path:
        """The content-addressed copies of admitted experts."""
        return self.config.home / "experts"

    @property
    def scores(self) -> Path:
        """What was measured once: (weights, suite) -> score."""
        return self.config.home / "scores"

    @property
    def far(self) -> str:
        """Where the store keeps copies of experts whose weights are in S3; "" where MLflow's files are elsewhere."""
        root = self.config.registry.artifact_root
        return f"{root.rstrip('/')}/foldin-experts" if root.startswith("s3://") else ""

    def work(self, line: str) -> Path:
        """The scratch folder of a line; only the holder of its lease may touch it."""
        return self.config.home / "work" / line


@cache
def house(config_file: str) -> House:
    """The house of a foldin.toml, opened once a process."""
    from registry.far import trust
    from registry.ledger import Ledger
    from registry.ranged import keep_near

    config = load(Path(config_file))
    for folder in ("downloads", "experts"):
        trust(config.home / folder)
    keep_near(config.home / "tensors", int(config.registry.cache * 1e9))
    return House(config, Ledger(ledger_url(config), patience=30.0))


def ledger_url(config: Config) -> str:
    """Where the ledger is."""
    return config.registry.ledger_url or f"sqlite:///{config.home / 'ledger.db'}"


def has_lines(config: Config) -> bool:
    """Whether a line was started in the embedded ledger of a folder."""
    from registry.ledger import Ledger

    if not (config.home / "ledger.db").exists():
        return False
    ledger = Ledger(ledger_url(config))
    try:
        return bool(ledger.lines())
    finally:
        ledger.close()


def tracking_uri(config: Config) -> str:
    """Where MLflow is."""
    if config.registry.tracking_uri:
        return config.registry.tracking_uri
    config.home.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{config.home / 'mlflow.db'}"


def artifact_root(config: Config) -> str:
    """Where MLflow keeps files; "" leaves it to the server."""
    if config.registry.artifact_root:
        return config.registry.artifact_root
    return "" if config.registry.tracking_uri else (config.home / "artifacts").as_uri()


@cache
def code_facts() -> dict[str, Any]:
    """Which foldin this is: its version, and the digest of its sources, which tells two builds of one version apart."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for package in ("evaluation", "flows", "merging", "registry"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return {"format": CODE_FORMAT, "version": version("foldin"), "sources_sha256": digest.hexdigest()}


def merge_key(
    line: str,
    parent: str,
    expert: str,
    task: str,
    suites: Mapping[str, str],
    settings: LineConfig,
    weight: float = 1.0,
) -> str:
    """The name of one merge: what goes in decides it, so a repeated run finds what an earlier one left.

    Args:
        line: name of the line.
        parent: SHA-256 of the parent version's manifest, which covers its weights and its state.
        expert: its name and the digest of its files.
        task: the expert's task.
        suites: task or guard -> identity of its suite; those of what the parent knows are in the parent's manifest.
        settings: the line's settings; those that change weights or verdict are part of the key.
        weight: what the expert's change is multiplied by.
    """
    facts: dict[str, Any] = {
        "format": CODE_FORMAT,
        "line": line,
        "parent": parent,
        "expert": expert,
        "task": task,
        "suites": dict(suites),
        "evaluation_seconds": settings.evaluation_seconds,
        "method": settings.method,
        "parameters": dict(settings.parameters),
        "plain": list(settings.plain),
        "project": list(settings.project),
        "gate": dict(settings.gate),
        "search": asdict(settings.search),
        **({"weight": weight} if weight != 1 else {}),
        "approval": settings.approval,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
