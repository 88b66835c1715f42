"""What passes by itself is waited for, what does not is said at once, and nothing is done twice."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import UUID

import pytest

from neural_mri.client import Client, ClientError, Refused, Unreachable
from neural_mri.contract.problems import LimitReached, TooMany, Unavailable
from neural_mri.contract.scans import ActivationScan
from tests.client.specimens import MODEL
from tests.client.wire import NO_ANSWER, Answer, Wire, json_answer, problem_answer

SCAN = ActivationScan(prompt="The Eiffel Tower is in")
SCAN_PATH = "/api/scan/activation"


def later(seconds: str) -> Answer:
    """A refusal that says when to come again."""
    refusal = problem_answer(TooMany("one job is under way, one is allowed"))
    return refusal._replace(headers={"Retry-After": seconds})


def keys(wire: Wire) -> list[str]:
    return [asked.headers["Idempotency-Key"] for asked in wire.asked if asked.path == SCAN_PATH]


@pytest.fixture
def patient(wire: Wire) -> Iterator[Client]:
    with Client(wire.url, patience_seconds=30) as client:
        yield client


@pytest.mark.parametrize(
    "accident",
    [
        NO_ANSWER,
        Answer(502, "text/html", b"<h1>Bad Gateway</h1>"),
        problem_answer(Unavailable("the database does not answer")),
        later("0"),
    ],
    ids=["a broken connection", "a gateway", "a database", "a limit"],
)
def test_what_passes_is_waited_for(wire: Wire, patient: Client, accident: Answer) -> None:
    wire.answers["GET", "/api/models"] = [accident, accident]
    assert patient.models() == [MODEL]
    assert wire.paths() == ["/api/models"] * 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 422, 500])
def test_what_does_not_pass_is_asked_once(wire: Wire, patient: Client, status: int) -> None:
    wire.answers["GET", "/api/models"] = [json_answer({}, status)]
    with pytest.raises(Refused) as refused:
        patient.models()
    assert refused.value.status == status
    assert wire.paths() == ["/api/models"]


def test_room_that_no_wait_makes_is_not_waited_for(wire: Wire, patient: Client) -> None:
    full = problem_answer(LimitReached("you have 10000 sessions, as many as anybody can"))
    wire.answers["POST", "/api/sessions"] = [full]
    with pytest.raises(Refused, match="as many as anybody can"):
        patient.sessions.create("Eiffel")
    assert len(wire.asked) == 1


def test_a_scan_is_sent_again_under_its_own_key(wire: Wire, patient: Client) -> None:
    away = problem_answer(Unavailable("the database does not answer"))
    wire.answers["POST", SCAN_PATH] = [NO_ANSWER, away]
    patient.submit(SCAN)
    first, second, third = keys(wire)
    assert first == second == third
    assert len({asked.body for asked in wire.asked}) == 1
    patient.submit(SCAN)
    assert keys(wire)[3] != first
    patient.submit(SCAN, idempotency_key="mine")
    assert keys(wire)[4] == "mine"


def test_what_might_be_done_twice_is_not_sent_again_unless_it_was_refused(
    wire: Wire, patient: Client
) -> None:
    wire.answers["POST", "/api/sessions"] = [later("0"), NO_ANSWER]
    with pytest.raises(Unreachable):
        patient.sessions.create("Eiffel")
    assert wire.paths("POST") == ["/api/sessions"] * 2


def test_what_is_deleted_is_not_deleted_again_to_be_told_that_it_is_not_there(
    wire: Wire, patient: Client
) -> None:
    path = f"/api/jobs/{UUID(int=1)}/record"
    wire.answers["DELETE", path] = [later("0"), NO_ANSWER]
    with pytest.raises(Unreachable):
        patient.delete(UUID(int=1))
    assert wire.paths("DELETE") == [path] * 2


def test_a_wait_longer_than_ones_patience_is_not_begun(wire: Wire, patient: Client) -> None:
    wire.answers["POST", SCAN_PATH] = [later("3600")]
    with pytest.raises(Refused) as refused:
        patient.submit(SCAN)
    assert refused.value.retry_after_seconds == 3600
    assert len(keys(wire)) == 1


def test_when_to_come_again_may_be_a_moment(wire: Wire, patient: Client) -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    wire.answers["POST", SCAN_PATH] = [later(moment), later("soon")]
    with pytest.raises(Refused) as refused:
        patient.submit(SCAN)
    assert refused.value.retry_after_seconds == pytest.approx(7200, abs=60)
    patient.submit(SCAN)
    assert len(keys(wire)) == 3


def test_a_header_that_cannot_be_sent_is_not_sent_again(wire: Wire) -> None:
    with (
        Client(wire.url, patience_seconds=1000, headers={"X-Team": "a\nb"}) as client,
        pytest.raises(ClientError, match="cannot be sent as it is: Illegal header value"),
    ):
        client.models()
    assert wire.asked == []


@pytest.mark.parametrize("repeatable", [Unreachable("http://elsewhere", "gone", broken=True), None])
def test_scans_that_come_to_an_error_are_no_batch(
    wire: Wire, patient: Client, repeatable: Exception | None
) -> None:
    error = repeatable or LookupError("no such prompt")

    def scans() -> Iterator[ActivationScan]:
        yield SCAN
        raise error

    with pytest.raises(type(error)) as raised:
        patient.batches.submit(scans())
    assert raised.value is error
    assert wire.asked == []


def test_who_closes_a_client_waits_no_longer(wire: Wire) -> None:
    wire.answers["GET", "/api/models"] = [later("500")]
    client = Client(wire.url, patience_seconds=1000)
    ended: list[ClientError] = []

    def ask() -> None:
        try:
            client.models()
        except ClientError as error:
            ended.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    while not wire.asked:
        asking.join(0.01)
    client.close()
    asking.join(20)
    assert len(ended) == 1


def test_a_service_that_never_answered_is_not_waited_for() -> None:
    with Wire() as gone:
        url = gone.url
    with Client(url, patience_seconds=1000) as client, pytest.raises(Unreachable):
        client.models()


def test_the_environment_says_how_patient_a_program_is(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.answers["GET", "/api/models"] = [later("0")] * 2
    monkeypatch.setenv("NMRI_PATIENCE", "0")
    with Client(wire.url) as client, pytest.raises(Refused):
        client.models()
    monkeypatch.setenv("NMRI_PATIENCE", "20")
    with Client(wire.url) as client:
        assert client.models() == [MODEL]
    monkeypatch.setenv("NMRI_PATIENCE", "a while")
    with pytest.raises(ValueError, match="NMRI_PATIENCE is 'a while': expected seconds"):
        Client(wire.url)
