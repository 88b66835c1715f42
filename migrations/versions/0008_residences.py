"""Which worker holds, or is loading, which weights, and what that has cost."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "residences",
        sa.Column("revision", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("loaded", sa.Boolean(), nullable=False),
        sa.Column("claimed_at", sa.Double(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("revision", "owner", name="pk_residences"),
    )
    op.create_table(
        "model_costs",
        sa.Column("revision", sa.String(64), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("load_seconds", sa.Double(), nullable=True),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("revision", name="pk_model_costs"),
    )


def downgrade() -> None:
    op.drop_table("model_costs")
    op.drop_table("residences")
