"""Results: in short, in full, in parts, and never other bytes than those that were written."""

import hashlib
from pathlib import Path

import httpx
import pyarrow as pa
import pytest

from api import results
from api.files import FilePart
from neural_mri.backing import keys
from neural_mri.backing.records import Job
from neural_mri.contract.jobs import JobState
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM, from_ipc, provenance_of
from tests.api.specimens import PROMPT, TINY
from tests.api.world import World
from tests.servers import folder_only

N_TOKENS = 7


@pytest.fixture(params=["one file", "table by table"])
def done(request: pytest.FixtureRequest, api: httpx.Client, world: World) -> Job:
    """A finished fMRI scan."""
    world.packs = request.param == "one file"
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    return world.perform(world.claim(world.queue()))


def url(job: Job, rest: str = "") -> str:
    return f"/api/jobs/{job.id}/result{rest}"


def test_the_summary_is_what_is_served_unless_arrow_is_asked_for(
    api: httpx.Client, done: Job
) -> None:
    answer = api.get(url(done))
    assert answer.headers["content-type"] == "application/json"
    summary = answer.json()
    assert summary["scan_mode"] == "fMRI"
    assert summary["data"]["embed"]["shape"] == [N_TOKENS, TINY.d_model]
    patterns = summary["data"]["blocks.1.attn"]["attention_patterns"]
    assert patterns == {
        "shape": [4, N_TOKENS, N_TOKENS],
        "data_url": f"/api/jobs/{done.id}/attention/1",
    }


def test_a_summary_leads_to_every_table(api: httpx.Client, done: Job) -> None:
    links = api.get(url(done)).json()["tables"]
    assert set(links) == {"activations", "neurons", "predictions"}
    for link in links.values():
        answer = api.get(link["data_url"])
        assert answer.headers["content-type"] == ARROW_FILE
        assert len(answer.content) == link["bytes"]
        assert from_ipc(answer.content).num_rows == link["rows"]


@pytest.mark.parametrize("accept", [ARROW_FILE, f"{ARROW_FILE};q=0.9, application/json;q=0.1"])
def test_the_main_table_is_served_as_an_arrow_file(
    api: httpx.Client, world: World, done: Job, accept: str
) -> None:
    answer = api.get(url(done), headers={"accept": accept})
    assert answer.headers["content-type"] == ARROW_FILE
    assert answer.content == world.table(done, "activations")
    assert provenance_of(from_ipc(answer.content)).unit == "L2 norm"


def test_the_streaming_format_holds_the_same_table(
    api: httpx.Client, world: World, done: Job
) -> None:
    answer = api.get(url(done, "/neurons"), headers={"accept": ARROW_STREAM})
    assert answer.headers["content-type"] == ARROW_STREAM
    stored = from_ipc(world.table(done, "neurons"))
    with pa.ipc.open_stream(answer.content) as reader:
        table = reader.read_all()
    assert table.equals(stored, check_metadata=True)
    known = api.get(
        url(done, "/neurons"),
        headers={"accept": ARROW_STREAM, "if-none-match": answer.headers["etag"]},
    )
    assert (known.status_code, known.content) == (304, b"")


def test_a_form_that_is_not_to_be_had_is_refused_with_those_that_are(
    api: httpx.Client, done: Job
) -> None:
    for path in (url(done), url(done, "/activations")):
        answer = api.get(path, headers={"accept": "text/csv"})
        assert answer.status_code == 406
        assert ARROW_FILE in answer.json()["offers"]
    assert api.get(url(done, "/tokens"), headers={"accept": "application/json"}).status_code == 406


def test_the_manifest_names_every_table_by_its_hash(
    api: httpx.Client, world: World, done: Job
) -> None:
    manifest = api.get(f"/api/jobs/{done.id}/manifest").json()
    for ref in manifest["tables"]:
        answer = api.get(url(done, f"/{ref['name']}"))
        assert hashlib.sha256(answer.content).hexdigest() == ref["chunk"]
        assert answer.headers["etag"] == f'"{ref["chunk"]}"'
        assert len(answer.content) == ref["bytes"]


def test_a_table_may_be_kept_for_ever_and_is_not_sent_twice(api: httpx.Client, done: Job) -> None:
    first = api.get(url(done, "/activations"))
    assert first.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert first.headers["accept-ranges"] == "bytes"
    assert first.headers["vary"] == "accept"
    for condition in (first.headers["etag"], "*", f'"other", W/{first.headers["etag"]}'):
        again = api.get(url(done, "/activations"), headers={"if-none-match": condition})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    other = api.get(url(done, "/activations"), headers={"if-none-match": '"other"'})
    assert other.status_code == 200


def test_parts_of_a_table_put_together_are_the_table(api: httpx.Client, done: Job) -> None:
    whole = api.get(url(done, "/activations")).content
    size, step, parts = len(whole), 1000, []
    for start in range(0, size, step):
        answer = api.get(
            url(done, "/activations"), headers={"range": f"bytes={start}-{start + step - 1}"}
        )
        assert answer.status_code == 206
        end = min(start + step, size) - 1
        assert answer.headers["content-range"] == f"bytes {start}-{end}/{size}"
        parts.append(answer.content)
    assert b"".join(parts) == whole


@pytest.mark.parametrize(
    ("byte_range", "status"),
    [
        ("bytes=0-0", 206),
        ("bytes=-10", 206),
        ("bytes=5-", 206),
        ("bytes=-99999999", 206),
        ("bytes=99999999-", 416),
        ("bytes=-0", 416),
        ("bytes=9-3", 200),
        ("bytes=0-1,5-6", 200),
        ("bytes=-", 200),
        ("lines=1-2", 200),
    ],
)
def test_ranges_are_read_as_the_rfc_has_them(
    api: httpx.Client, done: Job, byte_range: str, status: int
) -> None:
    whole = api.get(url(done, "/activations")).content
    answer = api.get(url(done, "/activations"), headers={"range": byte_range})
    assert answer.status_code == status
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(whole)}"
    elif status == 200:
        assert answer.content == whole
    else:
        assert answer.content in whole


def test_a_part_of_another_version_is_not_sent(api: httpx.Client, done: Job) -> None:
    etag = api.get(url(done, "/activations")).headers["etag"]
    part = {"range": "bytes=0-3"}
    same = api.get(url(done, "/activations"), headers={**part, "if-range": etag})
    other = api.get(url(done, "/activations"), headers={**part, "if-range": '"older"'})
    assert (same.status_code, len(same.content)) == (206, 4)
    assert (other.status_code, len(other.content) > 4) == (200, True)


def test_headers_alone_say_how_long_a_table_is(api: httpx.Client, done: Job) -> None:
    whole = api.get(url(done, "/activations"))
    head = api.head(url(done, "/activations"))
    assert head.content == b""
    for name in ("content-length", "etag", "content-type", "accept-ranges"):
        assert head.headers[name] == whole.headers[name]


def test_a_long_table_is_sent_whole(api: httpx.Client, world: World, tmp_path: Path) -> None:
    """Longer than one read, so that it goes out in several."""
    prompt = "T" * 60
    api.post("/api/scan/attention", json={"prompt": prompt, "layers": [0]})
    job = world.perform(world.claim(world.queue()))
    n_tokens = job.n_tokens
    answer = api.get(url(job, "/attention.0"))
    table = from_ipc(answer.content)
    assert table.column("value").type.list_size == n_tokens**2
    assert answer.content == world.table(job, "attention.0")


def test_a_table_that_is_not_there_is_refused_with_those_that_are(
    api: httpx.Client, done: Job
) -> None:
    answer = api.get(url(done, "/entrails"))
    assert answer.status_code == 404
    assert answer.json()["tables"] == ["activations", "neurons", "predictions"]
    for trick in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "activations%00"):
        assert api.get(url(done, f"/{trick}")).status_code == 404


def test_there_is_no_result_before_the_job_has_succeeded(api: httpx.Client, world: World) -> None:
    job = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()
    for path in ("result", "manifest", "result/activations"):
        answer = api.get(f"/api/jobs/{job['id']}/{path}")
        assert answer.status_code == 409
        assert answer.json()["type"] == "urn:neural-mri:problem:result-not-ready"
        assert answer.json()["state"] == "queued"


@pytest.mark.parametrize("harm", ["flipped", "cut short", "lost"])
def test_damaged_bytes_are_never_served(
    api: httpx.Client, world: World, done: Job, harm: str
) -> None:
    assert api.get(url(done, "/activations")).status_code == 200  # seen to be whole once
    world.harm(done, "activations", harm)
    for path in ("", "/activations"):
        answer = api.get(url(done, path))
        assert answer.status_code == 410, path
        assert answer.json()["job"] == str(done.id)
        assert str(world.settings.folder) not in answer.text
    # The next scan of the same does not answer with it.
    again = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()
    assert again["state"] == "queued"
    world.perform(world.claim(world.queue()))
    assert api.get(again["links"]["self"] + "/result/activations").status_code == 200


def test_a_lost_manifest_is_gone(api: httpx.Client, world: World, done: Job) -> None:
    assert done.manifest is not None
    world.store.delete(done.manifest)
    assert api.get(f"/api/jobs/{done.id}/manifest").status_code == 410


@folder_only
def test_a_table_is_hashed_once_and_again_when_its_file_changes(
    api: httpx.Client, world: World, done: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[FilePart] = []
    plain = results._sha256

    def counting(part: FilePart) -> str:
        hashed.append(part)
        return plain(part)

    monkeypatch.setattr(results, "_sha256", counting)
    results._verified_parts.clear()
    for _ in range(3):
        api.get(url(done, "/neurons"))
    assert len(hashed) == 1
    world.file(done, "neurons").file.touch()
    api.get(url(done, "/neurons"))
    assert len(hashed) == 2
    api.get(url(done, "/activations"))
    assert len(hashed) == 3, "another table, of the same file or not, is seen for itself"


def answers(api: httpx.Client, job: Job) -> list[tuple[int, dict[str, str], bytes]]:
    """Everything there is to ask about a job's result."""
    tables = api.get(f"/api/jobs/{job.id}/manifest").json()["tables"]
    etag = {ref["name"]: f'"{ref["chunk"]}"' for ref in tables}
    asked: list[tuple[str, str, dict[str, str]]] = [
        ("GET", f"/api/jobs/{job.id}/manifest", {}),
        ("GET", url(job), {}),
    ]
    for ref in tables:
        asked += [
            (method, url(job, f"/{ref['name']}"), {"accept": ARROW_FILE, **headers})
            for method in ("GET", "HEAD")
            for headers in (
                {},
                {"range": "bytes=0-0"},
                {"range": "bytes=100-199"},
                {"range": "bytes=-7"},
                {"range": f"bytes={ref['bytes'] - 1}-{ref['bytes'] + 99}"},
                {"range": f"bytes={ref['bytes']}-"},
                {"range": "bytes=3-9", "if-range": etag[ref["name"]]},
                {"range": "bytes=3-9", "if-range": '"another"'},
                {"if-none-match": etag[ref["name"]]},
                {"accept": ARROW_STREAM},
            )
        ]
    found = [api.request(method, path, headers=headers) for method, path, headers in asked]
    told_by_chance = {"date", "server", "x-request-id"}
    return [
        (
            answer.status_code,
            {name: text for name, text in answer.headers.items() if name not in told_by_chance},
            answer.content,
        )
        for answer in found
    ]


def test_a_result_in_one_file_is_answered_byte_for_byte_as_one_that_is_not(
    api: httpx.Client, world: World
) -> None:
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    job = world.perform(world.claim(world.queue()))
    packed = answers(api, job)
    world.unpack(job)
    assert answers(api, job) == packed
    assert {status for status, _, _ in packed} == {200, 206, 304, 416}


def test_of_a_damaged_file_the_other_tables_are_served(api: httpx.Client, world: World) -> None:
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    job = world.perform(world.claim(world.queue()))
    whole = world.table(job, "activations")
    world.harm(job, "neurons", "flipped")
    assert api.get(url(job, "/neurons")).status_code == 410
    assert api.get(url(job, "/activations")).content == whole
    again = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()
    assert again["state"] == "queued", "a result is whole or computed again"


def test_attention_is_measured_when_it_is_first_asked_for(
    api: httpx.Client, world: World, done: Job
) -> None:
    path = f"/api/jobs/{done.id}/attention/1"
    pending = api.get(path, headers={"prefer": "wait=0", "accept": ARROW_FILE})
    assert pending.status_code == 202
    job = pending.json()
    assert pending.headers["location"] == job["links"]["self"]
    assert job["request"] == {
        "scan_mode": "attention",
        "model": "tiny",
        "prompt": PROMPT,
        "layers": [1],
        "canonical": False,
    }
    # Asked for again meanwhile, it is not measured twice.
    assert api.get(path, headers={"prefer": "wait=0"}).json()["id"] == job["id"]
    world.perform(world.claim(world.queue()))
    answer = api.get(path, headers={"accept": ARROW_FILE})
    assert answer.status_code == 200
    table = from_ipc(answer.content)
    assert table.num_rows == TINY.n_heads
    assert table.column("value").type.list_size == N_TOKENS**2
    part = api.get(path, headers={"range": "bytes=0-7"})
    assert (part.status_code, part.content) == (206, answer.content[:8])


def test_who_asks_for_attention_is_kept_waiting_a_while(
    api: httpx.Client, world: World, done: Job
) -> None:
    with world.working(world.queue()):
        answer = api.get(f"/api/jobs/{done.id}/attention/0")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == ARROW_FILE


def test_an_attention_scan_answers_for_its_own_layers(api: httpx.Client, world: World) -> None:
    api.post("/api/scan/attention", json={"prompt": PROMPT, "layers": [0]})
    job = world.perform(world.claim(world.queue()))
    assert api.get(f"/api/jobs/{job.id}/attention/0").status_code == 200
    assert world.redis.llen(world.queue()) == 0


def test_attention_that_cannot_be_measured_is_refused(
    api: httpx.Client, world: World, done: Job
) -> None:
    beyond = api.get(f"/api/jobs/{done.id}/attention/2")
    assert beyond.status_code == 422
    assert beyond.json()["component"] == "blocks.2.attn"
    assert api.get(f"/api/jobs/{done.id}/attention/-1").status_code == 400
    api.post("/api/scan/structural", json={})
    structural = world.perform(world.claim(keys.CPU_QUEUE))
    answer = api.get(f"/api/jobs/{structural.id}/attention/0")
    assert answer.status_code == 422
    assert "read no prompt" in answer.json()["detail"]


def test_attention_that_failed_says_why(api: httpx.Client, world: World, done: Job) -> None:
    def fail() -> None:
        job = world.claim(world.queue())
        world.move(job, JobState.FAILED, problem={"detail": "the device is on fire"})

    with world.beside(fail):
        answer = api.get(f"/api/jobs/{done.id}/attention/0")
    assert answer.status_code == 409
    assert "the device is on fire" in answer.json()["detail"]


def test_old_results_of_a_model_with_new_weights_are_kept_apart(
    api: httpx.Client, world: World, done: Job
) -> None:
    world.register("tiny", weights="retrained")
    assert api.get(url(done, "/activations")).status_code == 200
    assert api.get(url(done)).status_code == 409
    assert api.get(f"/api/jobs/{done.id}/attention/0").status_code == 409
    assert api.post("/api/scan/activation", json={"prompt": PROMPT}).json()["cached"] is False


def test_a_structural_result_is_summarised_and_served(api: httpx.Client, world: World) -> None:
    job = api.post("/api/scan/structural", json={}).json()
    world.perform(world.claim(keys.CPU_QUEUE))
    summary = api.get(f"/api/jobs/{job['id']}/result").json()
    assert summary["scan_mode"] == "T1"
    assert summary["total_parameters"] == 10 * len(summary["data"])
    main = api.get(f"/api/jobs/{job['id']}/result", headers={"accept": ARROW_FILE})
    assert provenance_of(from_ipc(main.content)).table == "topology"
