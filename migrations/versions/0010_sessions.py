"""Saved sessions: their revisions, the results they keep, scans they wait for, and links that share them."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("head", sa.String(64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("scans", sa.Integer(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("words", sa.Text(), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("forked_from", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_recent", "sessions", ["owner", "updated_at", "id"])
    op.create_table(
        "session_revisions",
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("author", sa.String(200), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "number", name="pk_session_revisions"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_session_revisions_session_id_sessions"
        ),
    )
    op.create_index("ix_session_revisions_digest", "session_revisions", ["session_id", "digest"])
    op.create_table(
        "session_results",
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "digest", name="pk_session_results"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_session_results_session_id_sessions"
        ),
    )
    op.create_index("ix_session_results_digest", "session_results", ["digest"])
    op.create_table(
        "session_arrivals",
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("author", sa.String(200), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "job_id", name="pk_session_arrivals"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_session_arrivals_session_id_sessions"
        ),
    )
    op.create_table(
        "shares",
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("access", sa.String(16), nullable=False),
        sa.Column("redacted", sa.Boolean(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_shares"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_shares_session_id_sessions"
        ),
    )
    op.create_index("ix_shares_digest", "shares", ["digest"], unique=True)
    op.create_index("ix_shares_session", "shares", ["session_id"])


def downgrade() -> None:
    op.drop_table("shares")
    op.drop_table("session_arrivals")
    op.drop_table("session_results")
    op.drop_table("session_revisions")
    op.drop_table("sessions")
