"""Lines of batches that wait for room before they become jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

UNFED = sa.text("fed_at IS NULL")
WAITING = sa.text("wanted IS NOT NULL")


def upgrade() -> None:
    op.add_column("batches", sa.Column("fed_at", sa.Double(), nullable=True))
    op.execute("UPDATE batches SET fed_at = created_at")
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


def downgrade() -> None:
    op.drop_index("ix_batch_lines_waiting", "batch_lines")
    op.drop_column("batch_lines", "wanted")
    op.drop_index("ix_batches_unfed", "batches")
    op.drop_column("batches", "fed_at")
