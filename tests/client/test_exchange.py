"""Answers that are late, long, somebody else's, or come when nobody waits any more."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import pytest

from neural_mri.client import (
    Client,
    ClientClosed,
    ClientError,
    Late,
    NotUnderstood,
    Refused,
    Unreachable,
)
from neural_mri.contract.archives import SESSION_FILE
from neural_mri.contract.batches import NDJSON, BatchCounts, BatchState, BatchView
from neural_mri.contract.events import Event
from neural_mri.contract.jobs import Lane
from neural_mri.contract.scans import ActivationScan
from tests.client.specimens import MODEL
from tests.client.wire import NO_ANSWER, PROBLEM, Answer, Wire, json_answer

SOME = UUID(int=7)
TOKEN = "a" * 22
PAGE = Answer(200, "text/html", b"<html>Sign in</html>")
SCAN = ActivationScan(prompt="The Eiffel Tower is in")


def batch(state: BatchState = BatchState.ENDED) -> BatchView:
    return BatchView(
        id=uuid4(),
        state=state,
        lane=Lane.BATCH,
        lines=1,
        refused=0,
        repeated=0,
        counts=BatchCounts(),
        created_at=datetime.now(UTC),
    )


# Somebody else's


@pytest.mark.parametrize(
    ("path", "write"),
    [
        (f"/api/batches/{SOME}/results", lambda mri, to: mri.batches.save(SOME, to)),
        (f"/api/sessions/{SOME}/export", lambda mri, to: mri.sessions.export(SOME, to)),
        ("/api/shared/export", lambda mri, to: mri.sessions.shared(TOKEN).export(to)),
    ],
)
def test_a_gateways_page_replaces_no_file(
    wire: Wire,
    client: Client,
    tmp_path: Path,
    path: str,
    write: Callable[[Client, Path], None],
) -> None:
    wire.answers["GET", path] = [PAGE]
    there = tmp_path / "file"
    there.write_bytes(b"precious")
    with pytest.raises(NotUnderstood, match="answers with text/html: expected application/"):
        write(client, there)
    assert there.read_bytes() == b"precious"
    assert wire.paths() == [path]


@pytest.mark.parametrize(
    "answer",
    [PAGE, Answer(200, NDJSON, b"<html>\n"), Answer(200, NDJSON, b'{"error": "who?"}\n')],
)
def test_results_that_are_none_are_said_to_be_none(
    wire: Wire, client: Client, answer: Answer
) -> None:
    wire.answers["GET", f"/api/batches/{SOME}/results"] = [answer]
    with pytest.raises(NotUnderstood):
        list(client.batches.summaries(SOME))


@pytest.mark.parametrize("said", [{}, {"status": "away"}, {"status": None}])
def test_a_refusal_has_the_status_of_the_answer_whatever_its_document_says(
    wire: Wire, client: Client, said: dict[str, object]
) -> None:
    body = msgspec.json.encode({"detail": "no", **said})
    wire.answers["GET", "/api/models"] = [Answer(503, PROBLEM, body)]
    assert client.models() == [MODEL]
    wire.answers["GET", "/api/models"] = [Answer(404, PROBLEM, body)]
    with pytest.raises(Refused) as refused:
        client.models()
    assert refused.value.status == 404


# Long


def test_what_breaks_after_longer_than_ones_patience_is_tried_again(
    wire: Wire, tmp_path: Path
) -> None:
    path = f"/api/sessions/{SOME}/export"
    whole = Answer(200, SESSION_FILE, b"a session")
    wire.answers["GET", path] = [whole._replace(torn_after=5, seconds=0.1), whole]
    wire.answers["GET", "/api/models"] = [
        json_answer([MODEL])._replace(torn_after=5, seconds=0.1),
    ]
    with Client(wire.url, patience_seconds=0.3) as client:
        client.sessions.export(SOME, tmp_path / "file")
        assert client.models() == [MODEL]
    assert (tmp_path / "file").read_bytes() == b"a session"
    assert wire.paths() == [path] * 2 + ["/api/models"] * 2


def test_what_breaks_at_the_same_place_every_time_comes_to_an_end(
    wire: Wire, tmp_path: Path
) -> None:
    path = f"/api/sessions/{SOME}/export"
    torn = Answer(200, SESSION_FILE, b"a session", torn_after=5, seconds=0.02)
    wire.answers["GET", path] = [torn] * 1000
    with Client(wire.url, patience_seconds=0.5) as client, pytest.raises(Unreachable):
        client.sessions.export(SOME, tmp_path / "file")
    assert 2 <= len(wire.asked) < 10


def test_a_batch_that_takes_long_to_send_is_sent_again(wire: Wire) -> None:
    def slowly() -> Iterator[ActivationScan]:
        for _ in range(5):
            time.sleep(0.1)
            yield SCAN

    view = batch()
    wire.answers["POST", "/api/batches"] = [NO_ANSWER, json_answer(view, 202)]
    with Client(wire.url, patience_seconds=0.3) as client:
        assert client.batches.submit(slowly()) == view
    assert len({each.body for each in wire.asked}) == 1


# Late


def test_a_first_answer_that_is_late_is_asked_for_again_under_the_same_key(wire: Wire) -> None:
    view = batch()
    in_time = json_answer(view, 202)
    wire.answers["POST", "/api/batches"] = [in_time._replace(seconds=0.6), in_time]
    with Client(wire.url, timeout_seconds=0.3, patience_seconds=20) as client:
        assert client.batches.submit([SCAN]) == view
    first, second = (each.headers["Idempotency-Key"] for each in wire.asked)
    assert first == second


def test_what_was_asked_once_and_is_late_may_still_be_done(wire: Wire) -> None:
    wire.answers["POST", "/api/sessions"] = [json_answer({})._replace(seconds=0.3)]
    with (
        Client(wire.url, timeout_seconds=0.1) as client,
        pytest.raises(Late, match=r"longer than 0.1 s\): what was asked may still be done") as late,
    ):
        client.sessions.create("Eiffel")
    assert "make up" not in str(late.value)
    assert len(wire.asked) == 1


def test_the_environment_says_how_long_a_program_waits(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMRI_TIMEOUT", "0.1")
    wire.answers["GET", "/api/models"] = [json_answer([MODEL])._replace(seconds=0.3)]
    with Client(wire.url, patience_seconds=0) as client, pytest.raises(Late):
        client.models()
    for said in ("0", "inf", "a while"):
        monkeypatch.setenv("NMRI_TIMEOUT", said)
        with pytest.raises(ValueError, match=f"NMRI_TIMEOUT is '{said}': expected seconds"):
            Client(wire.url)


def test_who_is_interrupted_waits_for_no_late_answer(
    wire: Wire, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural_mri.client.client.PARTING_SECONDS", 0.2)

    def interrupt(_event: Event) -> None:
        (job_id,) = wire.jobs
        began.append(time.monotonic())
        wire.answers["DELETE", f"/api/jobs/{job_id}"] = [json_answer({})._replace(seconds=25)]
        raise KeyboardInterrupt

    began: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        client.run(SCAN, interrupt)
    assert time.monotonic() - began[0] < 20
    assert wire.paths("DELETE")


# Nobody's


def test_a_closed_client_says_that_it_is(wire: Wire) -> None:
    client = Client(wire.url)
    client.close()
    for ask in (client.models, lambda: list(client.batches.summaries(SOME))):
        with pytest.raises(ClientClosed, match="the client has been closed: make another"):
            ask()
    assert wire.asked == []


def test_who_waits_for_an_answer_when_the_client_is_closed_waits_no_longer(wire: Wire) -> None:
    wire.answers["GET", "/api/models"] = [json_answer([MODEL])._replace(seconds=5)]
    client = Client(wire.url)
    ended: list[ClientError] = []

    def ask() -> None:
        with pytest.raises(Unreachable) as error:
            client.models()
        ended.append(error.value)

    asking = threading.Thread(target=ask)
    asking.start()
    while not wire.asked:
        time.sleep(0.01)
    client.close()
    asking.join(1)
    assert len(ended) == 1
