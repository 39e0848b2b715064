"""What the flow tests share: one real Prefect server a worker, the house of a line, the verbs in this process."""

import os
import shutil
import sqlite3
from contextlib import closing, contextmanager

import pytest
from filelock import FileLock

from flows import cli
from flows.config import load
from flows.serve import temporary_prefect
from flows.wiring import house


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
