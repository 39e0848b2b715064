"""What the flow tests share: a Prefect server a worker, the house of a line, the verbs in this process, bare folds."""

import os
import shutil
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock
from safetensors.torch import load_file, save_file

from flows import cli
from flows.admission import Admitted
from flows.config import load
from flows.fitting import Fit, fit
from flows.kinds import kinds_of
from flows.memory import Memory
from flows.options import LineConfig
from flows.passes import Serving, fold_state, materialise, stats_after
from flows.plan import Plan
from flows.planning import make_plan
from flows.serve import temporary_prefect
from flows.versions import Version
from flows.wiring import house
from registry import intake
from registry.files import hash_tree
from registry.weights import Checkpoint
from tests.flows.forging import Forge


@contextmanager
def serving(folder):
    """The URL of a real Prefect server that keeps its database in a folder."""
    (folder / "foldin.toml").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(folder))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        patch.delenv("PREFECT_API_URL", raising=False)
        with temporary_prefect(load(folder / "foldin.toml")) as url:
            yield url


@pytest.fixture(scope="session")
def empty(tmp_path_factory, worker_id):
    """A Prefect database before its first run, the same for all workers: making one takes seven seconds."""
    mine = tmp_path_factory.getbasetemp()
    shared = (mine if worker_id == "master" else mine.parent) / "empty.db"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            folder = tmp_path_factory.mktemp("first")
            with serving(folder):
                pass
            with closing(sqlite3.connect(folder / "prefect.db")) as made, closing(sqlite3.connect(shared)) as kept:
                made.backup(kept)
    return shared


@pytest.fixture(scope="session")
def prefect(tmp_path_factory, empty):
    """The URL of a real Prefect server, named to this process and to every process that a test starts."""
    folder = tmp_path_factory.mktemp("prefect")
    shutil.copyfile(empty, folder / "prefect.db")
    with serving(folder) as url:
        yield url


@pytest.fixture(scope="module")
def forge(tmp_path_factory, prefect):
    """One forge for all tests of a file; what it imports must find the Prefect server named."""
    found = Forge(tmp_path_factory.mktemp("forge"))
    yield found
    found.close()


@pytest.fixture
def own_prefect(workshop, prefect, empty, monkeypatch):
    """For tests that start Prefect servers themselves: none is named, and the database is made already."""
    home = workshop / "prefect"
    home.mkdir()
    shutil.copyfile(empty, home / "prefect.db")
    monkeypatch.setenv("PREFECT_HOME", str(home))
    monkeypatch.delenv("PREFECT_API_URL")
    return home


@pytest.fixture
def at(workshop, prefect):
    """The house of the line `tiny`."""
    found = house(str(workshop / "foldin.toml"))
    yield found
    found.ledger.close()


@pytest.fixture
def verbs(capsys, prefect):
    """The command line in this process: foldin.toml -> (arguments -> exit code, stdout, stderr)."""

    def of(toml):
        def run(*arguments):
            if house.cache_info().currsize:
                house(str(toml)).ledger.close()
            house.cache_clear()
            capsys.readouterr()
            code = 0
            try:
                cli.main(["--config", str(toml), *map(str, arguments)])
            except SystemExit as ended:
                code = int(ended.code or 0)
            said = capsys.readouterr()
            return code, said.out, said.err

        return run

    before = dict(os.environ)
    yield of
    os.environ.clear()
    os.environ.update(before)


def backup(source, target):
    """The content of a database that others have open."""
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as written:
        read.backup(written)


@contextmanager
def keeping(at):
    """What the block does to the ledger, to MLflow and to files is undone."""
    home, aside = at.config.home, Path(mkdtemp(dir=at.config.folder))
    shutil.copytree(home / "artifacts", aside / "artifacts")
    for name in ("ledger.db", "mlflow.db"):
        backup(home / name, aside / name)
    try:
        yield
    finally:
        shutil.rmtree(home / "artifacts")
        shutil.move(aside / "artifacts", home / "artifacts")
        for name in ("ledger.db", "mlflow.db"):
            backup(aside / name, home / name)
        shutil.rmtree(aside)


@pytest.fixture(scope="session")
def kept():
    """A function: what its block does to the ledger, to MLflow and to files of a house is undone."""
    return keeping


@pytest.fixture
def reopened(toml):
    """The house of the file's `toml`, as a process sees it that has just started."""
    house.cache_clear()
    found = house(str(toml))
    yield found
    house(str(toml)).ledger.close()


@pytest.fixture
def undone(reopened):
    """The same; what a test does to it is undone."""
    with keeping(reopened):
        yield reopened


@pytest.fixture(scope="session")
def write_key():
    """A function that writes a private key in PEM, and its public half beside it, as path with the suffix .pub."""

    def write(path):
        key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
        path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        path.with_suffix(".pub").write_bytes(public)

    return write


class Folded(NamedTuple):
    """What the first pass over a bare line left."""

    plan: Plan
    measures: list
    folder: Path  # of the state
    records: Path

    @property
    def bytes(self):
        """File name -> digest of the state's files."""
        return hash_tree(self.folder)


@dataclass
class BareLine:
    """A base and what was folded into it, without a registry: the state of one pass is the slots of the next."""

    root: Path  # gets everything that is written
    base: Path
    settings: LineConfig
    devices: tuple[str, ...] = ("cpu",)
    slots: Checkpoint | None = None
    stats: tuple = (0.0, 0.0, 0.0)
    stored: dict = field(default_factory=dict)
    passes: int = 0

    @property
    def version(self):
        """The base as the line's first version."""
        return Version(1, self.base, "", Memory(self.settings.method, {}, "0" * 64, "0" * 64))

    def admitted(self, folder):
        """An expert as intake would hand it over."""
        found, suite = self.fit(folder), SimpleNamespace(sha256="1" * 64)
        return Admitted((folder.name, 1), "task", folder, "0" * 64, found.sha256, found.body, found.head, suite)

    def fit(self, folder, has_head=False):
        """What intake's second half says about an expert's folder."""
        return fit(self.version, intake.Admitted(folder, hash_tree(folder), "", ()), has_head, f"expert {folder.name}")

    def plan(self, *experts):
        """The plan of one pass over some experts' folders."""
        from evaluation.architecture import anatomy

        fits = [self.fit(folder) for folder in experts]
        assert all(isinstance(each, Fit) for each in fits), fits
        weights = Checkpoint.open(self.base, "base")
        return make_plan(
            self.settings.method,
            self.settings.parameters,
            weights,
            self.slots,
            tuple(each.body for each in fits),
            kinds_of(self.settings, weights, anatomy(self.base, list(weights))),
            stats=self.stats,
            stored=self.stored,
        )

    def run(self, plan):
        """The first pass, into folders of its own; the line stays where it is."""
        folder, records = (self.root / f"{kind}-{self.passes}" for kind in ("state", "records"))
        return Folded(plan, fold_state(folder, records, plan, self.devices), folder, records)

    def fold(self, *experts):
        """The first pass; the line goes on from what it left."""
        done = self.run(self.plan(*experts))
        self.stats = tuple(stats_after(done.plan, done.measures))
        self.stored = done.plan.stored[-1]
        self.slots = Checkpoint.open(done.folder, "state") if done.plan.names else None
        self.passes += 1
        return done

    def serve(self, plan) -> tuple[Path, Serving]:
        """The second pass over what the line holds: the serving checkpoint, with the base's other files."""
        from merging import Stats

        folder = self.root / f"serving-{self.passes}"
        served = materialise(folder, self.slots, plan, Stats(*self.stats), self.devices)
        for path in self.base.glob("*.json"):
            if "safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)
        return folder, served


class Huge(NamedTuple):
    """An expert that can be folded once; twice is more than float32 can hold."""

    folder: Path
    tensor: str  # the one that is so large


@pytest.fixture
def huge(zoo, tmp_path):
    """An expert whose change of one tensor is barely finite."""
    found = Huge(shutil.copytree(zoo / "expert-1", tmp_path / "huge"), "encoder.layer.1.output.dense.bias")
    tensors = load_file(found.folder / "model.safetensors")
    tensors[found.tensor] = torch.full_like(tensors[found.tensor], 3e38)
    save_file(tensors, found.folder / "model.safetensors", {"format": "pt"})
    return found


@pytest.fixture
def bare_line(tmp_path):
    """A function that makes a line of a base's folder: base, settings of the line -> BareLine."""
    made = []

    def make(base, devices=("cpu",), **settings):
        root = tmp_path / f"line-{len(made)}"
        made.append(root)
        return BareLine(root, base, LineConfig(base=str(base), experts=(), **settings), devices)

    return make
