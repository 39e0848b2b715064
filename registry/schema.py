"""The ledger's tables. Decisions live here; what MLflow shows is derived from them."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import functions
from sqlalchemy.sql.compiler import SQLCompiler

metadata = MetaData(
    naming_convention={
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

lines = Table(
    "lines",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("base_sha256", String(64), nullable=False),
    Column("champion", Integer),  # version of the registered model; None until the base is registered
    Column("blocked", Text, nullable=False, default=""),  # why nothing may be folded; "" when free
    Column("created", Float, nullable=False),
)

experts = Table(
    "experts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("line", ForeignKey("lines.name"), nullable=False),
    Column("model", String(200), nullable=False),  # registered model the expert is a version of
    Column("version", Integer, nullable=False),
    Column("generation", Integer, nullable=False, default=1),  # a requeued expert opens a new one
    Column("seq", Integer, nullable=False),  # the order of folding within the line
    Column("task", String(200), nullable=False, default=""),
    Column("digest", String(64), nullable=False, default=""),  # of the weights, once intake has read them
    Column("state", String(20), nullable=False),
    Column("code", String(40), nullable=False, default=""),
    Column("reason", Text, nullable=False, default=""),
    Column("attempts", Integer, nullable=False, default=0),  # since the last success or clean failure
    Column("enrolled", Float, nullable=False),
    Column("settled", Float),
    UniqueConstraint("line", "model", "version", "generation"),
    UniqueConstraint("line", "seq"),
)

Index(
    "one_fold_per_digest",
    experts.c.line,
    experts.c.digest,
    experts.c.generation,
    unique=True,
    sqlite_where=text("state = 'folded'"),
    postgresql_where=text("state = 'folded'"),
)

merges = Table(
    "merges",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("line", ForeignKey("lines.name"), nullable=False),
    Column("merge_key", String(64), nullable=False, unique=True),
    Column("expert_id", ForeignKey("experts.id")),  # None: the base itself
    Column("also", Text, nullable=False, server_default="[]"),  # json: ids of those folded before it in the same pass
    Column("parent", Integer),  # version folded into; None: the base itself
    Column("outcome", String(20), nullable=False),  # the gate's; once a person decided, approved or declined
    Column("verdict", Text, nullable=False),  # json of records.Verdict
    Column("run_id", String(64), nullable=False, default=""),  # MLflow run that shows it
    Column("version", Integer),  # registered version; None while unregistered or rejected
    Column("manifest_sha256", String(64), nullable=False, default=""),
    Column("fence", Integer, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("line", "version"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("line", ForeignKey("lines.name"), nullable=False),
    Column("kind", String(20), nullable=False),  # as in records.Event
    Column("origin", Integer),  # champion before a move
    Column("target", Integer),  # champion after it
    Column("because", Text, nullable=False, default=""),
    Column("who", String(200), nullable=False, default=""),
    Column("done", Boolean, nullable=False),  # False: the alias has not been seen on the target yet
    Column("fence", Integer, nullable=False),
    Column("at", Float, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("line", ForeignKey("lines.name"), primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("fence", Integer, nullable=False),  # only grows; every write of a merge carries it
    Column("expires", Float, nullable=False),
    Column("since", Float),  # when the holder took it; None until somebody has
)

steps = Table(  # what monitoring shows; sums, so it does not grow. No decision rests on it, and no history keeps it
    "steps",
    metadata,
    Column("line", ForeignKey("lines.name"), primary_key=True),
    Column("step", String(40), primary_key=True),  # "" for the whole of a fold
    Column("runs", Integer, nullable=False),
    Column("failures", Integer, nullable=False),  # runs that ended with an error
    Column("seconds", Float, nullable=False),
    Column("bytes", BigInteger, nullable=False),  # of the folders that they left
)


class now(functions.GenericFunction[float]):
    """Seconds since the epoch by the database's clock; a worker's clock is never asked."""

    type = Float()
    inherit_cache = True
    name = "foldin_now"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **options: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **options: object) -> str:
    return "extract(epoch from clock_timestamp())"
