"""Results that are kept in a bucket: the same answers, and never more bytes fetched than are asked for."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pyarrow as pa
import pytest

import api.distant
from neural_mri.backing import stored
from neural_mri.backing.records import Job
from neural_mri.backing.s3 import S3Store
from neural_mri.backing.stored import StoredTable
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM, from_ipc
from tests.api.conftest import settings_in
from tests.api.specimens import PROMPT
from tests.api.world import World, inhabited, serving
from tests.servers import Bucket, Template, Valkey, bucket


@pytest.fixture
def remote(shared_bucket: Bucket) -> Bucket:
    return shared_bucket


@pytest.fixture
def distant(
    template: Template, tmp_path: Path, shared_valkey: Valkey, remote: Bucket
) -> Iterator[World]:
    settings = msgspec.structs.replace(
        settings_in(template, tmp_path, shared_valkey.url),
        store_url=remote.url(tmp_path.name),
        store_endpoint=remote.endpoint,
    )
    with inhabited(settings) as world:
        yield world


@pytest.fixture
def served(distant: World) -> Iterator[httpx.Client]:
    with serving(distant.settings) as client:
        yield client


@pytest.fixture(params=["one file", "table by table"])
def done(request: pytest.FixtureRequest, served: httpx.Client, distant: World) -> Job:
    """A finished fMRI scan."""
    distant.packs = request.param == "one file"
    served.post("/api/scan/activation", json={"prompt": PROMPT})
    return distant.perform(distant.claim(distant.queue()))


def table_of(world: World, job: Job, name: str) -> StoredTable:
    table = world.result(job).table(name)
    assert table is not None
    return table


def test_a_result_in_a_bucket_is_answered_like_one_in_a_folder(
    served: httpx.Client, distant: World, done: Job
) -> None:
    url = f"/api/jobs/{done.id}/result"
    assert served.get(url).json()["scan_mode"] == "fMRI"
    ref = table_of(distant, done, "activations").ref
    whole = served.get(f"{url}/activations", headers={"accept": ARROW_FILE})
    assert whole.content == distant.table(done, "activations")
    assert whole.headers["etag"] == f'"{ref.chunk}"'
    stream = served.get(f"{url}/activations", headers={"accept": ARROW_STREAM})
    with pa.ipc.open_stream(stream.content) as reader:
        assert reader.read_all().equals(from_ipc(whole.content), check_metadata=True)
    head = served.head(f"{url}/activations")
    assert (head.headers["content-length"], head.content) == (str(ref.bytes), b"")


def test_a_part_is_one_request_for_that_part(
    served: httpx.Client, distant: World, done: Job, remote: Bucket
) -> None:
    path, body = table_of(distant, done, "activations").path, distant.table(done, "activations")
    before = len(remote.requests())
    url = f"/api/jobs/{done.id}/result/activations"
    part = served.get(url, headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, body[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(body)}"
    asked = [each for each in remote.requests()[before:] if path in each]
    assert len(asked) == 1
    assert asked[0].startswith("GET ")
    last = served.get(url, headers={"range": "bytes=-7"})
    assert last.content == body[-7:]


def test_of_a_large_file_the_head_is_read_and_then_what_is_asked_for(
    served: httpx.Client, distant: World, remote: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "HEAD_BYTES", 100)  # less than the manifest: it is read in two
    served.post("/api/scan/activation", json={"prompt": PROMPT})
    job = distant.perform(distant.claim(distant.queue()))
    body = distant.table(job, "neurons")

    def asked(headers: dict[str, str]) -> tuple[bytes, list[str]]:
        before = len(remote.requests())
        answer = served.get(f"/api/jobs/{job.id}/result/neurons", headers=headers)
        made = [each for each in remote.requests()[before:] if str(job.id) in each]
        return answer.content, [each.split()[0] for each in made]

    head = asked({"if-none-match": "*"})[1]
    assert 1 < len(head) <= 4
    for headers, part in (({}, body), ({"range": "bytes=10-19"}, body[10:20])):
        assert asked(headers) == (part, [*head, "GET"])
    before = len(remote.requests())
    assert served.get(f"/api/jobs/{job.id}/result").json()["scan_mode"] == "fMRI"
    made = [each for each in remote.requests()[before:] if "packed" in each]
    assert len(made) == 1, "a summary takes the whole at once"


class TestPieceByPiece:
    """A table is never in memory as a whole, however many ask for it."""

    PIECE = 300

    @pytest.fixture
    def table(self, monkeypatch: pytest.MonkeyPatch, distant: World, done: Job) -> StoredTable:
        """One of several pieces."""
        table = table_of(distant, done, "neurons")
        assert table.ref.bytes > 3 * self.PIECE
        monkeypatch.setattr(api.distant, "PIECE_BYTES", self.PIECE)
        # Of one file, what stands before the table is read with its manifest, and no more.
        monkeypatch.setattr(stored, "HEAD_BYTES", max(100, table.start))
        return table

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch, table: StoredTable) -> list[int]:
        """How many bytes of the table were read at once, each time."""
        sizes: list[int] = []
        get_range = S3Store.get_range

        def counted(store: S3Store, path: str, start: int, end: int) -> bytes:
            if path == table.path and start >= table.start:
                sizes.append(end - start)
            return get_range(store, path, start, end)

        monkeypatch.setattr(S3Store, "get_range", counted)
        return sizes

    @pytest.mark.parametrize("accept", [ARROW_FILE, ARROW_STREAM])
    def test_the_whole_is_seen_to_once_and_sent(
        self,
        served: httpx.Client,
        distant: World,
        done: Job,
        table: StoredTable,
        read: list[int],
        accept: str,
    ) -> None:
        url, body = f"/api/jobs/{done.id}/result/neurons", distant.table(done, "neurons")
        counts = []
        for _ in range(2):
            read.clear()
            answer = served.get(url, headers={"accept": accept})
            if accept == ARROW_FILE:
                assert answer.content == body
            else:
                with pa.ipc.open_stream(answer.content) as reader:
                    assert reader.read_all().equals(from_ipc(body), check_metadata=True)
            assert max(read) <= self.PIECE
            counts.append(sum(read))
        assert counts[0] == counts[1] + table.ref.bytes
        part = served.get(url, headers={"accept": ARROW_FILE, "range": "bytes=10-1999"})
        assert part.content == body[10:2000]

    def test_one_that_is_damaged_is_not_begun_with(
        self,
        served: httpx.Client,
        distant: World,
        done: Job,
        table: StoredTable,
        read: list[int],
    ) -> None:
        whole = bytearray(distant.store.get(table.path))
        whole[table.start + 1000] ^= 1
        distant.store.put(table.path, bytes(whole))
        for accept in (ARROW_FILE, ARROW_STREAM):
            url = f"/api/jobs/{done.id}/result/neurons"
            assert served.get(url, headers={"accept": accept}).status_code == 410
        assert max(read) <= self.PIECE


def test_a_session_keeps_what_is_in_a_bucket_without_the_jobs_own_object(
    served: httpx.Client, distant: World, done: Job
) -> None:
    body = distant.table(done, "activations")
    answer = served.post("/api/sessions", json={"name": "Far", "scans": [{"job": str(done.id)}]})
    assert answer.status_code == 201
    distant.store.delete(done.manifest or "")
    view = answer.json()
    [scan] = view["document"]["scans"]
    url = f"{view['links']['self']}/results/{scan['result']}/activations"
    assert served.get(url).content == body
    assert served.get(url, headers={"range": "bytes=5-9"}).content == body[5:10]


def test_what_is_known_or_impossible_fetches_nothing(
    served: httpx.Client, distant: World, done: Job, remote: Bucket
) -> None:
    table = table_of(distant, done, "activations")
    before = len(remote.requests())
    url = f"/api/jobs/{done.id}/result/activations"
    assert served.get(url, headers={"if-none-match": f'"{table.ref.chunk}"'}).status_code == 304
    assert served.get(url, headers={"range": "bytes=99999999-"}).status_code == 416
    asked = [each for each in remote.requests()[before:] if "tokenizers" not in each]
    assert len(asked) == 2, "the manifest, once each"
    assert all(done.manifest in each for each in asked if done.manifest)


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=100-199"}])
@pytest.mark.parametrize("loss", ["deleted", "cut short"])
def test_what_is_lost_in_the_bucket_is_gone_and_computed_again(
    served: httpx.Client, distant: World, done: Job, headers: dict[str, str], loss: str
) -> None:
    table = table_of(distant, done, "activations")
    if loss == "deleted":
        distant.store.delete(table.path)
    else:
        distant.store.put(table.path, distant.store.get(table.path)[: table.start + 150])
    gone = served.get(f"/api/jobs/{done.id}/result/activations", headers=headers)
    assert gone.status_code == 410
    assert gone.json()["job"] == str(done.id)
    again = served.post("/api/scan/activation", json={"prompt": PROMPT})
    assert again.status_code == 202
    assert not again.json()["cached"]


class TestWithoutTheBucket:
    """A store that is away is no store that has lost what it held."""

    @pytest.fixture
    def remote(self) -> Iterator[Bucket]:
        with bucket() as own:
            yield own

    def test_results_are_asked_for_again_rather_than_computed_again(
        self, served: httpx.Client, distant: World, done: Job, remote: Bucket
    ) -> None:
        remote.kill()
        for headers in ({}, {"accept": ARROW_FILE}, {"range": "bytes=100-199"}):
            away = served.get(f"/api/jobs/{done.id}/result/activations", headers=headers)
            assert away.status_code == 503
            assert away.headers["retry-after"]
            assert "bytes" not in away.headers.get("content-range", "")
        job = distant.job(str(done.id))
        assert (job.state, job.manifest) == (done.state, done.manifest)
