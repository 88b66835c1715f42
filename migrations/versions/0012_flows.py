"""Where the last job ends of an owner and a lane: each lane is a flow of its own."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_flow", "jobs", ["queue", "owner", "lane", "virtual_finish"])
    op.drop_index("ix_jobs_share", "jobs")


def downgrade() -> None:
    op.create_index("ix_jobs_share", "jobs", ["queue", "owner", "virtual_finish"])
    op.drop_index("ix_jobs_flow", "jobs")
