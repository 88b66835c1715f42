"""Which batches are recorded whole: of the others somebody still records lines, or died while doing so."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

UNFILLED = sa.text("filled_at IS NULL")


def upgrade() -> None:
    op.add_column("batches", sa.Column("filled_at", sa.Double(), nullable=True))
    # Those that are there were answered as they are.
    op.execute("UPDATE batches SET filled_at = created_at")
    op.create_index(
        "ix_batches_unfilled",
        "batches",
        ["created_at"],
        sqlite_where=UNFILLED,
        postgresql_where=UNFILLED,
    )


def downgrade() -> None:
    op.drop_index("ix_batches_unfilled", "batches")
    op.drop_column("batches", "filled_at")
