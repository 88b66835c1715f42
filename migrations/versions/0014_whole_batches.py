"""Batches that are recorded whole and fed as there is room, and scans that could not join a session.

Of a batch that is not filled somebody still records lines, or died while doing so; of one that is not fed lines wait
for room before they become jobs.
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

UNFILLED = sa.text("filled_at IS NULL")
UNFED = sa.text("fed_at IS NULL")
WAITING = sa.text("wanted IS NOT NULL")


def upgrade() -> None:
    op.add_column("batches", sa.Column("filled_at", sa.Double(), nullable=True))
    op.add_column("batches", sa.Column("fed_at", sa.Double(), nullable=True))
    # Those that are there were answered as they are.
    op.execute("UPDATE batches SET filled_at = created_at, fed_at = created_at")
    op.create_index(
        "ix_batches_unfilled",
        "batches",
        ["created_at"],
        sqlite_where=UNFILLED,
        postgresql_where=UNFILLED,
    )
    op.create_index(
        "ix_batches_unfed", "batches", ["owner"], sqlite_where=UNFED, postgresql_where=UNFED
    )
    op.add_column("batch_lines", sa.Column("wanted", sa.Text(), nullable=True))
    op.create_index(
        "ix_batch_lines_waiting",
        "batch_lines",
        ["batch_id", "line"],
        sqlite_where=WAITING,
        postgresql_where=WAITING,
    )
    op.add_column("session_arrivals", sa.Column("problem", sa.Text(), nullable=True))


def downgrade() -> None:
    op.execute("DELETE FROM session_arrivals WHERE problem IS NOT NULL")
    op.drop_column("session_arrivals", "problem")
    op.drop_index("ix_batch_lines_waiting", "batch_lines")
    op.drop_column("batch_lines", "wanted")
    op.drop_index("ix_batches_unfed", "batches")
    op.drop_index("ix_batches_unfilled", "batches")
    op.drop_column("batches", "fed_at")
    op.drop_column("batches", "filled_at")
