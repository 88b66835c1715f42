"""Run by Alembic. The connection, inside an open transaction, comes from `backing.database.migrate`."""

from alembic import context

from neural_mri.backing.rows import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite alters a table by building it anew; that, too, belongs into the one transaction.
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
