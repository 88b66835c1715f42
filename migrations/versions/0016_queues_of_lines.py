"""Where the job of a line will wait that waits for room: lines for one model hold up none for another."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

WAITING = sa.text("wanted IS NOT NULL")


def upgrade() -> None:
    op.add_column("batch_lines", sa.Column("queue", sa.String(64), nullable=True))
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    queue = "wanted::json ->> 'queue'" if is_postgresql else "json_extract(wanted, '$.queue')"
    lines = sa.table("batch_lines", sa.column("queue"), sa.column("wanted"))
    waiting = lines.update().where(lines.c.wanted.is_not(None))
    op.execute(waiting.values(queue=sa.literal_column(queue)))
    op.create_index(
        "ix_batch_lines_queues",
        "batch_lines",
        ["batch_id", "queue", "line"],
        sqlite_where=WAITING,
        postgresql_where=WAITING,
    )


def downgrade() -> None:
    op.drop_index("ix_batch_lines_queues", "batch_lines")
    op.drop_column("batch_lines", "queue")
