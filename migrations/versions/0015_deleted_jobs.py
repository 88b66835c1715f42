"""What deleted jobs leave: results that may be needed no more, and seconds that a day's limit still counts."""

import sqlalchemy as sa
from alembic import op

from neural_mri.backing.database import MigrationBlocked

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "discards",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("work", sa.Uuid(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("manifest", sa.String(200), nullable=True),
        sa.Column("scan_key", sa.String(64), nullable=True),
        sa.Column("deleted_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_discards"),
    )
    op.create_index("ix_discards_deleted", "discards", ["deleted_at"])
    op.create_table(
        "spent",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_spent"),
    )
    op.create_index("ix_spent_usage", "spent", ["owner", "finished_at"])


def downgrade() -> None:
    # Somebody has deleted them, and nothing else knows of them: the older release would keep them for ever.
    left: int = op.get_bind().execute(sa.text("SELECT count(*) FROM discards")).scalar_one()
    if left:
        raise MigrationBlocked(
            f"results of {left} deleted jobs have not been taken away yet, and below revision {revision} nobody would: "
            "let the reaper go on for ten minutes, then go back; nothing was changed"
        )
    op.drop_index("ix_spent_usage", "spent")
    op.drop_table("spent")
    op.drop_index("ix_discards_deleted", "discards")
    op.drop_table("discards")
