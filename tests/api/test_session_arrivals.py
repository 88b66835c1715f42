"""Scans that join a session once they have succeeded, and who is told of them."""

from collections.abc import Callable
from types import ModuleType
from uuid import UUID

import httpx
import pytest

from api import session_contents, session_streams
from neural_mri.backing import keys, session_arrivals, session_revisions, sessions
from neural_mri.backing.events import parse_entries
from neural_mri.backing.records import Job
from neural_mri.contract.jobs import JobState
from tests.api.reading import Unanswered, follow
from tests.api.saved import Session, archived, made, read, save, scanned
from tests.api.world import World
from tests.servers import folder_only


def test_a_scan_under_way_arrives_before_everybodys_eyes(api: httpx.Client, world: World) -> None:
    session = made(api)
    with follow(api, f"{session.path}/events") as stream:
        first = next(stream)
        assert (first.name, first.data["revision"]) == ("saved", session.revision)
        job = api.post("/api/scan/activation", json={"prompt": "a"}).json()["id"]
        added = api.post(f"{session.path}/scans", json={"job": job, "label": "mine"})
        assert added.status_code == 202
        assert [each["job"] for each in added.json()["arriving"]] == [job]
        told = next(stream)
        assert (told.name, told.data["job"], told.data["label"]) == ("scan", job, "mine")
        world.perform(world.claim(world.queue()))
        messages = [next(stream)]
        while messages[-1].name != "saved":
            messages.append(next(stream))
        saved = messages[-1].data
        detail = read(api.get(session.path)).body
        assert saved["revision"] == detail["head"]
        assert saved["added"] == [detail["document"]["scans"][0]["result"]]
        assert detail["arriving"] == []
        # And of a save by anybody.
        read(save(api, read(api.get(session.path)), view={"layer": 3}))
        assert next(stream).data["number"] == 3
        api.delete(session.path)
        assert next(stream).name == "closed"
        assert list(stream) == []


@pytest.mark.parametrize("module", [sessions, session_arrivals], ids=lambda each: each.__name__)
def test_a_reader_of_its_events_outlives_a_database_that_does_not_answer(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    session = made(api)
    question = "find" if module is sessions else "of_session"
    monkeypatch.setattr(session_streams, "LOOK_SECONDS", 0.1)
    with follow(api, f"{session.path}/events") as stream:
        assert next(stream).name == "saved"
        away = Unanswered(monkeypatch, module, question)
        assert away.passes()
        read(save(api, session, view={"layer": 3}))
        assert next(stream).data["number"] == 2
        world.redis.flushall()
        api.delete(session.path)
        assert next(stream).name == "closed"


def test_a_scan_that_fails_on_its_way_is_told_of_and_forgotten(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    job = api.post("/api/scan/activation", json={"prompt": "a"}).json()["id"]
    api.post(f"{session.path}/scans", json={"job": job})
    with follow(api, f"{session.path}/events") as stream:
        heard = [next(stream), next(stream)]
        assert {message.name for message in heard} == {"saved", "scan"}
        world.move(world.claim(world.queue()), JobState.FAILED, problem={"detail": "no"})
        while (last := next(stream)).data.get("state") != "failed":
            assert last.name == "scan"
    assert api.get(session.path).json()["arriving"] == []
    assert api.get(session.path).json()["scans"] == 0


def coming(api: httpx.Client, world: World, session: Session, prompt: str = "a") -> Job:
    """A scan that has ended on its way into a session, which nobody has looked at since."""
    job = api.post("/api/scan/activation", json={"prompt": prompt}).json()["id"]
    assert api.post(f"{session.path}/scans", json={"job": job}).status_code == 202
    return world.perform(world.claim(world.queue()))


@folder_only
def test_a_scan_that_cannot_be_read_now_goes_on_waiting(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_contents, "KEPT_AT_ONCE", 1)
    session = made(api)
    job = coming(api, world, session)
    file = world.file(job, "activations").file
    aside = file.rename(file.with_name("aside"))
    file.mkdir()  # an error of the store's, not a file that is missing
    second = coming(api, world, session, "b")
    for _ in range(2):
        arriving = read(api.get(session.path)).body["arriving"]
        # The second could be read, but where one cannot, nobody waits for the others in vain.
        assert [each["job"] for each in arriving] == [str(job.id), str(second.id)]
        assert {(each["state"], each["problem"]) for each in arriving} == {("succeeded", None)}
    assert api.get("/api/sessions").json()["sessions"][0]["scans"] == 0
    monkeypatch.undo()
    beside = read(api.get(session.path)).body
    assert beside["scans"] == 1, "who is asked for beside it is read"
    assert [each["job"] for each in beside["arriving"]] == [str(job.id)]
    file.rmdir()
    aside.rename(file)
    after = read(api.get(session.path)).body
    assert (after["scans"], after["arriving"]) == (2, [])


def test_scans_that_arrive_together_are_one_revision_in_the_order_in_which_they_were_added(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    labels = ["first", "second", "third"]
    for label in labels:
        job = api.post("/api/scan/activation", json={"prompt": label}).json()["id"]
        api.post(f"{session.path}/scans", json={"job": job, "label": label})
    for _ in labels:
        world.perform(world.claim(world.queue()))
    [listed] = api.get("/api/sessions").json()["sessions"]
    after = read(api.get(session.path)).body
    assert [scan["label"] for scan in after["document"]["scans"]] == labels
    assert (listed["head"], after["revision"], after["arriving"]) == (after["head"], 2, [])
    assert api.get(f"{session.path}/revisions").json()[0]["message"] == "Added 3 scans"


def test_a_revision_is_told_once_though_one_of_those_that_arrived_failed(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    for label in ("first", "second", "third"):
        job = api.post("/api/scan/activation", json={"prompt": label}).json()["id"]
        api.post(f"{session.path}/scans", json={"job": job, "label": label})
    for fails in (False, True, False):
        job = world.claim(world.queue())
        world.move(job, JobState.FAILED, problem={"detail": "no"}) if fails else world.perform(job)
    assert api.get("/api/sessions").json()["sessions"][0]["scans"] == 2
    rows = world.redis.xrange(keys.event_stream(UUID(session.path.rpartition("/")[2])))
    told = [entry.name for entry in parse_entries(rows)]
    assert (told.count("saved"), told[-1]) == (1, "scan")


def test_a_scan_whose_bytes_are_gone_does_not_join_and_says_why(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    job = coming(api, world, session)
    world.harm(job, "activations")
    with follow(api, f"{session.path}/events") as stream:
        heard = [next(stream), next(stream)]
    (told,) = [message.data for message in heard if message.name == "scan"]
    assert told["problem"]["status"] == 410
    (refused,) = read(api.get(session.path)).body["arriving"]
    assert refused["problem"] == told["problem"]
    assert refused["problem"]["job"] == str(job.id)


LOOKS: dict[str, Callable[[httpx.Client, Session], object]] = {
    "export": lambda api, session: len(archived(api, f"{session.path}/export").results),
    "results": lambda api, session: len(archived(api, f"{session.path}/results").results),
    "fork": lambda api, session: api.post(f"{session.path}/fork", json={}).json()["scans"],
    "list": lambda api, _: api.get("/api/sessions").json()["sessions"][0]["scans"],
    "revisions": lambda api, session: len(api.get(f"{session.path}/revisions").json()) - 1,
    "difference": lambda api, session: len(
        api.get(
            f"{session.path}/difference",
            params={"other": session.body["id"], "other_revision": session.revision},
        ).json()["scans"]
    ),
    "change": lambda api, session: api.patch(session.path, json={"pinned": True}).json()["scans"],
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_scan_that_has_arrived_is_there_however_one_looks(
    api: httpx.Client, world: World, look: str
) -> None:
    session = made(api)
    coming(api, world, session)
    assert LOOKS[look](api, session) == 1


@pytest.mark.parametrize("path", ["export", "results"])
@pytest.mark.parametrize("shown", [{}, {"redact": True}], ids=["whole", "redacted"])
def test_it_is_there_for_who_follows_a_link(
    api: httpx.Client, world: World, path: str, shown: dict[str, bool]
) -> None:
    session = made(api)
    link = api.post(f"{session.path}/shares", json=shown).json()
    coming(api, world, session)
    file = archived(api, f"/api/shared/{path}", **{"share-token": link["token"]})
    assert len(file.results) == 1


def test_a_session_takes_no_more_scans_than_it_can_hold_and_can_be_opened_all_the_same(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (session_arrivals, session_revisions):
        monkeypatch.setattr(room, "MOST_SCANS", 2)
    done = [scanned(api, world, f"a {n}") for n in range(2)]
    session = made(api)
    job = coming(api, world, session, "b")
    later = api.post("/api/scan/activation", json={"prompt": "c"}).json()["id"]
    assert api.post(f"{session.path}/scans", json={"job": later}).status_code == 202
    for another in (done[0], api.post("/api/scan/activation", json={"prompt": "d"}).json()["id"]):
        refused = api.post(f"{session.path}/scans", json={"job": another})
        assert (refused.status_code, refused.json()["limit"]) == (429, 2)
    # A save takes the place that was kept.
    head = read(api.get(session.path))
    assert [scan["request"]["prompt"] for scan in head.body["document"]["scans"]] == ["b"]
    read(
        api.put(
            session.path,
            json={"scans": [{"job": job} for job in done]},
            headers={"if-match": f'"{head.revision}"'},
        )
    )
    world.perform(world.claim(world.queue()))
    for _ in range(2):
        opened = read(api.get(session.path)).body
        (left,) = opened["arriving"]
        assert (left["job"], left["state"]) == (later, "succeeded")
        assert "as many as one can hold" in left["problem"]["detail"]
        assert opened["scans"] == 2
    assert str(job.id) not in {each["job"] for each in opened["arriving"]}


def test_a_stream_goes_on_where_its_reader_stopped(api: httpx.Client, world: World) -> None:
    session = made(api)
    with follow(api, f"{session.path}/events") as stream:
        next(stream)
        second = read(save(api, session, view={"layer": 1}))
        last = next(stream)
        assert last.data["revision"] == second.revision
    third = read(save(api, second, view={"layer": 2}))
    fourth = read(save(api, third, view={"layer": 3}))
    with follow(api, f"{session.path}/events", last.id) as stream:
        assert [next(stream).data["revision"] for _ in range(2)] == [
            third.revision,
            fourth.revision,
        ]


@pytest.mark.parametrize("never_told", ["99999999999999-0", "end"])
def test_a_place_that_no_event_has_is_the_beginning(
    api: httpx.Client, world: World, never_told: str
) -> None:
    session = made(api)
    with follow(api, f"{session.path}/events", never_told) as stream:
        assert next(stream).data["revision"] == session.revision
        second = read(save(api, session, view={"layer": 1}))
        told = next(stream)
    assert told.data["revision"] == second.revision
    assert told.id != never_told, "it was told when it happened, not found in the database later"
    assert int(told.id.partition("-")[0]) > 0
