"""Sessions and links in both databases."""

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import msgspec
import pytest
from sqlalchemy import select, update

from neural_mri.backing import access, kept_results, session_arrivals, session_revisions, shares
from neural_mri.backing import sessions as saved
from neural_mri.backing.database import Sessions
from neural_mri.backing.rows import SESSION_ARRIVALS, SESSIONS, SHARES
from neural_mri.backing.session_arrivals import Waiting
from neural_mri.backing.session_revisions import encode_document
from neural_mri.backing.sessions import Made
from neural_mri.contract.auth import Scope
from neural_mri.contract.problems import InvalidRequest, LimitReached
from neural_mri.contract.scans import ScanKind
from neural_mri.contract.sessions import (
    NewShare,
    Note,
    PreconditionFailed,
    SavedScan,
    SessionDocument,
    SessionView,
    UnknownRevision,
    UnknownSession,
)
from tests.backing.making import on_postgresql

PEPPER = b"pepper pepper pepper"
EMPTY = SessionDocument()


def scan(number: int, model: str = "tiny") -> SavedScan:
    return SavedScan(
        result=f"{number:064x}",
        scan_key=f"{number:064x}",
        kind=ScanKind.FMRI,
        model=model,
        revision="0" * 64,
        request={"prompt": f"The Eiffel Tower {number}"},
    )


@pytest.fixture(autouse=True)
def _kept(sessions: Sessions) -> None:
    """What scans have measured is there to be named."""
    sessions.write(kept_results.expect, [scan(number).result for number in range(1100)])


def made(
    sessions: Sessions, name: str = "Eiffel", document: SessionDocument = EMPTY, owner: str = "ada"
) -> SessionView:
    return sessions.write(saved.create, Made(owner, name, encode_document(document), owner))


def test_of_many_saves_over_one_revision_one_is_written(sessions: Sessions) -> None:
    view = made(sessions)

    def save(number: int) -> bool:
        document = msgspec.structs.replace(EMPTY, view={"layer": number})
        try:
            sessions.write(saved.save, view.id, document, over=view.head, author="ada")
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(save, range(12))) == 1
    after = sessions.read(saved.find, view.id)
    assert after is not None
    assert after.revision == 2
    with pytest.raises(PreconditionFailed) as refused:
        sessions.write(saved.save, view.id, EMPTY, over=view.head, author="ada")
    assert refused.value.members["head"] == after.head


def test_scans_added_at_once_are_all_there_in_one_chain(sessions: Sessions) -> None:
    view = made(sessions)

    def add(number: int) -> None:
        sessions.write(saved.append, view.id, scan(number), author=f"user {number}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(12)))
    opened = sessions.read(session_revisions.opened, view.id)
    document = session_revisions.decode_document(opened.document)
    assert {each.result for each in document.scans} == {scan(n).result for n in range(12)}
    listed = sessions.read(saved.revisions, view.id, limit=5)
    while len(listed) < 13:
        listed += sessions.read(saved.revisions, view.id, limit=5, before=listed[-1].number)
    assert [each.number for each in listed] == list(range(13, 0, -1))
    for newer, older in itertools.pairwise(listed):
        assert newer.parent == older.revision
    assert (listed[-1].parent, listed[-1].revision) == (None, view.head)
    again = sessions.write(saved.append, view.id, scan(3), author="ada")
    assert (again.is_new, again.view.revision) == (False, 13)


def test_every_revision_is_named_by_the_hash_of_its_bytes(sessions: Sessions) -> None:
    view = made(sessions, document=msgspec.structs.replace(EMPTY, scans=(scan(1),)))
    kept = msgspec.structs.replace(EMPTY, notes=(Note(text="a\0b"),))
    sessions.write(saved.save, view.id, kept, over=view.head, author="ada")
    for each in sessions.read(saved.revisions, view.id, limit=9):
        opened = sessions.read(session_revisions.opened, view.id, each.revision)
        assert hashlib.sha256(opened.document).hexdigest() == each.revision
    with pytest.raises(UnknownRevision):
        sessions.read(session_revisions.opened, view.id, "0" * 64)
    # What an earlier revision held is still held, and goes with the session.
    assert sessions.read(saved.holds, view.id, scan(1).result)
    fork = sessions.read(session_revisions.opened, view.id, view.head)
    sessions.write(saved.fork, fork, owner="bob", name=None, author="bob")
    assert sessions.write(saved.delete_session, view.id)
    assert not sessions.write(saved.delete_session, view.id)
    with pytest.raises(UnknownSession):
        sessions.write(saved.append, view.id, scan(2), author="ada")


def test_pages_leave_out_nothing_and_tell_nothing_twice(sessions: Sessions) -> None:
    views = [made(sessions, f"n{number}") for number in range(7)]
    made(sessions, "theirs", owner="bob")
    sessions.write(saved.change, views[2].id, pinned=True)
    with sessions.writing() as session:
        # Saved in one moment: ids decide.
        session.execute(update(SESSIONS).where(SESSIONS.c.owner == "ada").values(updated_at=5.25))
    seen: list[str] = []
    after = None
    while True:
        page = sessions.read(saved.page, "ada", limit=2, after=after)
        seen += [view.name for view in page.sessions]
        after = page.next
        if after is None:
            break
    assert seen == ["n2", "n6", "n5", "n4", "n3", "n1", "n0"]
    for wrong in ("", "1_2", "x_1.0_" + str(views[0].id), f"1_y_{views[0].id}", "1_1.0_z"):
        with pytest.raises(InvalidRequest, match="expected"):
            sessions.read(saved.page, "ada", limit=2, after=wrong)


def test_words_and_models_are_found_and_wildcards_are_only_letters(sessions: Sessions) -> None:
    made(sessions, "Größe", msgspec.structs.replace(EMPTY, scans=(scan(1, "gpt2"),)))
    made(sessions, "50% off_", msgspec.structs.replace(EMPTY, scans=(scan(2, "gpt2-medium"),)))

    def found(query: str = "", model: str | None = None) -> list[str]:
        page = sessions.read(saved.page, "ada", limit=9, query=query, model=model)
        return [view.name for view in page.sessions]

    assert found("GRÖSSE") == ["Größe"]
    assert found("eiffel 1") == ["Größe"]
    assert found("50%") == found("f_") == ["50% off_"]
    assert found("5%0") == found("g_") == []
    assert found(model="gpt2") == ["Größe"]
    assert found(model="GPT2") == []
    sessions.write(saved.change, sessions.read(saved.page, "ada", limit=1).sessions[0].id, name="x")
    assert found("50%") == []
    assert found("tower medium") == ["x"]


def test_a_scan_on_its_way_is_waited_for_once(sessions: Sessions) -> None:
    view = made(sessions)
    waiting = Waiting(view.id, UUID(int=7), "ada", "mine")
    for _ in range(2):
        sessions.write(session_arrivals.add, waiting)
    assert sessions.read(session_arrivals.of_session, view.id) == [waiting]
    with ThreadPoolExecutor(4) as pool:
        settled = list(
            pool.map(lambda _: sessions.write(session_arrivals.settle, waiting, scan(1)), range(4))
        )
    assert [each.is_ours for each in settled].count(True) == 1
    assert sessions.read(session_arrivals.of_session, view.id) == []
    assert sessions.read(session_revisions.opened, view.id).view.scans == 1


def test_scans_on_their_way_have_a_place_kept_for_them(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (session_arrivals, session_revisions):
        monkeypatch.setattr(room, "MOST_SCANS", 3)
    view = made(sessions)
    sessions.write(saved.append, view.id, scan(1), author="ada")
    coming = [Waiting(view.id, UUID(int=number), "ada", "") for number in (7, 8)]

    def add(waiting: Waiting) -> bool:
        try:
            sessions.write(session_arrivals.add, waiting)
        except LimitReached:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        crowd = [Waiting(view.id, UUID(int=number), "bob", "") for number in range(11, 15)]
        assert sum(pool.map(add, crowd)) == 2, "of many at once none slips through"
    [first, second] = sessions.read(session_arrivals.of_session, view.id)
    assert add(first), "it is noted already"
    with pytest.raises(LimitReached, match="holds 1 scans, and 2 are on their way"):
        sessions.write(saved.append, view.id, scan(2), author="ada")
    assert sessions.write(session_arrivals.settle, first, scan(2)).saved is not None
    sessions.write(session_arrivals.settle, second, None)
    assert [add(waiting) for waiting in coming] == [True, False]


def test_what_finds_no_place_in_the_end_says_why_for_a_day(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (session_arrivals, session_revisions):
        monkeypatch.setattr(room, "MOST_SCANS", 1)
    view = made(sessions)
    late, other = (Waiting(view.id, UUID(int=number), "ada", "late") for number in (7, 8))
    sessions.write(session_arrivals.add, late)
    head = sessions.read(session_revisions.opened, view.id).view.head
    full = msgspec.structs.replace(EMPTY, scans=(scan(1),))
    sessions.write(saved.save, view.id, full, over=head, author="ada")
    settled = sessions.write(session_arrivals.settle, late, scan(2))
    assert settled.problem is not None
    assert settled.problem["limit"] == 1
    assert sessions.read(session_arrivals.of_session, view.id) == [
        late._replace(problem=settled.problem)
    ]
    assert sessions.read(session_arrivals.arrived, "ada") == [], "it is seen to"
    assert not sessions.write(session_arrivals.settle, late, scan(2)).is_ours
    with sessions.writing() as session:
        session.execute(update(SESSION_ARRIVALS).values(created_at=1.0))
    assert sessions.read(session_arrivals.of_session, view.id) == []
    emptied = sessions.read(session_revisions.opened, view.id).view.head
    sessions.write(saved.save, view.id, EMPTY, over=emptied, author="ada")
    sessions.write(session_arrivals.add, other)
    sessions.write(session_arrivals.settle, other, None, {"detail": "gone"})
    with sessions.reading() as session:
        kept = session.execute(select(SESSION_ARRIVALS.c.job_id)).scalars().all()
    assert kept == [other.job_id], "what is told no more is kept no longer"


def test_what_joins_after_all_is_told_as_refused_no_more(sessions: Sessions) -> None:
    view = made(sessions)
    late, other = (Waiting(view.id, UUID(int=number), "ada", "") for number in (7, 8))
    for waiting in (late, other):
        sessions.write(session_arrivals.add, waiting)
        sessions.write(session_arrivals.settle, waiting, None, {"detail": "full"})
    sessions.write(saved.append, view.id, scan(1), author="ada", job_id=late.job_id)
    assert [left.job_id for left in sessions.read(session_arrivals.of_session, view.id)] == [
        other.job_id
    ]
    again = sessions.write(saved.append, view.id, scan(1), author="ada", job_id=other.job_id)
    assert not again.is_new
    assert sessions.read(session_arrivals.of_session, view.id) == []


def test_a_save_over_whatever_is_there_is_one_whatever_has_arrived_meanwhile(
    sessions: Sessions,
) -> None:
    view = made(sessions)
    sessions.write(saved.append, view.id, scan(1), author="bob")
    noted = msgspec.structs.replace(EMPTY, notes=(Note(text="mine"),))
    after = sessions.write(saved.save, view.id, noted, over=None, author="ada")
    assert (after.view.revision, after.view.scans) == (3, 0)


def latest(sessions: Sessions, session_id: UUID) -> SessionDocument:
    return session_revisions.decode_document(
        sessions.read(session_revisions.opened, session_id).document
    )


def test_a_scan_that_has_come_meanwhile_stands_in_no_saves_way(sessions: Sessions) -> None:
    held = msgspec.structs.replace(EMPTY, scans=(scan(1), scan(2)))
    view = made(sessions, document=held)
    for number in (3, 4):
        sessions.write(saved.append, view.id, scan(number), author="bob")
    # Who knows of none of them takes one away, puts another first, and notes something.
    mine = msgspec.structs.replace(EMPTY, scans=(scan(4), scan(2)), notes=(Note(text="mine"),))
    after = sessions.write(saved.save, view.id, mine, over=view.head, author="ada")
    assert after.view.revision == 4
    document = latest(sessions, view.id)
    assert document.scans == (scan(4), scan(2), scan(3)), "each once, and what has come behind"
    assert document.notes == mine.notes
    assert document.parent != view.head, "it was saved over the latest"


def test_a_save_that_changes_nothing_writes_nothing_though_scans_have_come(
    sessions: Sessions,
) -> None:
    view = made(sessions)
    added = sessions.write(saved.append, view.id, scan(1), author="bob")
    after = sessions.write(saved.save, view.id, EMPTY, over=view.head, author="ada")
    assert (after.is_new, after.view.head) == (False, added.view.head)


def test_what_somebody_has_edited_stands_in_a_saves_way_whatever_has_come(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = made(sessions, document=msgspec.structs.replace(EMPTY, scans=(scan(1),)))
    mine = msgspec.structs.replace(EMPTY, scans=(scan(1),), notes=(Note(text="mine"),))
    added = sessions.write(saved.append, view.id, scan(2), author="bob")
    with monkeypatch.context() as patch:
        patch.setattr(saved, "MOST_SCANS", 1)
        with pytest.raises(PreconditionFailed):  # there is no room for what has come
            sessions.write(saved.save, view.id, mine, over=view.head, author="ada")
    theirs = latest(sessions, view.id)
    for edited in (
        msgspec.structs.replace(theirs, notes=(Note(text="theirs"),)),
        msgspec.structs.replace(theirs, scans=theirs.scans[::-1]),
        msgspec.structs.replace(theirs, scans=(msgspec.structs.replace(scan(1), label="x"),)),
        msgspec.structs.replace(theirs, scans=()),
    ):
        sessions.write(saved.save, view.id, edited, over=None, author="bob")
        for over in (view.head, added.view.head, "0" * 64):
            with pytest.raises(PreconditionFailed):
                sessions.write(saved.save, view.id, mine, over=over, author="ada")
    assert latest(sessions, view.id).notes == ()


@on_postgresql
def test_a_session_that_somebody_adds_to_can_be_deleted(sessions: Sessions) -> None:
    view = made(sessions)
    with ThreadPoolExecutor(1) as pool, sessions.writing() as session:
        saved.append(session, view.id, scan(1), author="bob")
        shares.create(session, PEPPER, view.id, NewShare())
        deleting = pool.submit(sessions.write, saved.delete_session, view.id)
        with pytest.raises(TimeoutError):
            deleting.result(0.5)
        session.commit()
        assert deleting.result(10)
    assert sessions.read(saved.find, view.id) is None
    with pytest.raises(UnknownSession):
        sessions.write(shares.create, PEPPER, view.id, NewShare())


def test_nobody_has_sessions_or_links_without_end(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "MOST_SESSIONS", 2)
    monkeypatch.setattr(shares, "MOST_SHARES", 2)
    view = made(sessions)
    made(sessions)
    with pytest.raises(LimitReached, match="delete some"):
        made(sessions)

    def makes(_: int) -> bool:
        try:
            made(sessions, owner="bob")
        except LimitReached:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(makes, range(8))) == 2, "of many at once none slips through"
    links = [sessions.write(shares.create, PEPPER, view.id, NewShare()) for _ in range(2)]
    with pytest.raises(LimitReached, match="revoke some"):
        sessions.write(shares.create, PEPPER, view.id, NewShare())
    sessions.write(shares.revoke, view.id, links[0].id)
    sessions.write(shares.create, PEPPER, view.id, NewShare())


@pytest.mark.parametrize("what", ["links", "keys"])
def test_of_many_made_at_once_none_is_one_too_many(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(shares, "MOST_SHARES", 2)
    monkeypatch.setattr(access, "MOST_KEYS", 2)
    view = made(sessions)

    def make(_number: int) -> bool:
        try:
            if what == "links":
                sessions.write(shares.create, PEPPER, view.id, NewShare())
            else:
                sessions.write(access.create_key, PEPPER, user="ada", scopes=(Scope.SCAN_READ,))
        except LimitReached:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(make, range(12))) == 2


def test_a_link_is_followed_while_it_is_good_by_who_has_its_token(sessions: Sessions) -> None:
    view, other = made(sessions), made(sessions)
    wanted = NewShare(label="Grace", expires_in_seconds=60)
    link = sessions.write(shares.create, PEPPER, view.id, wanted)
    assert link.token not in repr(link)
    found = sessions.read(shares.followed, PEPPER, link.token)
    assert found is not None
    assert (found.id, found.session, found.label) == (link.id, view.id, "Grace")
    assert sessions.read(shares.followed, b"another pepper", link.token) is None
    # Its first letter: of the last, two bits count, and one in four is another way to write the same.
    other_token = ("B" if link.token[0] == "A" else "A") + link.token[1:]
    assert sessions.read(shares.followed, PEPPER, other_token) is None
    assert sessions.write(shares.revoke, other.id, link.id) is None, "another session's link"
    with sessions.writing() as session:
        session.execute(update(SHARES).values(expires_at=1.0))
    assert sessions.read(shares.followed, PEPPER, link.token) is None
    lasting = sessions.write(shares.create, PEPPER, view.id, NewShare())
    sessions.write(shares.revoke, view.id, lasting.id)
    assert sessions.read(shares.followed, PEPPER, lasting.token) is None
    listed = sessions.read(shares.of_session, view.id)
    assert [each.revoked_at is None for each in listed] == [False, True]
