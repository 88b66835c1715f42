"""A job's events arrive once each, in order, whatever happens to the connection."""

import random
from datetime import UTC, datetime
from uuid import UUID, uuid4

import msgspec
import pytest

from neural_mri.client import (
    Client,
    ClientError,
    JobCancelled,
    JobFailed,
    NotUnderstood,
    Refused,
    Unreachable,
)
from neural_mri.client.diagnosing import ServiceScans
from neural_mri.contract.auth import Usage
from neural_mri.contract.batches import BatchCounts, BatchEnded, BatchState, BatchView
from neural_mri.contract.events import Ended, Event, Reset, StateChanged, event_name
from neural_mri.contract.jobs import JobKind, JobState, Lane
from neural_mri.contract.problems import Unavailable, UnknownJob, Unprocessable
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.sessions import SessionClosed, SessionSaved, UnknownSession
from tests.client.wire import Answer, Cut, Wire, json_answer, life_of_a_scan, problem_answer

SCAN = ActivationScan(prompt="The Eiffel Tower is in")
SUCCEEDED = Ended(state=JobState.SUCCEEDED, attempt=1)


def event_requests(wire: Wire) -> list[str | None]:
    """Last-Event-ID of every connection to an event stream, in order."""
    return [
        asked.headers.get("Last-Event-ID") for asked in wire.asked if asked.path.endswith("/events")
    ]


def test_the_events_of_a_job_are_those_it_had(wire: Wire, client: Client) -> None:
    job = client.submit(SCAN)
    assert list(client.watch(job)) == life_of_a_scan(SUCCEEDED)
    assert event_requests(wire) == [None]


@pytest.mark.parametrize("cleanly", [False, True], ids=["torn off", "closed"])
def test_a_cut_stream_is_resumed_where_it_was_cut(
    wire: Wire, client: Client, *, cleanly: bool
) -> None:
    wire.next_cuts = [Cut(300, cleanly), Cut(0, cleanly), Cut(90, cleanly), Cut(700, cleanly)]
    job = client.submit(SCAN)
    assert list(client.watch(job)) == life_of_a_scan(SUCCEEDED)
    assert len(event_requests(wire)) == 5


def test_every_event_comes_once_wherever_a_stream_is_cut(wire: Wire) -> None:
    rng = random.Random(7)
    with Client(wire.url, patience_seconds=20) as client:
        for _ in range(4):
            wire.next_cuts = [Cut(rng.randrange(30, 400), rng.random() < 0.5) for _ in range(6)]
            assert list(client.watch(client.submit(SCAN))) == life_of_a_scan(SUCCEEDED)


def test_a_resumed_stream_names_the_last_whole_event(wire: Wire, client: Client) -> None:
    whole = b": hello\nretry: 20\n\n" + b"".join(
        f"id: {n}\nevent: state\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
        for n, event in enumerate(life_of_a_scan(SUCCEEDED)[:2], 1)
    )
    wire.next_cuts = [Cut(len(whole) + 25)]
    list(client.watch(client.submit(SCAN)))
    assert event_requests(wire) == [None, "2"]


def test_a_job_whose_stream_is_over_has_ended(wire: Wire, client: Client) -> None:
    job = client.submit(SCAN)
    list(client.watch(job))
    path = f"/api/jobs/{job.id}/events"
    wire.answers["GET", path] = [Answer(204, "text/event-stream", b"")]
    (only,) = client.watch(job)
    assert isinstance(only, Ended)
    assert only.state is JobState.SUCCEEDED


def test_whoever_answers_with_no_stream_is_not_asked_for_ever(wire: Wire, client: Client) -> None:
    job = client.submit(SCAN)
    page = Answer(200, "text/html", b"<html>Sign in</html>")
    for path in (f"/api/jobs/{job.id}/events", "/api/events", f"/api/batches/{job.id}/events"):
        wire.answers["GET", path] = [page] * 5
    for watched in (
        client.watch(job),
        client.watch_many([job]),
        client.batches.watch(job.id),
    ):
        with pytest.raises(NotUnderstood, match="answers with text/html: expected a stream"):
            list(watched)


def test_a_service_in_trouble_is_asked_again(wire: Wire, client: Client) -> None:
    job = client.submit(SCAN)
    away = problem_answer(Unavailable("Redis does not answer"))
    wire.answers["GET", f"/api/jobs/{job.id}/events"] = [away, away]
    assert list(client.watch(job)) == life_of_a_scan(SUCCEEDED)


def test_a_job_that_may_not_be_seen_is_not_asked_for_again(wire: Wire, client: Client) -> None:
    job = client.submit(SCAN)
    refusal = problem_answer(UnknownJob("there is no such job"))
    wire.answers["GET", f"/api/jobs/{job.id}/events"] = [refusal]
    with pytest.raises(Refused, match="there is no such job"):
        list(client.watch(job))
    assert len(event_requests(wire)) == 1


def test_patience_with_a_dead_service_ends(wire: Wire) -> None:
    with Client(wire.url, patience_seconds=0.3) as client:
        with Wire() as dying:
            doomed = Client(dying.url, patience_seconds=0.3)
            job = doomed.submit(SCAN)
        with doomed, pytest.raises(Unreachable, match="does not answer"):
            list(doomed.watch(job))
        assert client.health() == {"status": "ok"}


def test_events_of_a_newer_service_are_passed_over(wire: Wire, client: Client) -> None:
    job = client.submit(SCAN)
    ended = msgspec.json.encode(SUCCEEDED)
    body = b"id: 1\nevent: hologram\ndata: {}\n\nid: 2\nevent: ended\ndata: " + ended + b"\n\n"
    wire.answers["GET", f"/api/jobs/{job.id}/events"] = [Answer(200, "text/event-stream", body)]
    assert list(client.watch(job)) == [SUCCEEDED]


def test_an_event_that_is_not_what_it_says_is_an_error(wire: Wire, client: Client) -> None:
    job = client.submit(SCAN)
    body = b"id: 1\nevent: state\ndata: {}\n\n"
    wire.answers["GET", f"/api/jobs/{job.id}/events"] = [Answer(200, "text/event-stream", body)]
    with pytest.raises(NotUnderstood, match="state"):
        list(client.watch(job))


def test_waiting_shows_every_event_and_gives_the_finished_job(client: Client) -> None:
    seen: list[Event] = []
    job = client.wait(client.submit(SCAN), seen.append)
    assert seen == life_of_a_scan(SUCCEEDED)
    assert job.state is JobState.SUCCEEDED


def test_a_failed_job_is_an_error_with_its_reason(wire: Wire, client: Client) -> None:
    problem = {"type": "about:blank", "status": 500, "detail": "the weights are damaged"}
    wire.next_end = Ended(state=JobState.FAILED, attempt=1, problem=problem)
    with pytest.raises(JobFailed, match="failed: the weights are damaged") as raised:
        client.run(SCAN)
    assert raised.value.job.problem == problem


def test_a_cancelled_job_is_an_error_of_its_own(wire: Wire, client: Client) -> None:
    wire.next_end = Ended(state=JobState.CANCELLED, attempt=1)
    with pytest.raises(JobCancelled, match="was cancelled"):
        client.run(SCAN)


def test_who_interrupts_a_scan_of_a_service_that_is_away_does_not_wait_for_it(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural_mri.client.client.PARTING_SECONDS", 0.1)

    def interrupt(_event: Event) -> None:
        (job_id,) = wire.jobs
        away = problem_answer(Unavailable("the database does not answer"))
        wire.answers["DELETE", f"/api/jobs/{job_id}"] = [away] * 1000
        raise KeyboardInterrupt

    with Client(wire.url, patience_seconds=1000) as client, pytest.raises(KeyboardInterrupt):
        client.run(SCAN, interrupt)
    assert 1 <= len(wire.paths("DELETE")) <= 3


def test_an_interrupted_scan_is_cancelled_on_the_service(wire: Wire, client: Client) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StateChanged):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.run(SCAN, interrupt)
    (job_id,) = wire.jobs
    assert wire.paths("DELETE") == [f"/api/jobs/{job_id}"]


def test_a_job_can_be_watched_by_its_id(wire: Wire, client: Client) -> None:
    job = wire.job_about_a_model(JobKind.LOAD)
    assert list(client.watch(str(job.view.id))) == job.events
    with pytest.raises(ValueError, match="'seven' is not a job's id"):
        client.watch("seven")


def test_a_stream_that_ends_early_without_anything_new_is_followed_on(
    wire: Wire, client: Client
) -> None:
    job = client.submit(SCAN)
    wire.answers["GET", f"/api/jobs/{job.id}/events"] = [
        Answer(200, "text/event-stream", b"retry: 20\n: nothing yet\n\n")
    ] * 2
    assert list(client.watch(job)) == life_of_a_scan(SUCCEEDED)


def test_the_truth_is_asked_for_when_a_stream_has_lost_its_events(
    wire: Wire, client: Client
) -> None:
    job = client.submit(SCAN)
    view = msgspec.structs.replace(job, state=JobState.QUARANTINED)
    empty = Answer(200, "text/event-stream", b"retry: 20\n\n")
    wire.answers["GET", f"/api/jobs/{job.id}/events"] = [empty] * 3
    wire.answers["GET", f"/api/jobs/{job.id}"] = [json_answer(view)]
    assert list(client.watch(job)) == [Ended(state=JobState.QUARANTINED, attempt=0)]


def test_an_end_that_is_told_again_is_no_second_end(wire: Wire, client: Client) -> None:
    first, second = uuid4(), uuid4()

    def told(*events: tuple[UUID, Event]) -> Answer:
        """A stream of several jobs that is closed afterwards, as by a service that is restarted."""
        blocks = (
            f"event: {event_name(event)}\ndata: ".encode()
            + msgspec.json.encode({"job": job, **msgspec.to_builtins(event)})
            for job, event in events
        )
        body = b"retry: 1\n\n" + b"".join(block + b"\n\n" for block in blocks)
        return Answer(200, "text/event-stream", body)

    stands = Reset(state=JobState.SUCCEEDED, attempt=1)
    wire.answers["GET", "/api/events"] = [
        told((first, SUCCEEDED)),
        # It has lost what the reader had seen, and begins again from where each job stands.
        told((first, stands), (first, SUCCEEDED), (second, SUCCEEDED)),
    ]
    assert list(client.watch_many([first, second])) == [(first, SUCCEEDED), (second, SUCCEEDED)]
    asked = [each.query["jobs"] for each in wire.asked if each.path == "/api/events"]
    assert asked == [f"{first},{second}", str(second)], "the first may have been deleted by now"


def batch_of(lines: int, state: BatchState) -> BatchView:
    """None of its lines has become a job."""
    return BatchView(
        id=uuid4(),
        state=state,
        lane=Lane.BATCH,
        lines=lines,
        refused=0,
        repeated=0,
        counts=BatchCounts(),
        created_at=datetime.now(UTC),
    )


def test_a_diagnosis_that_ends_says_why_though_its_batch_cannot_be_stopped(
    wire: Wire, client: Client
) -> None:
    batch = batch_of(1, BatchState.RUNNING)
    usage = Usage(user="ada", in_flight=0, max_jobs=None, seconds_today=0, daily_seconds=None)
    wire.answers["GET", "/api/usage"] = [json_answer(usage)]
    wire.answers["POST", "/api/batches"] = [json_answer(batch, 202)]
    wire.answers["GET", f"/api/batches/{batch.id}/events"] = [json_answer({"detail": "who?"}, 401)]
    wire.answers["DELETE", f"/api/batches/{batch.id}"] = [json_answer({}, 403)]
    with pytest.raises(Refused) as refused:
        list(ServiceScans(client, None).scan([SCAN]))
    assert refused.value.status == 401
    assert wire.paths("DELETE") == [f"/api/batches/{batch.id}"]


def test_a_diagnosis_whose_batch_ends_before_its_scans_says_so(wire: Wire, client: Client) -> None:
    batch = batch_of(3, BatchState.CANCELLED)
    ended = BatchEnded(state=BatchState.CANCELLED, counts=batch.counts)
    body = b"id: 1\nevent: ended\ndata: " + msgspec.json.encode(ended) + b"\n\n"
    path = f"/api/batches/{batch.id}"
    wire.answers["POST", "/api/batches"] = [json_answer(batch, 202)] * 2
    wire.answers["GET", f"{path}/events"] = [Answer(200, "text/event-stream", body)]
    wire.answers["GET", path] = [json_answer(batch)]
    wire.answers["DELETE", path] = [json_answer(batch)]
    with pytest.raises(ClientError, match=f"batch {batch.id} has ended, cancelled, with 0 of 3"):
        list(ServiceScans(client, None).scan([SCAN] * 3))


def test_a_diagnosis_of_too_many_tokens_for_one_batch_is_sent_in_halves(
    wire: Wire, client: Client
) -> None:
    batch = batch_of(2, BatchState.RUNNING)
    too_many = Unprocessable("the prompts have 8,000,001 tokens", line=4, limit=8_000_000)
    wire.answers["POST", "/api/batches"] = [problem_answer(too_many), json_answer(batch, 202)]
    assert ServiceScans(client, None)._submitted([SCAN] * 5) == (2, batch)
    wire.answers["POST", "/api/batches"] = [problem_answer(Unprocessable("a line is wrong"))]
    with pytest.raises(Refused, match="a line is wrong"):
        ServiceScans(client, None)._submitted([SCAN] * 5)


def test_a_session_that_was_deleted_while_the_connection_was_broken_is_closed(
    wire: Wire, client: Client
) -> None:
    session = uuid4()
    path = f"/api/sessions/{session}/events"
    saved = SessionSaved(revision="a" * 64, number=1, name="Eiffel")
    body = b"retry: 1\nid: 1\nevent: saved\ndata: " + msgspec.json.encode(saved) + b"\n\n"
    gone = problem_answer(UnknownSession(f"there is no session {session}"))
    wire.answers["GET", path] = [Answer(200, "text/event-stream", body), gone]
    assert list(client.sessions.watch(session)) == [saved, SessionClosed()]
    wire.answers["GET", path] = [gone]
    with pytest.raises(Refused):
        list(client.sessions.watch(session))
