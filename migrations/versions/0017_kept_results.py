"""When a result is looked at that sessions kept: what none of them names any more is taken away."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "kept_results",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("due", sa.Double(), nullable=False),
        sa.Column("taken_at", sa.Double(), nullable=True),
    )
    op.create_index("ix_kept_results_due", "kept_results", ["due"])


def downgrade() -> None:
    op.drop_table("kept_results")
