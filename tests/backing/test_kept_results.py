"""Results that sessions keep: noted before they are there, and looked at once no session may need them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from uuid import UUID

import pytest
from sqlalchemy import delete as remove
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from neural_mri.backing import kept_results, session_revisions
from neural_mri.backing import sessions as saved
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.rows import KEPT_RESULTS, SESSION_RESULTS
from neural_mri.backing.session_revisions import encode_document
from neural_mri.backing.sessions import Made
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.scans import ScanKind
from neural_mri.contract.sessions import SavedScan, SessionDocument, SessionView

DIGESTS = tuple(f"{number:064x}" for number in range(3))


def scan(digest: str) -> SavedScan:
    return SavedScan(
        result=digest,
        scan_key=digest,
        kind=ScanKind.FMRI,
        model="tiny",
        revision="a" * 64,
        request={},
    )


def keeping(database: Sessions, *digests: str) -> UUID:
    document = encode_document(SessionDocument(scans=tuple(map(scan, digests))))
    return database.write(saved.create, Made("ada", "Eiffel", document, "ada")).id


def noted(database: Sessions) -> dict[str, float]:
    """Notes, and how many seconds from now each is due."""
    with database.writing() as session:
        now = session.execute(select(epoch())).scalar_one()
        rows = session.execute(select(KEPT_RESULTS.c.digest, KEPT_RESULTS.c.due))
        return {row.digest: row.due - now for row in rows}


def pass_by(database: Sessions, **changes: float) -> None:
    with database.writing() as session:
        session.execute(update(KEPT_RESULTS).values(**(changes or {"due": 0.0})))


def taken(database: Sessions) -> list[str]:
    return database.write(kept_results.take, most=9)


def test_what_only_a_deleted_session_named_is_taken_away(sessions: Sessions) -> None:
    sessions.write(kept_results.expect, DIGESTS)
    first = keeping(sessions, *DIGESTS[:2])
    keeping(sessions, *DIGESTS[1:])
    pass_by(sessions)
    assert taken(sessions) == []
    assert noted(sessions) == {}, "all are needed"
    assert sessions.write(delete, first)
    assert noted(sessions) == pytest.approx(
        dict.fromkeys(DIGESTS[:2], kept_results.LINGER_SECONDS), abs=60
    )
    assert taken(sessions) == [], "somebody may be reading it"
    pass_by(sessions)
    assert taken(sessions) == [DIGESTS[0]]
    assert taken(sessions) == [], "it is somebody's already"
    sessions.write(kept_results.settle, [DIGESTS[0]])
    assert noted(sessions) == {}


def delete(session: Session, session_id: UUID) -> bool:
    return saved.delete_session(session, session_id)


def test_who_comes_to_keep_the_same_has_it_looked_at_later(sessions: Sessions) -> None:
    sessions.write(kept_results.expect, DIGESTS[:2])
    only = keeping(sessions, DIGESTS[0])
    sessions.write(delete, only)
    assert noted(sessions) == pytest.approx(
        dict.fromkeys(DIGESTS[:2], kept_results.EXPECTED_SECONDS), abs=60
    )


@pytest.mark.parametrize("column", ["due", "taken_at"])
def test_a_note_of_a_clock_that_was_wrong_is_due(sessions: Sessions, column: str) -> None:
    sessions.write(kept_results.expect, DIGESTS[:1])
    pass_by(sessions, **{column: 1e12})
    assert taken(sessions) == [DIGESTS[0]]


def test_what_is_being_taken_away_can_be_neither_kept_nor_named(sessions: Sessions) -> None:
    sessions.write(kept_results.expect, DIGESTS)
    pass_by(sessions)
    assert sessions.write(kept_results.take, most=1) == [DIGESTS[0]]
    for keep in (lambda: keeping(sessions, *DIGESTS), lambda: expect(sessions, *DIGESTS)):
        with pytest.raises(Unavailable, match=f"{DIGESTS[0]} was no session's any more"):
            keep()
    keeping(sessions, *DIGESTS[1:])
    # Whoever took it away has died.
    pass_by(sessions, taken_at=0.0)
    assert taken(sessions) == [DIGESTS[0]]
    sessions.write(kept_results.settle, DIGESTS[:1])
    with pytest.raises(Unavailable):
        keeping(sessions, DIGESTS[0])  # its bytes were put there before
    expect(sessions, *DIGESTS)
    keeping(sessions, *DIGESTS)


def expect(database: Sessions, *digests: str) -> None:
    database.write(kept_results.expect, digests)


def test_a_session_that_was_read_before_all_it_holds_was_taken_away_is_not_forked(
    sessions: Sessions,
) -> None:
    expect(sessions, DIGESTS[0])
    only = keeping(sessions, DIGESTS[0])
    read = sessions.read(session_revisions.opened, only)
    sessions.write(delete, only)

    def fork() -> SessionView:
        return sessions.write(saved.fork, read, owner="bob", name=None, author="bob")

    assert fork().scans == 1, "as long as it is noted"
    pass_by(sessions)
    assert taken(sessions) == []
    sessions.write(delete, fork().id)
    with sessions.writing() as session:
        session.execute(remove(SESSION_RESULTS))
    pass_by(sessions)
    assert taken(sessions) == [DIGESTS[0]]
    sessions.write(kept_results.settle, DIGESTS[:1])
    with pytest.raises(Unavailable):
        fork()


def test_while_a_session_comes_to_name_it_nobody_takes_it_away(sessions: Sessions) -> None:
    expect(sessions, *DIGESTS)
    pass_by(sessions)
    document = encode_document(SessionDocument(scans=(scan(DIGESTS[0]),)))
    with ThreadPoolExecutor(1) as pool, sessions.writing() as session:
        saved.create(session, Made("ada", "Eiffel", document, "ada"))
        taking = pool.submit(taken, sessions)
        with suppress(TimeoutError):
            assert DIGESTS[0] not in taking.result(0.5), "on PostgreSQL others are gone on with"
        session.commit()
        assert DIGESTS[0] not in taking.result(10)
    assert DIGESTS[0] not in taken(sessions)
