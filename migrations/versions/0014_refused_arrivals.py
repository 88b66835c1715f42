"""Why a scan that was on its way into a session has not joined it."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("session_arrivals", sa.Column("problem", sa.Text(), nullable=True))


def downgrade() -> None:
    op.execute("DELETE FROM session_arrivals WHERE problem IS NOT NULL")
    op.drop_column("session_arrivals", "problem")
