"""Batches that are recorded whole and fed as there is room, and scans that could not join a session.

Of a batch that is not filled somebody still records lines, or died while doing so; of one that is not fed lines wait
for room before they become jobs.
"""

import sqlalchemy as sa
from alembic import op

from neural_mri.backing.database import MigrationBlocked

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
    # Each is somebody's accepted request, and the older schema has no place for it.
    counted = sa.text("SELECT count(*) FROM batch_lines WHERE wanted IS NOT NULL")
    waiting: int = op.get_bind().execute(counted).scalar_one()
    if waiting:
        raise MigrationBlocked(
            f"{waiting} lines of batches wait to become jobs, and revision {down_revision} would drop them: let "
            "no more be sent, cancel those batches or let workers and the reaper go on until "
            "`neural_mri_waiting_lines`, which the API tells, is 0, then go back; nothing was changed"
        )
    op.execute("DELETE FROM session_arrivals WHERE problem IS NOT NULL")
    op.drop_column("session_arrivals", "problem")
    op.drop_index("ix_batch_lines_waiting", "batch_lines")
    op.drop_column("batch_lines", "wanted")
    op.drop_index("ix_batches_unfed", "batches")
    op.drop_index("ix_batches_unfilled", "batches")
    op.drop_column("batches", "fed_at")
    op.drop_column("batches", "filled_at")
