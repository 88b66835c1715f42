"""Results that sessions keep: noted before they are there, and looked at once no session may need them."""

from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from neural_mri.backing import kept_results
from neural_mri.backing import sessions as saved
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.kept_results import Due
from neural_mri.backing.rows import KEPT_RESULTS
from neural_mri.backing.session_revisions import encode_document
from neural_mri.backing.sessions import Made
from neural_mri.contract.scans import ScanKind
from neural_mri.contract.sessions import SavedScan, SessionDocument

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


def pass_by(database: Sessions) -> None:
    with database.writing() as session:
        session.execute(update(KEPT_RESULTS).values(due=0.0))


def test_what_only_a_deleted_session_named_is_nobodys(sessions: Sessions) -> None:
    first = keeping(sessions, *DIGESTS[:2])
    keeping(sessions, *DIGESTS[1:])
    assert noted(sessions) == {}
    assert sessions.write(delete, first)
    assert noted(sessions) == pytest.approx(
        dict.fromkeys(DIGESTS[:2], kept_results.LINGER_SECONDS), abs=60
    )
    assert sessions.write(kept_results.due) == []
    pass_by(sessions)
    found = sessions.write(kept_results.due)
    assert sorted(found) == [Due(DIGESTS[0], is_needed=False), Due(DIGESTS[1], is_needed=True)]
    sessions.write(kept_results.settle, [each.digest for each in found])
    assert noted(sessions) == {}


def delete(session: Session, session_id: UUID) -> bool:
    return saved.delete_session(session, session_id)


def test_who_comes_to_keep_the_same_has_it_looked_at_later(sessions: Sessions) -> None:
    only = keeping(sessions, DIGESTS[0])
    sessions.write(kept_results.expect, DIGESTS[:2])
    sessions.write(delete, only)
    assert noted(sessions) == pytest.approx(
        dict.fromkeys(DIGESTS[:2], kept_results.EXPECTED_SECONDS), abs=60
    )


def test_a_note_of_a_clock_that_was_wrong_is_due(sessions: Sessions) -> None:
    sessions.write(kept_results.expect, DIGESTS[:1])
    with sessions.writing() as session:
        session.execute(update(KEPT_RESULTS).values(due=1e12))
    assert sessions.write(kept_results.due) == [Due(DIGESTS[0], is_needed=False)]


def test_who_comes_to_keep_what_is_taken_away_just_now_waits_for_it(sessions: Sessions) -> None:
    """And nobody else takes it away meanwhile."""
    sessions.write(kept_results.expect, DIGESTS)
    pass_by(sessions)
    with ThreadPoolExecutor(1) as pool, sessions.writing() as session:
        found = kept_results.due(session, most=2)
        assert len(found) == 2
        coming = pool.submit(sessions.write, kept_results.expect, DIGESTS)
        with pytest.raises(TimeoutError):
            coming.result(0.5)
        kept_results.settle(session, [each.digest for each in found])
        session.commit()
        coming.result(10)
    assert noted(sessions).keys() == set(DIGESTS), "it is there anew, and noted"
    assert sessions.write(kept_results.due) == []
