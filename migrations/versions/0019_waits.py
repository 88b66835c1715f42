"""Since when a job waits that was taken before, or that followed another: one nobody takes is given up by that."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # NULL, which stands for since it was made: the release before sends jobs back without a word of it.
    op.add_column("jobs", sa.Column("waiting_since", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "waiting_since")
