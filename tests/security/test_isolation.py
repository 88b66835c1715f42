"""Nobody reads, changes or hears of what is another's. Every operation of the document is tried.

A route that is new fails here until it is said what the things are that it names, and whose.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import httpx
import pytest

from api.openapi import Operation, operations
from neural_mri.contract.auth import CreatedKey, Scope
from tests.security.guarded import Guarded
from tests.security.naming import Place, body_example, places

ADA, EVE = "ada-of-the-engine", "eve"
SECRET = "The Eiffel Tower of Ada"
NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


class Mine(NamedTuple):
    """What Ada has, and a name of nothing that looks like it."""

    own: str
    nothing: str


class Ada(NamedTuple):
    """Somebody with one of everything."""

    http: httpx.Client
    key: CreatedKey
    job: str
    batch: str


def job(ada: Ada) -> Mine:
    return Mine(ada.job, NOBODYS)


def key(ada: Ada) -> Mine:
    return Mine(ada.key.id, "0" * 12)


def batch(ada: Ada) -> Mine:
    return Mine(ada.batch, NOBODYS)


OWNED: Mapping[str, Callable[[Ada], Mine]] = {
    "path job_id": job,
    "path batch_id": batch,
    "path key_id": key,
    "query jobs": job,
}
"""What names one user's thing: whoever else names it is answered as if there were no such thing."""

COMMON: Mapping[str, str] = {
    "path table": "a table's name, within a job",
    "path layer": "a layer's number, within a job",
    "query before": "an entry of the audit, which only admins read",
    "path user": "a user's name: for admins alone",
}
"""What names nobody's thing, and why."""

ADMIN_ONLY = {"listAudit", "listUsers", "setLimits"}
"""Operations that a user without that scope cannot even ask for."""

OPEN_TO_ANYBODY = {"logIn", "logOut", "health"}

FILL = {"table": "activations", "layer": "0", "user": ADA}
BODIES: Mapping[str, Any] = {}
"""Bodies that reach the thing, where the document's first example does not."""
QUERIES: Mapping[str, Mapping[str, str]] = {
    "modelInfo": {"model": "tiny"},
    "unloadModel": {"model": "tiny"},
}


@pytest.fixture(scope="module")
def document(service: Guarded) -> dict[str, Any]:
    return service.document()


@pytest.fixture(scope="module")
def ada(service: Guarded) -> Iterator[Ada]:
    key = service.key(ADA)
    world = service.world
    with service.client(key) as http:
        made = http.post("/api/scan/activation", json={"prompt": SECRET})
        assert made.status_code == 202, made.text
        done = world.perform(_claimed(service, made.json()["id"]))
        scans = [{"scan_mode": "fMRI", "prompt": SECRET}]
        batch = http.post("/api/batches", json={"scans": scans})
        assert batch.status_code == 202, batch.text
        yield Ada(http, key, str(done.id), batch.json()["id"])


def _claimed(service: Guarded, job_id: str) -> Any:
    """The job, taken by a worker; those that other tests left waiting are taken first, and done."""
    world = service.world
    while True:
        taken = world.claim(world.queue())
        if str(taken.id) == job_id:
            return taken
        world.perform(taken)


@pytest.fixture(scope="module")
def eve(service: Guarded) -> Iterator[httpx.Client]:
    """A user with every scope but an admin's."""
    scopes = tuple(scope for scope in Scope if scope is not Scope.ADMIN)
    with service.client(service.key(EVE, scopes)) as client:
        yield client


def ask(
    client: httpx.Client, operation: Operation, document: dict[str, Any], named: Mapping[str, str]
) -> httpx.Response:
    """Ask for an operation of the things that are named, by `path job_id` and the like."""
    name = operation.spec["operationId"]
    given = {place.partition(" ")[2]: value for place, value in named.items()}
    path = re.sub(r"{(\w+)}", lambda part: {**FILL, **given}[part[1]], operation.path)
    query = {
        **QUERIES.get(name, {}),
        **{
            place.removeprefix("query "): value
            for place, value in named.items()
            if "query" in place
        },
    }
    body = BODIES.get(name, body_example(operation, document))
    for place, value in named.items():
        if place.startswith("body $."):
            body = {**body, place.removeprefix("body $."): value}
    return client.request(
        operation.method.upper(),
        path,
        params=query,
        headers={"prefer": "wait=0"},
        **({} if body is None else {"json": body}),
    )


def test_of_everything_that_can_be_named_it_is_said_whose_it_is(document: dict[str, Any]) -> None:
    unsaid = [
        str(place)
        for place in places(document)
        if not {f"{place.where} {place.name}", str(place)} & {*OWNED, *COMMON}
    ]
    assert unsaid == [], "add them to OWNED, with how to make one, or to COMMON, with the reason"


def owned_by_operation(document: dict[str, Any]) -> Iterator[tuple[Operation, Place, str]]:
    by_name = {operation.spec["operationId"]: operation for operation in operations(document)}
    for place in places(document):
        for known in (str(place), f"{place.where} {place.name}"):
            if known in OWNED:
                yield by_name[place.operation], place, known
                break


def test_a_strangers_thing_is_answered_for_as_if_there_were_none(
    document: dict[str, Any], ada: Ada, eve: httpx.Client
) -> None:
    tried, told = [], []
    for operation, place, known in owned_by_operation(document):
        mine = OWNED[known](ada)
        at = f"{place.where} {place.name}"
        theirs, nothings = (
            ask(eve, operation, document, {at: name}) for name in (mine.own, mine.nothing)
        )
        same = theirs.text.replace(mine.own, "ID") == nothings.text.replace(mine.nothing, "ID")
        if (
            theirs.status_code != 404
            or not same
            or theirs.headers.keys() != nothings.headers.keys()
        ):
            told.append(f"{place}: {theirs.status_code} {theirs.text}; nothing: {nothings.text}")
        tried.append(place.operation)
    assert told == []
    assert {"getJob", "cancelJob", "getResult", "getTable", "getAttention"} <= set(tried)
    assert {"followJob", "followJobs", "getManifest", "revokeKey"} <= set(tried)


def test_the_same_requests_reach_what_is_ones_own(document: dict[str, Any], ada: Ada) -> None:
    """Else a stranger's 404 would prove nothing."""
    for operation, place, known in owned_by_operation(document):
        if operation.method == "get":
            answer = _of_ones_own(ada, operation, document, place, OWNED[known](ada).own)
            assert answer < 400, f"{place}: {answer}"


def _of_ones_own(
    ada: Ada, operation: Operation, document: dict[str, Any], place: Place, name: str
) -> int:
    return ask(ada.http, operation, document, {f"{place.where} {place.name}": name}).status_code


def test_what_strangers_tried_changed_nothing(
    document: dict[str, Any], ada: Ada, eve: httpx.Client
) -> None:
    def state() -> dict[str, Any]:
        return {
            place.operation: ask(
                ada.http,
                operation,
                document,
                {f"{place.where} {place.name}": OWNED[known](ada).own},
            ).content
            for operation, place, known in owned_by_operation(document)
            if operation.method == "get"
        }

    before = state()
    for operation, place, known in owned_by_operation(document):
        if operation.method != "get":
            ask(eve, operation, document, {f"{place.where} {place.name}": OWNED[known](ada).own})
    assert state() == before
    waiting = ada.http.post("/api/scan/structural", json={}).json()["id"]
    assert eve.delete(f"/api/jobs/{waiting}").status_code == 404
    assert ada.http.get(f"/api/jobs/{waiting}").json()["state"] == "queued"
    assert ada.http.get("/api/login").json()["user"] == ADA


def test_no_list_tells_of_a_strangers_things(
    document: dict[str, Any], ada: Ada, eve: httpx.Client
) -> None:
    marks = {mark for make in OWNED.values() for mark in (make(ada).own,)} | {ADA, SECRET, "Eiffel"}
    asked = 0
    for operation in operations(document):
        if operation.method == "get" and "{" not in operation.path:
            if operation.spec["operationId"] == "followJobs":
                continue
            answer = ask(eve, operation, document, {})
            told = [mark for mark in marks if mark in answer.text]
            assert told == [], f"{operation.path}: {answer.text}"
            asked += 1
    assert asked >= 8


def test_an_equal_scan_says_nothing_of_who_asked_first(service: Guarded, ada: Ada) -> None:
    """The result is shared, because it is the same for everybody; whose it was is not."""
    with service.client(service.key("mallory")) as api:
        answer = api.post("/api/scan/activation", json={"prompt": SECRET})
        assert answer.json()["cached"] is True
        mine = answer.json()["links"]["self"]
        said = answer.text + "".join(
            api.get(f"{mine}{part}").text for part in ("", "/manifest", "/result", "/events")
        )
    assert ada.job not in said
    assert ADA not in said


def test_what_is_for_admins_is_refused_to_users(
    document: dict[str, Any], eve: httpx.Client
) -> None:
    refused = set()
    for operation in operations(document):
        name = operation.spec["operationId"]
        if name in ADMIN_ONLY:
            answer = ask(eve, operation, document, {"path user": ADA})
            assert answer.status_code == 403, f"{name}: {answer.text}"
            refused.add(name)
    assert refused == ADMIN_ONLY


def test_nobody_is_let_in_without_a_key(
    document: dict[str, Any], service: Guarded, ada: Ada
) -> None:
    with service.client() as nobody:
        for operation in operations(document):
            name = operation.spec["operationId"]
            named = {
                f"{place.where} {place.name}": OWNED[known](ada).own
                for one, place, known in owned_by_operation(document)
                if one.spec["operationId"] == name
            }
            answer = ask(nobody, operation, document, named)
            if name in OPEN_TO_ANYBODY:
                assert answer.status_code != 401 or name == "logIn", f"{name}: {answer.text}"
            else:
                assert answer.status_code == 401, f"{name}: {answer.status_code} {answer.text}"
