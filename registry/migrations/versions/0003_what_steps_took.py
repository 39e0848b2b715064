"""what steps took, and since when a lease is held"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "steps",
        sa.Column("line", sa.String(length=200), nullable=False),
        sa.Column("step", sa.String(length=40), nullable=False),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["line"], ["lines.name"], name=op.f("fk_steps_line")),
        sa.PrimaryKeyConstraint("line", "step", name=op.f("pk_steps")),
    )
    with op.batch_alter_table("leases") as table:
        table.add_column(sa.Column("since", sa.Float(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("leases") as table:
        table.drop_column("since")
    op.drop_table("steps")
