"""A prepared statement gives what SQLAlchemy gives, on either database."""

from typing import Any

import pytest
from sqlalchemy import Select, UpdateBase, bindparam, func, select, update
from sqlalchemy.exc import IntegrityError, MultipleResultsFound, NoResultFound
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, statements
from neural_mri.backing.database import Sessions
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.records import new_id
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import JobState
from tests.backing.making import submission

_job = JOBS.c
_OF_OWNER = select(*_job).where(_job.owner == bindparam("who")).order_by(_job.id)


def _by_sqlalchemy(
    session: Session, statement: Select[Any] | UpdateBase, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = session.connection().execute(statement, parameters)
    return [dict(zip(rows.keys(), row, strict=True)) for row in rows]


def _prepared(
    session: Session, statement: Select[Any] | UpdateBase, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    return [row._asdict() for row in Prepared(statement).run(session, parameters)]


def test_every_value_of_a_row_is_the_one_that_sqlalchemy_gives(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission(owner="ada"))
    waiting = sessions.write(jobs.submit, submission(owner="ada"))
    sessions.write(
        jobs.claim, queue=waiting.queue, owner=LeaseOwner.here(), limit=1, lease_seconds=9
    )

    with sessions.reading() as session:
        expected = _by_sqlalchemy(session, _OF_OWNER, {"who": "ada"})
        found = _prepared(session, _OF_OWNER, {"who": "ada"})

    assert {row["state"] for row in expected} == {JobState.QUEUED, JobState.CLAIMED}
    assert [list(row.items()) for row in found] == [list(row.items()) for row in expected]
    assert [list(map(type, row.values())) for row in found] == [
        list(map(type, row.values())) for row in expected
    ]


def test_lists_and_values_that_the_statement_itself_has_are_those_of_each_call(
    sessions: Sessions,
) -> None:
    first = sessions.write(jobs.submit, submission())
    second = sessions.write(jobs.submit, submission())
    cancelling = Prepared(
        update(JOBS)
        .where(_job.id == bindparam("which"), _job.state.in_({JobState.QUEUED, JobState.CLAIMED}))
        .values(state=JobState.CANCELLED, finished_at=7.5)
        .returning(_job.id, _job.state)
    )

    for job in (first, second):
        row = sessions.write(cancelling.run, {"which": job.id}).one()
        assert (row.id, row.state) == (job.id, JobState.CANCELLED)
        assert sessions.write(cancelling.run, {"which": job.id}).one_or_none() is None


def test_a_statement_whose_text_depends_on_its_parameters_is_refused(sessions: Sessions) -> None:
    among = select(_job.id).where(_job.owner.in_(bindparam("names", expanding=True)))
    with sessions.reading() as session:
        if session.get_bind().dialect.name != "sqlite":
            assert Prepared(among).run(session, {"names": ["ada"]}).all() == []
            return
        with pytest.raises(TypeError, match="depends on its parameters"):
            Prepared(among).run(session, {"names": ["ada"]})


def test_what_the_database_refuses_is_raised_as_sqlalchemy_raises_it_and_quotes_no_row(
    sessions: Sessions,
) -> None:
    job = sessions.write(jobs.submit, submission())
    # A job that is held has an owner.
    broken = Prepared(
        update(JOBS).where(_job.id == bindparam("which")).values(state=JobState.RUNNING)
    )
    with pytest.raises(IntegrityError) as caught:
        sessions.write(broken.run, {"which": job.id})
    assert str(job.id) not in str(caught.value)
    assert job.id.hex not in str(caught.value)
    found = sessions.read(jobs.get, job.id)
    assert found is not None
    assert found.state is JobState.QUEUED


def test_rows_are_asked_for_as_of_any_result(sessions: Sessions) -> None:
    everybody = Prepared(select(_job.owner).order_by(_job.owner))
    sessions.write(jobs.submit, submission(owner="ada"))
    with sessions.reading() as session:
        assert everybody.run(session, {}).scalar_one() == "ada"
    sessions.write(jobs.submit, submission(owner="bob"))
    with sessions.reading() as session:
        assert [row.owner for row in everybody.run(session, {})] == ["ada", "bob"]
        with pytest.raises(MultipleResultsFound):
            everybody.run(session, {}).one_or_none()
        with pytest.raises(NoResultFound):
            statements.GET.run(session, {"job_id": new_id()}).one()
        counted = Prepared(select(func.count()).select_from(JOBS))
        assert counted.run(session, {}).scalar_one() == 2
