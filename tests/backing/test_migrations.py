import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Column,
    Connection,
    MetaData,
    String,
    Table,
    func,
    insert,
    inspect,
    select,
    update,
)

from neural_mri.backing import batches, database, deletion, feeding, jobs
from neural_mri.backing.batches import Line, NewBatch
from neural_mri.backing.database import MigrationBlocked
from neural_mri.backing.jobs import LeaseOwner
from neural_mri.backing.rows import BATCH_LINES, JOBS, Base
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState, Lane
from tests.backing.making import on_postgresql, submission

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


def test_lines_that_wait_are_told_apart_by_the_queues_they_wait_for(fresh: Settings) -> None:
    database.migrate(fresh)
    database.migrate(fresh, back_to="0015")
    engine = database.sync_engine(fresh)
    known = MetaData()
    known.reflect(engine)
    lines = known.tables["batch_lines"]
    is_text = lines.c.batch_id.type.python_type is str
    batch_id = UUID(int=1).hex if is_text else UUID(int=1)
    with engine.begin() as connection:
        batch = {**_sample(known.tables["batches"]), "id": batch_id, "lane": "batch"}
        connection.execute(insert(known.tables["batches"]), batch)
        for number, wanted in enumerate((None, '{"owner":"ada","queue":"scan.a"}'), 1):
            row = {"batch_id": batch_id, "line": number, "wanted": wanted}
            connection.execute(insert(lines), row)
    engine.dispose()
    database.migrate(fresh)
    with engine.connect() as connection:
        found = connection.execute(select(BATCH_LINES.c.queue).order_by(BATCH_LINES.c.line))
        assert found.scalars().all() == [None, "scan.a"]
    engine.dispose()


def _as_released(settings: Settings) -> MetaData:
    """The tables of the schema before the newest, as a process of that release knows them."""
    scripts = ScriptDirectory(str(ROOT / "migrations"))
    before = scripts.get_revision("head").down_revision
    assert isinstance(before, str)
    database.migrate(settings)
    database.migrate(settings, back_to=before)
    known = MetaData()
    engine = database.sync_engine(settings)
    try:
        known.reflect(engine)
    finally:
        engine.dispose()
    return known


def _sample(table: Table) -> dict[str, object]:
    """A row that names every column a release knows, which no default of a newer schema fills in."""
    named = {"state": "queued", "kind": "scan", "lane": "interactive", "action": "login"}
    values: dict[str, object] = {}
    for column in table.columns:
        if column.nullable:
            values[column.name] = None
            continue
        kind = column.type.python_type
        values[column.name] = named.get(column.name, UUID(int=1) if kind is UUID else kind())
    return values


def _job_of_the_release(connection: Connection, jobs: Table) -> None:
    """A job's whole life, by statements that write and read back every column the release knows."""
    made = connection.execute(insert(jobs).values(_sample(jobs)).returning(*jobs.c)).one()
    mine = jobs.c.id == made.id
    held = {"attempt": 1, "lease_owner": "host:1:2", "lease_until": 60.0, "started_at": 1.0}
    ended = {"lease_owner": None, "lease_until": None, "finished_at": 2.0, "manifest": "a/b"}
    for state, values in (
        (JobState.CLAIMED, held),
        (JobState.RUNNING, {}),
        (JobState.QUEUED, {"lease_owner": None, "lease_until": None}),
        (JobState.CLAIMED, {**held, "attempt": 2}),
        (JobState.STORING, {}),
        (JobState.SUCCEEDED, ended),
    ):
        moved = connection.execute(
            update(jobs).where(mine).values(state=state.value, **values).returning(*jobs.c)
        ).one()
        assert moved.state == state.value


def test_the_release_before_works_on_the_newest_schema(fresh: Settings) -> None:
    """Who migrates first and restarts processes one by one has old ones on the new schema."""
    released = _as_released(fresh)
    database.migrate(fresh)
    engine = database.sync_engine(fresh)
    try:
        with engine.execution_options(writing=True).begin() as connection:
            for table in released.sorted_tables:
                if table.name == "alembic_version":
                    continue
                if table.name == "jobs":
                    _job_of_the_release(connection, table)
                else:
                    connection.execute(insert(table).values(_sample(table)).returning(*table.c))
                assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 1
    finally:
        engine.dispose()


def test_a_release_that_comes_back_leaves_a_later_ones_schema_as_it_is(fresh: Settings) -> None:
    database.migrate(fresh)
    assert database.migrate(fresh) is None
    later = Table("alembic_version", MetaData(), Column("version_num", String(32)))
    engine = database.sync_engine(fresh)
    try:
        with engine.execution_options(writing=True).begin() as connection:
            connection.execute(update(later).values(version_num="9001"))
        assert database.migrate(fresh) == "9001"
        environment = {**os.environ, **fresh.environment()}
        command = [sys.executable, "-m", "neural_mri.backing"]
        again = subprocess.run(
            command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True
        )
        assert (again.returncode, "schema_is_newer" in again.stdout + again.stderr) == (0, True)
        with engine.connect() as connection:
            assert connection.execute(select(later.c.version_num)).scalar_one() == "9001"
            assert set(inspect(connection).get_table_names()) > set(Base.metadata.tables)
    finally:
        engine.dispose()


def test_a_schema_does_not_go_back_over_lines_that_somebody_waits_for(fresh: Settings) -> None:
    database.migrate(fresh)
    sessions = database.sessions(fresh)
    wanted = NewBatch("ada", "", Lane.BATCH, 2, "0" * 64, word="nightly")
    lines = [Line(number, submission()) for number in (1, 2)]
    with sessions.writing() as session:
        batches.fill(session, batches.begin(session, wanted).id, lines)
    with pytest.raises(MigrationBlocked, match=r"2 lines of batches wait .* 0013 would drop them"):
        database.migrate(fresh, back_to="0013")
    assert sessions.read(feeding.owners_waiting) == ["ada"], "nothing was changed"
    sessions.write(feeding.feed, "ada", max_queued=99)
    sessions.close()
    database.migrate(fresh, back_to="0013")
    database.migrate(fresh)


def test_a_schema_does_not_go_back_over_results_that_are_still_to_be_taken_away(
    fresh: Settings,
) -> None:
    database.migrate(fresh)
    sessions = database.sessions(fresh)
    owner = LeaseOwner("another-host", 4242, 99)
    job = sessions.write(jobs.submit, submission())
    sessions.write(jobs.claim, queue=job.queue, owner=owner, limit=1, lease_seconds=60.0)
    sessions.write(jobs.advance, job.id, JobState.CANCELLED, attempt=1)
    sessions.write(deletion.delete_job, job.id)
    with pytest.raises(MigrationBlocked, match=r"results of 1 deleted jobs"):
        database.migrate(fresh, back_to="0014")
    [left] = sessions.read(deletion.discarded, older_seconds=-1.0)
    sessions.write(deletion.settle, [left.id])
    sessions.close()
    database.migrate(fresh, back_to="0014")
    database.migrate(fresh)


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
