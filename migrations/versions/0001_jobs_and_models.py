"""Jobs, the queues' virtual clocks, and the models that may be scanned.

States are written out: a migration says what was true when it was made, whatever the code says later.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

HELD = "state IN ('claimed', 'loading', 'running', 'storing')"
TERMINAL = "state IN ('cancelled', 'expired', 'failed', 'quarantined', 'succeeded')"
UNFINISHED = sa.text("finished_at IS NULL")
LEASED = sa.text("lease_owner IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("revision", sa.String(64), nullable=False),
        sa.Column("queue", sa.String(64), nullable=False),
        sa.Column("lane", sa.String(16), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Text(), nullable=True),
        sa.Column("operands", sa.Text(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("scan_key", sa.String(64), nullable=True),
        sa.Column("reusable", sa.Boolean(), nullable=False),
        sa.Column("batch_key", sa.String(120), nullable=False),
        sa.Column("virtual_start", sa.Double(), nullable=False),
        sa.Column("virtual_finish", sa.Double(), nullable=True),
        sa.Column("estimated_cost", sa.Double(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(200), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("deadline_seconds", sa.Double(), nullable=False),
        sa.Column("cached", sa.Boolean(), nullable=False),
        sa.Column("manifest", sa.String(200), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.CheckConstraint(f"(lease_owner IS NOT NULL) = ({HELD})", name="held_by_its_owner"),
        sa.CheckConstraint("(lease_owner IS NULL) = (lease_until IS NULL)", name="lease_is_whole"),
        sa.CheckConstraint(f"(finished_at IS NOT NULL) = ({TERMINAL})", name="ends_once"),
        sa.CheckConstraint("manifest IS NULL OR state = 'succeeded'", name="manifest_of_success"),
        sa.CheckConstraint(
            "state <> 'succeeded' OR kind <> 'scan' OR manifest IS NOT NULL",
            name="scan_success_has_manifest",
        ),
        sa.CheckConstraint("NOT (state = 'queued' AND cancel_requested)", name="queued_is_wanted"),
    )
    op.create_index(
        "ix_jobs_unfinished",
        "jobs",
        ["queue", "state", "virtual_start", "id"],
        sqlite_where=UNFINISHED,
        postgresql_where=UNFINISHED,
    )
    op.create_index(
        "ix_jobs_leased", "jobs", ["lease_owner"], sqlite_where=LEASED, postgresql_where=LEASED
    )
    op.create_index("ix_jobs_share", "jobs", ["queue", "owner", "virtual_finish"])
    op.create_index("ix_jobs_recent", "jobs", ["owner", "created_at"])
    op.create_index("ix_jobs_scan_key", "jobs", ["scan_key"])
    op.create_table(
        "queue_clocks",
        sa.Column("queue", sa.String(64), nullable=False),
        sa.Column("virtual_clock", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("queue", name="pk_queue_clocks"),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("revision", sa.String(64), nullable=False),
        sa.Column("tokenizer_digest", sa.String(64), nullable=False),
        sa.Column("architecture", sa.Text(), nullable=False),
        sa.Column("n_parameters", sa.BigInteger(), nullable=False),
        sa.Column("weights_bytes", sa.BigInteger(), nullable=False),
        sa.Column("quantization", sa.String(32), nullable=True),
        sa.Column("numerics", sa.Text(), nullable=False),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("registered_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_models"),
    )


def downgrade() -> None:
    op.drop_table("models")
    op.drop_table("queue_clocks")
    op.drop_table("jobs")
