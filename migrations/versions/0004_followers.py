"""Jobs that follow an equal one under way instead of running themselves."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

FOLLOWING = sa.text("leader IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("leader", sa.Uuid(), nullable=True))
    op.create_index(
        "ix_jobs_followers", "jobs", ["leader"], sqlite_where=FOLLOWING, postgresql_where=FOLLOWING
    )


def downgrade() -> None:
    # Who followed waits for a turn of their own from then on.
    op.drop_index("ix_jobs_followers", "jobs")
    op.drop_column("jobs", "leader")
