import multiprocessing
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect

from neural_mri.backing import database
from neural_mri.backing.rows import Base
from neural_mri.backing.settings import Settings


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
    settings: Settings, tmp_path: Path
) -> None:
    declared = Settings(data_dir=tmp_path / "declared")
    engine = database.sync_engine(declared)
    Base.metadata.create_all(engine)
    engine.dispose()
    assert _constraints(settings, "jobs") == _constraints(declared, "jobs")
    assert len(_constraints(settings, "jobs")) == 6


def test_the_schema_goes_up_down_and_up_again(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    database.migrate(settings)
    above = _tables(settings)
    database.migrate(settings, back_to="base")
    assert _tables(settings) == {"alembic_version"}
    database.migrate(settings)
    assert _tables(settings) == above == {*Base.metadata.tables, "alembic_version"}


def test_migrating_a_current_schema_changes_nothing(settings: Settings) -> None:
    database.migrate(settings)
    assert _tables(settings) == {*Base.metadata.tables, "alembic_version"}


def _migrate(folder: str) -> None:
    database.migrate(Settings(data_dir=Path(folder)))


def test_processes_that_migrate_at_once_take_turns(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    starting = [spawn.Process(target=_migrate, args=(str(tmp_path),)) for _ in range(3)]
    for process in starting:
        process.start()
    for process in starting:
        process.join(30)
    assert [process.exitcode for process in starting] == [0, 0, 0]
    assert "jobs" in _tables(Settings(data_dir=tmp_path))
