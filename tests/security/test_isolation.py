"""Nobody reads, changes or hears of what is another's. Every operation of the document is tried.

A route that is new fails here until it is said what the things are that it names, and whose.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import httpx
import pytest

from api.openapi import Operation, operations
from neural_mri.contract.auth import Scope
from tests.security.guarded import Guarded
from tests.security.naming import body_example, filled, places

ADA, EVE = "ada-of-the-engine", "eve"
SECRET = "The Eiffel Tower of Ada"
NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"
NO_TOKEN = "A" * 22
USER = tuple(scope for scope in Scope if scope is not Scope.ADMIN)

OWNED: Mapping[str, str] = {
    "path job_id": NOBODYS,
    "path batch_id": NOBODYS,
    "path session_id": NOBODYS,
    "path share_id": "0" * 12,
    "path key_id": "0" * 12,
    "path result": "0" * 64,
    "query jobs": NOBODYS,
    "query other": NOBODYS,
    "query after": NOBODYS,
    "body $.job": NOBODYS,
    "body $.scans.job": NOBODYS,
}
"""What names one user's thing, and a name of nothing that looks like it. Whoever else names the thing is
answered as if there were none. `Person.names` has the things."""

NARROWING = {"query after"}
"""Where a list begins: asked for only where it is tried."""

COMMON: Mapping[str, str] = {
    "path table": "a table's name, within a result",
    "path layer": "a layer's number, within a job",
    "path user": "a user's name: for admins alone",
    "query before": "an entry of the audit, which only admins read",
}
"""What names nobody's thing, and why."""

ADMIN_ONLY = {"listAudit", "listUsers", "setLimits"}
"""Operations that a user without that scope cannot even ask for."""

OPEN_TO_ANYBODY = {
    "logIn",
    "logOut",
    "health",
    # Of a link, which is its own key.
    "getShared",
    "getSharedResults",
    "getSharedTable",
    "exportShared",
    "followShared",
}

BODIES: Mapping[str, Any] = {
    "addSessionScan": {},
    "contributeScan": {},
    "createSession": {"name": "s"},
    "logIn": {"key": f"nmri_{'0' * 12}_{'a' * 43}"},
}
"""Bodies that reach the thing, where the document's first example does not."""
QUERIES: Mapping[str, Mapping[str, str]] = {
    "modelInfo": {"model": "tiny"},
    "unloadModel": {"model": "tiny"},
}


class Person(NamedTuple):
    """Somebody with one of everything."""

    http: httpx.Client
    names: Mapping[str, str]
    """Of their own things, by where they are named."""
    token: str
    """Of a link to their session."""

    def own(self, operation: str, at: str) -> str:
        """What an operation can name of theirs; what one name is of may depend on the operation."""
        return self.names.get(f"{operation} {at}") or self.names[at]


@pytest.fixture(scope="module")
def document(service: Guarded) -> dict[str, Any]:
    return service.document()


@pytest.fixture(scope="module")
def ada(service: Guarded) -> Iterator[Person]:
    with service.client(key := service.key(ADA, USER)) as http:
        yield settled_in(service, http, key.id, SECRET)


@pytest.fixture(scope="module")
def eve(service: Guarded) -> Iterator[Person]:
    with service.client(key := service.key(EVE, USER)) as http:
        yield settled_in(service, http, key.id, "Something else")


def settled_in(service: Guarded, http: httpx.Client, key: str, prompt: str) -> Person:
    """A person who has scanned a prompt, and kept what was seen."""
    world = service.world
    job = _made(http, "/api/scan/activation", {"prompt": prompt})["id"]
    while True:  # what other tests left waiting is done first
        taken = world.perform(world.claim(world.queue()))
        if str(taken.id) == job:
            break
    batch = _made(http, "/api/batches", {"scans": [{"scan_mode": "fMRI", "prompt": prompt}]})["id"]
    session = _made(http, "/api/sessions", {"name": prompt, "scans": [{"job": job}]})
    share = _made(http, f"/api/sessions/{session['id']}/shares", {"access": "contribute"})
    names = {
        "path job_id": job,
        "path batch_id": batch,
        "path session_id": session["id"],
        "path share_id": share["id"],
        "path key_id": key,
        "path result": session["document"]["scans"][0]["result"],
        "query jobs": job,
        "query other": session["id"],
        "listJobs query after": job,
        "listBatches query after": batch,
        "body $.job": job,
        "body $.scans.job": job,
    }
    return Person(http, names, share["token"])


def _made(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code in (201, 202), answer.text
    return answer.json()


def ask(
    person: Person, operation: Operation, document: dict[str, Any], named: Mapping[str, str]
) -> httpx.Response:
    """Ask for an operation on one's own things, but for those that are named otherwise.

    Of an answer that goes on for ever only the head is asked for, where it is one's own.
    """
    name = operation.spec["operationId"]
    here = {str(place)[len(name) + 1 :] for place in places(document) if place.operation == name}
    usual = (here & OWNED.keys()) - NARROWING
    said = {**{place: person.own(name, place) for place in usual}, **named}
    fill = {"table": "activations", "layer": "0", "user": ADA}
    query, body = dict(QUERIES.get(name, {})), BODIES.get(name, body_example(operation, document))
    for place, value in said.items():
        where, _, what = place.partition(" ")
        if where == "path":
            fill[what] = value
        elif where == "query":
            query[what] = value
        else:
            body = {**body, **_nested(what.removeprefix("$.").split("."), value)}
    streams = "text/event-stream" in operation.spec["responses"].get("200", {}).get("content", {})
    return person.http.request(
        "HEAD" if streams and not named else operation.method.upper(),
        filled(operation.path, fill),
        params=query,
        headers={"prefer": "wait=0", "if-match": "*", "share-token": person.token},
        **({} if body is None else {"json": body}),
    )


def ask_own(
    person: Person, operation: Operation, document: dict[str, Any], at: str
) -> httpx.Response:
    """Ask for an operation on one's own things, what a list goes on after among them."""
    own = person.own(operation.spec["operationId"], at)
    return ask(person, operation, document, {at: own} if at in NARROWING else {})


def _nested(path: list[str], value: str) -> dict[str, Any]:
    """`scans.job` is a list of one."""
    first, *rest = path
    return {first: [_nested(rest, value)] if rest else value}


def named_in(document: dict[str, Any]) -> Iterator[tuple[Operation, str]]:
    """Every operation that names somebody's thing, and where it does."""
    by_name = {operation.spec["operationId"]: operation for operation in operations(document)}
    for place in places(document):
        if (at := f"{place.where} {place.name}") in OWNED:
            yield by_name[place.operation], at


def test_of_everything_that_can_be_named_it_is_said_whose_it_is(document: dict[str, Any]) -> None:
    unsaid = [
        str(place)
        for place in places(document)
        if f"{place.where} {place.name}" not in {*OWNED, *COMMON}
    ]
    assert unsaid == [], (
        "add them to OWNED, and to what a person has; or to COMMON, with the reason"
    )


def test_a_strangers_thing_is_answered_for_as_if_there_were_none(
    document: dict[str, Any], ada: Person, eve: Person
) -> None:
    tried, told = set(), []
    for operation, at in named_in(document):
        own, nothing = ada.own(operation.spec["operationId"], at), OWNED[at]
        theirs, nothings = (ask(eve, operation, document, {at: name}) for name in (own, nothing))
        same = theirs.text.replace(own, "ID") == nothings.text.replace(nothing, "ID")
        if (
            theirs.status_code != 404
            or not same
            or theirs.headers.keys() != nothings.headers.keys()
        ):
            told.append(
                f"{operation.spec['operationId']} {at}: {theirs.status_code} {theirs.text[:300]}; "
                f"of nothing: {nothings.status_code} {nothings.text[:300]}"
            )
        tried.add(operation.spec["operationId"])
    assert told == []
    assert {"getJob", "cancelJob", "getResult", "getTable", "getAttention", "followJobs"} <= tried
    assert {"getBatch", "revokeKey", "saveSession", "addSessionScan", "revokeShare"} <= tried


def test_the_same_requests_reach_what_is_ones_own(document: dict[str, Any], ada: Person) -> None:
    """Else a stranger's 404 would prove nothing."""
    for operation, at in named_in(document):
        if operation.method == "get":
            answer = ask_own(ada, operation, document, at)
            assert answer.status_code < 400, f"{operation.path} {at}: {answer.text}"


def test_what_strangers_tried_changed_nothing(
    document: dict[str, Any], ada: Person, eve: Person
) -> None:
    def state() -> dict[str, bytes]:
        return {
            operation.path: ask_own(ada, operation, document, at).content
            for operation, at in named_in(document)
            if operation.method == "get"
        }

    before = state()
    for operation, at in named_in(document):
        if operation.method != "get":
            ask(eve, operation, document, {at: ada.own(operation.spec["operationId"], at)})
    assert state() == before
    waiting = _made(ada.http, "/api/scan/structural", {})["id"]
    assert eve.http.delete(f"/api/jobs/{waiting}").status_code == 404
    assert ada.http.get(f"/api/jobs/{waiting}").json()["state"] == "queued"


def test_no_list_tells_of_a_strangers_things(
    document: dict[str, Any], ada: Person, eve: Person
) -> None:
    marks = {*ada.names.values(), ada.token, ADA, SECRET, "Eiffel"}
    asked = 0
    for operation in operations(document):
        named = any(
            one.path == operation.path and at not in NARROWING for one, at in named_in(document)
        )
        if operation.method == "get" and not named:
            answer = ask(eve, operation, document, {})
            told = [mark for mark in marks if mark in answer.text]
            assert told == [], f"{operation.path}: {answer.text}"
            asked += 1
    assert asked >= 12


def test_the_key_of_a_strangers_scan_finds_nothing(ada: Person, eve: Person) -> None:
    job = ada.names["path job_id"]
    by_key = {"scan_key": ada.http.get(f"/api/jobs/{job}/manifest").json()["scan_key"]}
    assert job in ada.http.get("/api/jobs", params=by_key).text
    assert eve.http.get("/api/jobs", params=by_key).json() == []


def test_an_equal_scan_says_nothing_of_who_asked_first(service: Guarded, ada: Person) -> None:
    """The result is shared, because it is the same for everybody; whose it was is not."""
    with service.client(service.key("mallory")) as api:
        answer = api.post("/api/scan/activation", json={"prompt": SECRET})
        assert answer.json()["cached"] is True
        mine = answer.json()["links"]["self"]
        said = answer.text + "".join(
            api.get(f"{mine}{part}").text for part in ("", "/manifest", "/result", "/events")
        )
    assert ada.names["path job_id"] not in said
    assert ADA not in said


def test_what_is_for_admins_is_refused_to_users(document: dict[str, Any], eve: Person) -> None:
    refused = set()
    for operation in operations(document):
        name = operation.spec["operationId"]
        if name in ADMIN_ONLY:
            assert ask(eve, operation, document, {}).status_code == 403, name
            refused.add(name)
    assert refused == ADMIN_ONLY


def test_nobody_is_let_in_without_a_key(
    document: dict[str, Any], service: Guarded, ada: Person
) -> None:
    with service.client() as http:
        nobody = Person(http, ada.names, NO_TOKEN)
        for operation in operations(document):
            name = operation.spec["operationId"]
            answer = ask(nobody, operation, document, {})
            if name == "logIn" or name not in OPEN_TO_ANYBODY:
                assert answer.status_code == 401, f"{name}: {answer.status_code} {answer.text}"
            else:
                assert answer.status_code in (200, 204, 404), f"{name}: {answer.text}"
