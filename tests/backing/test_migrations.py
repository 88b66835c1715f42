import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select

from neural_mri.backing import database
from neural_mri.backing.database import MigrationBlocked
from neural_mri.backing.rows import JOBS, Base
from neural_mri.backing.settings import Settings
from tests.backing.making import on_postgresql

ROOT = Path(__file__).parents[2]


def _tables(settings: Settings) -> set[str]:
    engine = database.sync_engine(settings)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def _constraints(settings: Settings, table: str) -> set[str | None]:
    engine = database.sync_engine(settings)
    try:
        return {check["name"] for check in inspect(engine).get_check_constraints(table)}
    finally:
        engine.dispose()


def test_the_migrated_schema_is_the_one_the_code_declares(settings: Settings) -> None:
    engine = database.sync_engine(settings)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, Base.metadata) == []
    finally:
        engine.dispose()


def test_the_migrated_checks_are_the_ones_the_code_declares(
    settings: Settings, fresh: Settings
) -> None:
    engine = database.sync_engine(fresh)
    Base.metadata.create_all(engine)
    engine.dispose()
    assert _constraints(settings, "jobs") == _constraints(fresh, "jobs")
    assert len(_constraints(settings, "jobs")) == 6


def test_the_schema_goes_up_down_and_up_again(fresh: Settings) -> None:
    database.migrate(fresh)
    above = _tables(fresh)
    database.migrate(fresh, back_to="base")
    assert _tables(fresh) == {"alembic_version"}
    database.migrate(fresh)
    assert _tables(fresh) == above == {*Base.metadata.tables, "alembic_version"}


def test_migrating_a_current_schema_changes_nothing(settings: Settings) -> None:
    database.migrate(settings)
    assert _tables(settings) == {*Base.metadata.tables, "alembic_version"}


def test_processes_that_migrate_at_once_take_turns(fresh: Settings) -> None:
    environment = {**os.environ, **fresh.environment()}
    command = [sys.executable, "-m", "neural_mri.backing"]
    starting = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in starting] == [0, 0, 0]
    assert "jobs" in _tables(fresh)


@on_postgresql
def test_a_migration_does_not_wait_long_for_a_table_in_use(
    fresh: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "MIGRATION_LOCK_SECONDS", 0.2)
    database.migrate(fresh)
    sessions = database.sessions(fresh)
    with sessions.reading() as session:
        session.execute(select(JOBS))
        with pytest.raises(MigrationBlocked, match="migrate again") as caught:
            database.migrate(fresh, back_to="base")
    assert caught.value.status == 503
    assert "jobs" in _tables(fresh)
    database.migrate(fresh, back_to="base")
    assert "jobs" not in _tables(fresh)
    sessions.close()
