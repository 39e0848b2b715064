"""The connection to the ledger's database: SQLite by default, PostgreSQL in production; migrated when first opened."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, InterfaceError, NoSuchModuleError

from registry.records import FoldinError, Refusal

MIGRATIONS = Path(__file__).parent / "migrations"
__all__ = ["HEAD", "MIGRATIONS", "IntegrityError", "connect", "reading", "transaction", "translated"]

HEAD = "0003"  # the newest revision in registry/migrations; tested against the folder
READS = "foldin_reads"  # option of a connection to SQLite
MIGRATION_LOCK = 0x464F4C44  # any constant: PostgreSQL's advisory lock of foldin's migrations


def connect(url: str, patience: float = 30.0) -> Engine:
    """An engine on a ledger at the newest schema.

    Args:
        url: SQLAlchemy URL, `sqlite:///path` or `postgresql+psycopg://…`.
        patience: seconds to wait for another writer, > 0.

    Raises:
        FoldinError: E_LEDGER when the database cannot be opened or stays locked.
    """
    parsed = _parsed(url)
    if parsed.drivername == "sqlite":
        Path(parsed.database or "").parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": patience})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    else:
        engine = create_engine(url, pool_pre_ping=True)
    with translated(engine):
        _migrate(engine)
    return engine


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise FoldinError(_unusable(url, str(error))) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise FoldinError(_unusable(url, parsed.get_backend_name()))
    return parsed


def _unusable(url: str, found: str) -> Refusal:
    return Refusal(
        code="E_CONFIG",
        what="ledger_url names no database that the ledger can be kept in",
        where="[registry] of foldin.toml",
        expected="sqlite:///path or postgresql+psycopg://user@host/name",
        found=found.splitlines()[0],
        remedy="correct ledger_url",
    )


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Turn a database that is locked, down or damaged into one typed error."""
    try:
        yield
    except IntegrityError:
        raise  # a broken promise of the tables, for the caller to judge
    except (DatabaseError, InterfaceError) as error:
        locked = "locked" in str(error.orig).lower()
        raise FoldinError(
            Refusal(
                code="E_LOCKED" if locked else "E_LEDGER",
                what="the ledger is locked by another process" if locked else "the ledger cannot be used",
                where=f"ledger {engine.url.render_as_string(hide_password=True)}",
                found=str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__,
                remedy="wait for the other process, or find it with `foldin doctor`, and run this again"
                if locked
                else "check that the database runs, that the URL is right and that the disk has room",
            )
        ) from error


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction with typed errors; everything in it happens or nothing does."""
    with translated(engine), engine.begin() as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One look at everything as it is at one moment, which no writer waits for and that waits for none."""
    sqlite = engine.dialect.name == "sqlite"
    options = {READS: True} if sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with translated(engine), engine.connect() as plain, plain.execution_options(**options).begin():
        yield plain


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy says BEGIN itself, below
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    """Take the write lock at once: a read that later writes would otherwise fail half-way instead of waiting."""
    only_reads = connection.get_execution_options().get(READS, False)
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


def _migrate(engine: Engine) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        if _revision(connection) == HEAD:
            return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
