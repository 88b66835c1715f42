"""What each user may have under way, and compute in a day; indices that count it and the queues' pace."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

UNFINISHED = sa.text("finished_at IS NULL")


def upgrade() -> None:
    op.add_column("users", sa.Column("max_jobs", sa.Integer(), nullable=True))
    op.add_column("users", sa.Column("daily_seconds", sa.Double(), nullable=True))
    op.create_index(
        "ix_jobs_under_way",
        "jobs",
        ["owner"],
        sqlite_where=UNFINISHED,
        postgresql_where=UNFINISHED,
    )
    op.create_index("ix_jobs_usage", "jobs", ["owner", "finished_at"])
    op.create_index("ix_jobs_pace", "jobs", ["queue", "finished_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_pace", "jobs")
    op.drop_index("ix_jobs_usage", "jobs")
    op.drop_index("ix_jobs_under_way", "jobs")
    op.drop_column("users", "daily_seconds")
    op.drop_column("users", "max_jobs")
