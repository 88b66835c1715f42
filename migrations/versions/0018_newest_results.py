"""The newest job of a scan key is an index's last entry, however many have been answered with its result."""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_results", "jobs", ["scan_key", "finished_at"])
    op.drop_index("ix_jobs_scan_key", "jobs")


def downgrade() -> None:
    op.create_index("ix_jobs_scan_key", "jobs", ["scan_key"])
    op.drop_index("ix_jobs_results", "jobs")
