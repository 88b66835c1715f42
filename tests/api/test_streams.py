"""Event streams: exact, resumable, and always with an end."""

import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from api import hub
from neural_mri.backing import jobs, keys, outlook
from neural_mri.backing.records import Job
from neural_mri.contract.events import Ended, Reset, StateChanged, decode_event
from neural_mri.contract.jobs import JobState
from tests.api.reading import Message, Unanswered, follow, read_all
from tests.api.specimens import PROMPT
from tests.api.world import World, serving


def scan(api: httpx.Client, prompt: str = PROMPT) -> str:
    """A scan's id, once its first event stands in its stream."""
    answer = api.post("/api/scan/activation", json={"prompt": prompt})
    assert answer.status_code == 202
    return str(answer.json()["id"])


def started(api: httpx.Client, world: World, prompt: str = PROMPT) -> Job:
    """A scan that a worker has begun."""
    scan(api, prompt)
    return world.move(world.claim(world.queue()), JobState.RUNNING)


def tokens_told(messages: Sequence[Message]) -> list[int]:
    return [m.data["token_idx"] for m in messages if m.name == "activation_frame"]


def names(messages: Sequence[Message]) -> list[str]:
    return [message.name for message in messages]


def test_a_stream_tells_of_everything_from_the_first_event_to_the_end(
    api: httpx.Client, world: World
) -> None:
    job = started(api, world)
    for token_idx in range(3):
        world.frame(job, token_idx)
    with follow(api, f"/api/jobs/{job.id}/events") as stream:
        heard = [next(stream) for _ in range(6)]
        assert stream.retry == 500
        assert stream.response.headers["content-type"] == "text/event-stream"
        assert stream.response.headers["cache-control"] == "no-store"
        assert stream.response.headers["x-accel-buffering"] == "no"
        world.frame(job, 3)
        world.move(job, JobState.STORING)
        done = world.move(
            job, JobState.FAILED, problem={"type": "about:blank", "detail": "no reason"}
        )
        heard += list(stream)
    assert names(heard) == [
        *["state"] * 3,
        *["activation_frame"] * 4,
        "state",
        "ended",
    ]
    assert tokens_told(heard) == [0, 1, 2, 3]
    assert all(message.data["job"] == str(job.id) for message in heard)
    events = [decode_event(msgspec.json.encode(message.data)) for message in heard]
    assert [e.state for e in events if isinstance(e, StateChanged)] == [
        "queued",
        "claimed",
        "running",
        "storing",
    ]
    assert events[-1] == Ended(state=JobState.FAILED, attempt=done.attempt, problem=done.problem)


def test_a_quiet_stream_keeps_its_connection_alive(api: httpx.Client, world: World) -> None:
    job = started(api, world)

    def end_after_a_second() -> None:
        time.sleep(1.0)
        world.move(job, JobState.CANCELLED)

    with (
        follow(api, f"/api/jobs/{job.id}/events") as stream,
        world.beside(end_after_a_second),
    ):
        list(stream)
    assert 2 <= stream.comments <= 4  # every 0.3 s for one second


def test_a_reader_that_was_cut_misses_nothing_and_hears_nothing_twice(
    api: httpx.Client, world: World
) -> None:
    job, total = started(api, world), 400
    path = f"/api/jobs/{job.id}/events"

    def tell() -> None:
        for token_idx in range(total):
            world.frame(job, token_idx)
            if token_idx % 25 == 0:
                time.sleep(0.005)
        world.move(job, JobState.FAILED)

    heard: list[Message] = []
    cuts = 0
    with world.beside(tell):
        while not heard or heard[-1].name != "ended":
            with follow(api, path, heard[-1].id if heard else None) as stream:
                for message in stream:
                    heard.append(message)
                    if message.name == "activation_frame" and len(heard) % 37 == 0:
                        cuts += 1
                        break
    assert cuts >= 8
    assert tokens_told(heard) == list(range(total))
    assert len({message.id for message in heard}) == len(heard)


def test_a_reader_that_has_heard_the_end_is_told_not_to_come_again(
    api: httpx.Client, world: World
) -> None:
    job = started(api, world)
    world.move(job, JobState.FAILED)
    path = f"/api/jobs/{job.id}/events"
    last = read_all(api, path)[-1]
    assert last.name == "ended"
    again = api.get(path, headers={"last-event-id": last.id})
    assert again.status_code == 204
    before_last = api.get(path, headers={"last-event-id": "0-0"})
    assert before_last.status_code == 200


def test_a_job_answered_from_an_earlier_result_ends_at_once(
    api: httpx.Client, world: World
) -> None:
    scan(api)
    world.perform(world.claim(world.queue()))
    cached = scan(api)
    time.sleep(0.05)
    world.redis.delete(f"events:{cached}")  # as if its one event had been dropped
    (end,) = read_all(api, f"/api/jobs/{cached}/events")
    assert (end.name, end.data["cached"], end.id) == ("ended", True, "end")
    assert end.data["result"] == f"/api/jobs/{cached}/result"
    again = api.get(f"/api/jobs/{cached}/events", headers={"last-event-id": "end"})
    assert again.status_code == 204


def test_a_reader_whose_events_are_gone_starts_again_from_where_the_job_stands(
    api: httpx.Client, world: World
) -> None:
    job = started(api, world)
    world.frame(job, 0)
    path = f"/api/jobs/{job.id}/events"
    with follow(api, path) as stream:
        last = [next(stream) for _ in range(4)][-1]
    world.redis.flushall()
    world.frame(job, 1)
    with follow(api, path, last.id) as stream:
        first, second = next(stream), next(stream)
        assert decode_event(msgspec.json.encode(first.data)) == Reset(
            state=JobState.RUNNING, attempt=1
        )
        assert second.data["token_idx"] == 1
        world.move(job, JobState.FAILED)
        assert names(list(stream)) == ["ended"]
    resumed = read_all(api, path, first.id)
    assert names(resumed) == ["activation_frame", "ended"]


def test_a_reader_at_work_is_told_when_its_stream_vanishes(api: httpx.Client, world: World) -> None:
    job = started(api, world)
    with follow(api, f"/api/jobs/{job.id}/events") as stream:
        assert names([next(stream) for _ in range(3)]) == ["state"] * 3
        world.redis.flushall()
        reset = next(stream)
        assert (reset.name, reset.data["state"]) == ("reset", "running")
        world.frame(job, 7)
        assert next(stream).data["token_idx"] == 7
        world.move(job, JobState.FAILED)
        assert names(list(stream)) == ["ended"]


def test_a_job_that_is_deleted_takes_none_along_that_share_its_stream(
    api: httpx.Client, world: World
) -> None:
    deleted = started(api, world, "a")
    stays = started(api, world, "b")
    with follow(api, f"/api/events?jobs={deleted.id},{stays.id}") as stream:
        assert names([next(stream) for _ in range(6)]) == ["state"] * 6
        # Of its end nothing is heard before it is gone, and its events with it.
        world.sessions.write(
            jobs.advance, deleted.id, JobState.FAILED, attempt=deleted.attempt, problem=None
        )
        assert api.delete(f"/api/jobs/{deleted.id}/record").status_code == 200
        world.redis.flushall()
        reset = next(stream)
        assert (reset.name, reset.data["job"]) == ("reset", str(stays.id))
        world.frame(stays, 7)
        assert next(stream).data["token_idx"] == 7
        world.move(stays, JobState.FAILED)
        assert [(m.name, m.data["job"]) for m in stream] == [("ended", str(stays.id))]


def test_a_reader_outlives_a_database_that_does_not_say_where_its_job_stands(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = started(api, world)
    with follow(api, f"/api/jobs/{job.id}/events") as stream:
        assert names([next(stream) for _ in range(3)]) == ["state"] * 3
        away = Unanswered(monkeypatch, jobs, "get", times=4)
        world.redis.flushall()
        reset = next(stream)
        assert (reset.name, reset.data["state"], away.left) == ("reset", "running", 0)
        world.move(job, JobState.FAILED)
        assert names(list(stream)) == ["ended"]


def test_a_reader_who_waits_outlives_a_database_that_does_not_tell_of_the_queue(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan(api, "a")
    path = f"/api/jobs/{scan(api, 'b')}/events"
    away = Unanswered(monkeypatch, outlook, "line")
    with follow(api, path) as stream:
        told = [next(stream), next(stream)]
        assert (names(told), told[1].data["position"]) == (["state", "queue"], 2)
        assert away.left == 0
        away.left = 1
        assert api.delete(f"/api/jobs/{first}").status_code == 200
        assert (next(stream).data["position"], away.left) == (1, 0)
        world.move(world.claim(world.queue()), JobState.FAILED)
        assert names(list(stream))[-1] == "ended"


def test_an_end_that_no_stream_tells_of_is_heard_all_the_same(
    api: httpx.Client, world: World
) -> None:
    job = started(api, world)
    with follow(api, f"/api/jobs/{job.id}/events") as stream:
        assert [next(stream).name for _ in range(3)] == ["state"] * 3
        world.sessions.write(jobs.advance, job.id, JobState.FAILED, attempt=job.attempt)
        (end,) = stream
    assert (end.name, end.data["state"], end.id) == ("ended", "failed", "end")


def test_the_end_is_heard_while_redis_is_away(lone_world: World) -> None:
    assert lone_world.valkey is not None
    with serving(lone_world.settings) as api:
        job = started(api, lone_world)
        path = f"/api/jobs/{job.id}/events"
        with follow(api, path) as stream:
            assert [next(stream).name for _ in range(3)] == ["state"] * 3
            lone_world.valkey.kill()
            began = time.monotonic()
            lone_world.sessions.write(jobs.advance, job.id, JobState.FAILED, attempt=job.attempt)
            (end,) = stream
            assert time.monotonic() - began < 4
        assert (end.name, end.data["state"]) == ("ended", "failed")
        # Who comes only now hears it as well, and so does who waits for an answer.
        assert [message.name for message in read_all(api, path)] == ["ended"]


def test_a_redis_that_has_no_room_left_is_read_all_the_same(lone_world: World) -> None:
    with serving(lone_world.settings) as api:
        job = started(api, lone_world)
        lone_world.redis.config_set("maxmemory", 1)
        readers = lone_world.redis.info("stats")["total_connections_received"]
        for _ in range(3):
            with follow(api, f"/api/jobs/{job.id}/events") as stream:
                assert next(stream).name == "state"
                # Until the reader has come again, if it has gone.
                time.sleep(0.3)
        assert lone_world.redis.info("stats")["total_connections_received"] == readers


def test_readers_outlive_a_redis_that_comes_back_empty(lone_world: World) -> None:
    assert lone_world.valkey is not None
    with serving(lone_world.settings) as api:
        job = started(api, lone_world)
        with follow(api, f"/api/jobs/{job.id}/events") as stream:
            assert [next(stream).name for _ in range(3)] == ["state"] * 3
            lone_world.valkey.kill()
            lone_world.valkey.start()
            assert next(stream).name == "reset"
            lone_world.frame(job, 5)
            assert next(stream).data["token_idx"] == 5
            lone_world.move(job, JobState.FAILED)
            assert names(list(stream)) == ["ended"]


def test_one_connection_carries_several_jobs_and_resumes_them_all(
    api: httpx.Client, world: World
) -> None:
    first, second = started(api, world, "a"), started(api, world, "b")
    path = f"/api/events?jobs={first.id},{second.id}"
    for token_idx in range(3):
        world.frame(first, token_idx)
        world.frame(second, 10 + token_idx)
    heard: list[Message] = []
    with follow(api, path) as stream:
        heard += [next(stream) for _ in range(7)]
    world.frame(first, 3)
    world.move(first, JobState.FAILED)
    with follow(api, path, heard[-1].id) as stream:
        heard += [next(stream) for _ in range(7)]
        world.frame(second, 13)
        world.move(second, JobState.FAILED)
        heard += list(stream)
    for job, told in ((first, [0, 1, 2, 3]), (second, [10, 11, 12, 13])):
        own = [message for message in heard if message.data["job"] == str(job.id)]
        assert names(own) == [*["state"] * 3, *["activation_frame"] * 4, "ended"]
        assert tokens_told(own) == told
    assert api.get(path, headers={"last-event-id": heard[-1].id}).status_code == 204


def test_a_shared_stream_refuses_what_is_no_list_of_jobs(api: httpx.Client, world: World) -> None:
    assert api.get("/api/events?jobs=first,second").status_code == 400
    assert api.get("/api/events").status_code == 400
    unknown = "01a208e5-620a-7f6d-98da-3f510d18b436"
    assert api.get(f"/api/events?jobs={unknown}").status_code == 404
    many = ",".join(f"01a208e5-620a-7f6d-98da-3f510d18b4{n:02x}" for n in range(33))
    assert "32 at most" in api.get(f"/api/events?jobs={many}").json()["detail"]


def test_many_readers_hear_the_same_over_few_connections(api: httpx.Client, world: World) -> None:
    job, readers = started(api, world), 60
    world.frame(job, 0)
    before = len(world.redis.client_list())
    heard: list[list[Message]] = [[] for _ in range(readers)]
    listening = threading.Barrier(readers + 1)

    def read(own: list[Message]) -> None:
        with follow(api, f"/api/jobs/{job.id}/events") as stream:
            own.extend(next(stream) for _ in range(4))
            listening.wait()
            own.extend(stream)

    threads = [threading.Thread(target=read, args=(own,)) for own in heard]
    for thread in threads:
        thread.start()
    listening.wait()
    connections = len(world.redis.client_list()) - before
    for token_idx in range(1, 20):
        world.frame(job, token_idx)
    world.move(job, JobState.FAILED)
    for thread in threads:
        thread.join()
    assert all(tokens_told(own) == list(range(20)) for own in heard)
    assert connections <= hub.READERS


def test_a_reader_that_takes_nothing_does_not_hold_up_the_others(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backlog is dropped and read again later: it too hears everything, once, in order."""
    monkeypatch.setattr(hub, "BACKLOG", 16)
    job, total = started(api, world), 1500
    path = f"/api/jobs/{job.id}/events"
    with ExitStack() as stack:
        slow = stack.enter_context(follow(api, path))
        next(slow)
        for token_idx in range(total):
            world.frame(job, token_idx)
        quick = stack.enter_context(follow(api, path))
        world.move(job, JobState.FAILED)
        assert tokens_told(list(quick)) == list(range(total))
        assert tokens_told(list(slow)) == list(range(total))


def test_a_reader_that_goes_away_is_forgotten(api: httpx.Client, world: World) -> None:
    job = started(api, world)
    with follow(api, f"/api/jobs/{job.id}/events") as stream:
        next(stream)
        assert api.get("/api/health").json()["streams"] == 1
    for _ in range(200):
        if api.get("/api/health").json()["streams"] == 0:
            return
        time.sleep(0.01)
    pytest.fail("the reader is still followed 2 s after it went away")


def test_a_reader_that_goes_away_while_it_is_written_to_is_forgotten(
    api: httpx.Client, world: World
) -> None:
    job = started(api, world)
    address = urlsplit(str(api.base_url))
    with socket.create_connection((address.hostname or "", address.port or 0)) as raw:
        raw.sendall(f"GET /api/jobs/{job.id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        raw.recv(100)
    for token_idx in range(50):
        world.frame(job, token_idx)
    for _ in range(200):
        if api.get("/api/health").json()["streams"] == 0:
            return
        time.sleep(0.01)
    pytest.fail("the reader is still followed 2 s after it went away")


@pytest.mark.parametrize("last_id", ["nonsense", "99999999999999999999999-1", "1-2-3", "-", "é"])
def test_an_id_that_is_none_begins_at_the_beginning(
    api: httpx.Client, world: World, last_id: str
) -> None:
    job = started(api, world)
    world.move(job, JobState.FAILED)
    headers = {b"last-event-id": last_id.encode("latin-1")}
    answer = api.get(f"/api/jobs/{job.id}/events", headers=headers)
    assert answer.text.count("event: state") == 3
    assert answer.text.count("event: ended") == 1


@pytest.mark.parametrize("how", ["alone", "shared"])
def test_who_says_that_they_have_read_an_end_that_is_to_come_begins_at_the_beginning(
    api: httpx.Client, world: World, how: str
) -> None:
    job, other = started(api, world), started(api, world, "another")
    path, last_id = f"/api/jobs/{job.id}/events", "end"
    if how == "shared":
        path = f"/api/events?jobs={job.id},{other.id}"
        last_id = f"{job.id.hex}=end,{other.id.hex}=end"
    with follow(api, path, last_id) as stream:
        assert names([next(stream) for _ in range(3)]) == ["state"] * 3
        for each in (job, other):
            world.move(each, JobState.FAILED)
        assert names(list(stream)).count("ended") == (2 if how == "shared" else 1)


def test_an_end_that_comes_before_the_reader_waits_is_not_missed(
    api: httpx.Client, world: World
) -> None:
    """The answer of a waiting request looks at the database after it has begun to listen."""
    for n in range(20):
        prompt = f"a {n}"

        def end_at_once() -> None:
            job = world.claim(world.queue())
            world.move(job, JobState.FAILED)

        with world.beside(end_at_once):
            answer = api.post(
                "/api/scan/activation", json={"prompt": prompt}, headers={"prefer": "wait=10"}
            )
        assert answer.json()["state"] == "failed"
        assert answer.elapsed.total_seconds() < 4


def test_a_stream_of_an_unknown_job_is_refused(api: httpx.Client, world: World) -> None:
    answer = api.get("/api/jobs/01a208e5-620a-7f6d-98da-3f510d18b436/events")
    assert answer.status_code == 404
    assert answer.json()["type"] == "urn:neural-mri:problem:unknown-job"


def test_events_expire_and_a_finished_job_is_still_told_of(api: httpx.Client, world: World) -> None:
    job = started(api, world)
    world.move(job, JobState.FAILED)
    assert 0 < world.redis.ttl(keys.event_stream(job.id)) <= 86_400
    last = read_all(api, f"/api/jobs/{job.id}/events")[2]
    world.redis.delete(keys.event_stream(job.id))
    assert names(read_all(api, f"/api/jobs/{job.id}/events", last.id)) == ["reset", "ended"]
