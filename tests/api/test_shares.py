"""Links: what they open, for how long, and that a redacted one gives no prompt away."""

import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import text, update

from api.redaction import REDACTED, redacted_table
from neural_mri.backing import session_revisions, shares
from neural_mri.backing.rows import SESSION_REVISIONS, SHARES
from neural_mri.backing.settings import Settings
from neural_mri.contract.archives import open_archive
from neural_mri.contract.results import SCHEMAS, from_ipc, provenance_of
from neural_mri.contract.sessions import MOST_DEPTH, SessionDocument, depth_of
from neural_mri.contract.tables import TableSchema
from tests.api.keyed import Door, keyed
from tests.api.reading import Stream, Unanswered
from tests.api.saved import deep, made, read, save, scanned
from tests.api.specimens import PROMPT, filled
from tests.api.world import World


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings) as door:
        yield door


@pytest.fixture
def ada(shared_door: Door, world: World) -> Iterator[httpx.Client]:
    with shared_door.user(world, "ada") as client:
        yield client


@pytest.fixture
def guest(shared_door: Door) -> Iterator[httpx.Client]:
    """Somebody without a key."""
    with shared_door.client() as client:
        yield client


def shared(api: httpx.Client, path: str, **wanted: Any) -> dict[str, Any]:
    answer = api.post(f"{path}/shares", json=wanted)
    assert answer.status_code == 201, answer.text
    link: dict[str, Any] = answer.json()
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", link["token"]), "128 bits"
    assert link["path"] == f"/#shared={link['token']}"
    return link


def by(link: dict[str, Any]) -> dict[str, str]:
    return {"share-token": link["token"]}


def test_a_link_opens_a_session_to_who_has_no_key(
    ada: httpx.Client, guest: httpx.Client, world: World
) -> None:
    session = made(ada, scanned(ada, world))
    link = shared(ada, session.path, label="Grace")
    assert guest.get(session.path).status_code == 401
    opened = guest.get("/api/shared", headers=by(link))
    assert opened.json()["document"] == session.body["document"]
    whole = guest.get("/api/shared/export", headers=by(link)).content
    assert whole == ada.get(f"{session.path}/export").content
    results = ada.get(f"{session.path}/results").content
    assert guest.get("/api/shared/results", headers=by(link)).content == results
    result = session.body["document"]["scans"][0]["result"]
    table = f"results/{result}/activations"
    mine = ada.get(f"{session.path}/{table}").content
    assert guest.get(f"/api/shared/{table}", headers=by(link)).content == mine
    listed = ada.get(f"{session.path}/shares").json()
    assert [(each["id"], each["label"]) for each in listed] == [(link["id"], "Grace")]
    assert "token" not in listed[0]
    with world.sessions.reading() as database:
        recorded = list(database.execute(text("SELECT action FROM audit")).scalars())
        (kept,) = database.execute(text("SELECT digest FROM shares")).scalars()
    assert recorded[-1] == "session_shared"
    assert link["token"] not in kept


def test_a_links_reader_is_not_shut_out_by_a_database_that_does_not_answer(
    ada: httpx.Client, guest: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = made(ada)
    link = shared(ada, session.path)
    with guest.stream("GET", "/api/shared/events", headers=by(link)) as response:
        stream = Stream(response)
        assert next(stream).name == "saved"
        assert Unanswered(monkeypatch, shares, "followed").passes()
        read(save(ada, session, view={"layer": 3}))
        assert next(stream).data["number"] == 2
        ada.delete(f"{session.path}/shares/{link['id']}")
        assert list(stream) == []


def test_a_link_ends_when_it_is_revoked_or_over(
    ada: httpx.Client, guest: httpx.Client, world: World
) -> None:
    session = made(ada)
    link, brief = shared(ada, session.path), shared(ada, session.path, expires_in_seconds=60)
    with guest.stream("GET", "/api/shared/events", headers=by(link)) as response:
        stream = Stream(response)
        assert next(stream).name == "saved"
        ended = ada.delete(f"{session.path}/shares/{link['id']}")
        assert ended.json()["revoked_at"] is not None
        assert list(stream) == [], "a stream ends with its link"
    refused = guest.get("/api/shared", headers=by(link))
    assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (
        404,
        "unknown-share",
    )
    assert guest.get("/api/shared", headers=by(brief)).status_code == 200
    with world.sessions.writing() as database:
        database.execute(update(SHARES).values(expires_at=1.0))
    assert guest.get("/api/shared", headers=by(brief)).status_code == 404
    assert ada.delete(f"{session.path}/shares/{'0' * 12}").status_code == 404
    for token in ("", "x", "A" * 22, link["token"] + "A"):
        assert guest.get("/api/shared", headers={"share-token": token}).status_code in (400, 404)
    assert guest.get("/api/shared").status_code == 400
    deleted = shared(ada, session.path)
    ada.delete(session.path)
    assert guest.get("/api/shared", headers=by(deleted)).status_code == 404


def test_a_link_allows_what_it_says_and_no_more(
    ada: httpx.Client, guest: httpx.Client, shared_door: Door, world: World
) -> None:
    session = made(ada, scanned(ada, world))
    read_only = shared(ada, session.path)
    fork, add = (shared(ada, session.path, access=access) for access in ("fork", "contribute"))
    with shared_door.user(world, "bob") as bob:
        assert bob.post("/api/shared/fork", json={}, headers=by(read_only)).status_code == 403
        assert guest.post("/api/shared/fork", json={}, headers=by(fork)).status_code == 401
        mine = read(
            bob.post("/api/shared/fork", json={"name": "Bob's"}, headers=by(fork)), status=201
        )
        assert (mine.revision, mine.body["owner"]) == (session.revision, "bob")
        assert bob.get(f"{mine.path}/results").status_code == 200
        job = scanned(bob, world, "a b")
        wanted = {"job": job, "label": "Bob's"}
        assert bob.post("/api/shared/scans", headers=by(fork), json=wanted).status_code == 403
        assert bob.post("/api/shared/scans", headers=by(add), json=wanted).status_code == 200
        after = read(ada.get(session.path)).body
        assert [scan["label"] for scan in after["document"]["scans"]] == ["", "Bob's"]
        assert ada.get(f"{session.path}/revisions").json()[0]["author"] == "bob"
        theirs = bob.post("/api/shared/scans", json={"job": scanned(ada, world)}, headers=by(add))
        assert theirs.status_code == 404, "nobody adds another's scan"
        assert bob.get(session.path).status_code == 404
        old = {"revision": session.revision}
        assert bob.post("/api/shared/fork", json=old, headers=by(fork)).status_code == 404


SECRET = "Zwölf Boxkämpfer jagen Viktor quer"
WORDS = ("Zwölf", "Boxkämpfer", "jagen", "Viktor", "quer")


def test_a_redacted_link_gives_no_word_of_a_prompt_away(
    ada: httpx.Client, guest: httpx.Client, world: World
) -> None:
    jobs = [scanned(ada, world, SECRET)]
    for path, body in (
        ("/api/perturb", {"perturbations": [{"operation": "zero", "component": "blocks.0.mlp"}]}),
        ("/api/scan/circuits", {}),
        ("/api/scan/anomaly", {}),
        ("/api/perturb/trace", {"subject": "Viktor"}),
    ):
        jobs.append(ada.post(path, json={"prompt": SECRET, **body}).json()["id"])
        world.perform(world.claim(world.queue()))
    session = made(
        ada,
        *jobs,
        name=f"About {WORDS[3]}",
        notes=[{"text": f"Here {WORDS[1].upper()} is written by blocks.0.mlp", "scan": jobs[0]}],
        key_images=[{"caption": f"See {WORDS[0]}", "view": {"token": WORDS[3], "mode": "fMRI"}}],
        view={"prompt": SECRET, "layer": 1, "mode": "fMRI"},
    )
    link = shared(ada, session.path, redact=True)
    opened = read(guest.get("/api/shared", headers=by(link)))
    document = opened.body["document"]
    assert opened.body["redacted"]
    assert document["view"] == {"prompt": "[redacted]", "layer": 1, "mode": "fMRI"}
    assert document["notes"][0]["text"] == "Here [redacted] is written by blocks.0.mlp"
    assert document["notes"][0]["scan"] == document["scans"][0]["result"]
    assert opened.body["name"] == "About [redacted]"
    export = guest.get("/api/shared/export", headers=by(link))
    results = guest.get("/api/shared/results", headers=by(link))
    archive = open_archive(io.BytesIO(export.content), largest=10**8)
    assert archive.manifest.revision == opened.revision
    assert [scan["result"] for scan in document["scans"]] == [
        digest
        for scan in document["scans"]
        for digest in archive.results
        if digest == scan["result"]
    ]
    hashes = {
        scan[name] for scan in session.body["document"]["scans"] for name in ("result", "scan_key")
    }
    reached = [msgspec.json.encode(opened.body), export.content, results.content]
    for manifest in archive.results.values():
        assert set(manifest.prompt_tokens) <= {""}
        for ref in manifest.tables:
            digest = next(d for d, m in archive.results.items() if m is manifest)
            path = f"/api/shared/results/{digest}/{ref.name}"
            alone = guest.get(path, headers=by(link)).content
            assert alone == archive.chunk(ref.chunk)
            reached.append(alone)
            table = from_ipc(alone)
            assert not [name for name in table.column_names if name.endswith("_id")] or all(
                set(table.column(name).to_pylist()) <= {-1}
                for name in table.column_names
                if name.endswith("_id")
            )
    for said in reached:
        for word in (*WORDS, *(word.lower() for word in WORDS)):
            assert word.encode() not in said, word
        for digest in (*hashes, session.revision):
            assert digest.encode() not in said, "a guessed prompt could be told by its hash"
    # The numbers are those that were measured.
    own = ada.get(f"/api/jobs/{jobs[0]}/result/activations").content
    shown = archive.chunk(next(iter(archive.results[document["scans"][0]["result"]].tables)).chunk)
    names = [ref.name for ref in archive.results[document["scans"][0]["result"]].tables]
    assert names[0] == "activations"
    assert from_ipc(shown).column("value") == from_ipc(own).column("value")
    with guest.stream("GET", "/api/shared/events", headers=by(link)) as response:
        told = next(Stream(response))
        assert (told.data["revision"], told.data["name"]) == ("", "")
    refused = ada.post(f"{session.path}/shares", json={"redact": True, "access": "fork"})
    assert refused.status_code == 400


def test_a_view_that_an_earlier_release_kept_is_shown_as_deep_as_one_may_be(
    ada: httpx.Client, guest: httpx.Client, world: World
) -> None:
    session = made(ada)
    link = shared(ada, session.path, redact=True)
    document = msgspec.structs.replace(SessionDocument(), view={"in": deep(498)})
    with world.sessions.writing() as database:
        body = session_revisions.encode_document(document).decode()
        database.execute(update(SESSION_REVISIONS).values(document=body))
    opened = guest.get("/api/shared", headers=by(link))
    assert opened.status_code == 200, opened.text
    view = opened.json()["document"]["view"]
    assert depth_of(view) == MOST_DEPTH
    assert REDACTED in str(view)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_no_table_of_any_kind_keeps_a_text_of_somebodys(name: str) -> None:
    schema: TableSchema = SCHEMAS[name]
    plain = {"component": "embed", "kind": "embed"}
    row = {
        field.name: plain.get(field.name, SECRET) if str(field.type) == "string" else 0
        for field in schema.fields
        if str(field.type) in ("string", "int32", "int16")
    }
    row = {key: ("word" if key in OURS else value) for key, value in row.items()}
    if any(str(field.type).startswith("list") for field in schema.fields):
        row |= {f.name: [] for f in schema.fields if str(f.type).startswith("list")}
    table = filled(name, [row], note=SECRET)
    shown = redacted_table(table, "0" * 64)
    assert SECRET not in str(shown.to_pylist())
    assert SECRET not in str(provenance_of(shown))
    assert shown.schema.names == table.schema.names
    for field in schema.fields:
        if field.name.endswith("_id"):
            assert shown.column(field.name).to_pylist() == [-1]


OURS = {
    *("component", "kind", "quantity", "role", "lens", "channel", "part", "circuit"),
    *("name", "dtype", "tied_to", "source", "target"),
}
"""Columns whose words are the service's own, or a model's."""


def test_a_links_token_stands_in_no_log(
    ada: httpx.Client, guest: httpx.Client, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    link = shared(ada, made(ada).path)
    guest.get("/api/shared", headers=by(link))
    captured = capfd.readouterr()
    assert link["token"] not in captured.out + captured.err
    assert PROMPT not in captured.out
