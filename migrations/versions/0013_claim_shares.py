"""Each job's part of the pass it shared: jobs that were claimed together are charged for it once."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # NULL, which stands for all of it: a worker of the release before claims without a word of shares.
    op.add_column("jobs", sa.Column("claim_share", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "claim_share")
