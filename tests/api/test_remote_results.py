"""Results that are kept in a bucket: the same answers, and never more bytes fetched than are asked for."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pyarrow as pa
import pytest

from neural_mri.backing import keys
from neural_mri.backing.records import Job
from neural_mri.backing.storage import load_manifest
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM, TableRef, from_ipc
from tests.api.conftest import settings_in
from tests.api.specimens import PROMPT
from tests.api.world import World, serving
from tests.servers import Bucket, Valkey, bucket


@pytest.fixture
def remote(shared_bucket: Bucket) -> Bucket:
    return shared_bucket


@pytest.fixture
def distant(
    template: Path, tmp_path: Path, shared_valkey: Valkey, remote: Bucket
) -> Iterator[World]:
    settings = msgspec.structs.replace(
        settings_in(template, tmp_path, shared_valkey.url),
        store_url=remote.url(tmp_path.name),
        store_endpoint=remote.endpoint,
    )
    world = World(settings=settings)
    world.redis.flushall()
    world.register()
    yield world
    world.close()


@pytest.fixture
def served(distant: World) -> Iterator[httpx.Client]:
    with serving(distant.settings) as client:
        yield client


@pytest.fixture
def done(served: httpx.Client, distant: World) -> Job:
    """A finished fMRI scan."""
    served.post("/api/scan/activation", json={"prompt": PROMPT})
    return distant.perform(distant.claim(distant.queue()))


def ref_of(world: World, job: Job, name: str) -> TableRef:
    ref = load_manifest(world.store, job.manifest or "").table(name)
    assert ref is not None
    return ref


def test_a_result_in_a_bucket_is_answered_like_one_in_a_folder(
    served: httpx.Client, distant: World, done: Job
) -> None:
    url = f"/api/jobs/{done.id}/result"
    assert served.get(url).json()["scan_mode"] == "fMRI"
    ref = ref_of(distant, done, "activations")
    whole = served.get(f"{url}/activations", headers={"accept": ARROW_FILE})
    assert whole.content == distant.store.get(keys.chunk_path(ref.chunk))
    assert whole.headers["etag"] == f'"{ref.chunk}"'
    stream = served.get(f"{url}/activations", headers={"accept": ARROW_STREAM})
    with pa.ipc.open_stream(stream.content) as reader:
        assert reader.read_all().equals(from_ipc(whole.content), check_metadata=True)
    head = served.head(f"{url}/activations")
    assert (head.headers["content-length"], head.content) == (str(ref.bytes), b"")


def test_a_part_is_one_request_for_that_part(
    served: httpx.Client, distant: World, done: Job, remote: Bucket
) -> None:
    ref = ref_of(distant, done, "activations")
    path = keys.chunk_path(ref.chunk)
    body = distant.store.get(path)
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


def test_what_is_known_or_impossible_fetches_nothing(
    served: httpx.Client, distant: World, done: Job, remote: Bucket
) -> None:
    ref = ref_of(distant, done, "activations")
    before = len(remote.requests())
    url = f"/api/jobs/{done.id}/result/activations"
    assert served.get(url, headers={"if-none-match": f'"{ref.chunk}"'}).status_code == 304
    assert served.get(url, headers={"range": "bytes=99999999-"}).status_code == 416
    assert not [each for each in remote.requests()[before:] if keys.chunk_path(ref.chunk) in each]


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=100-199"}])
@pytest.mark.parametrize("loss", ["deleted", "cut short"])
def test_what_is_lost_in_the_bucket_is_gone_and_computed_again(
    served: httpx.Client, distant: World, done: Job, headers: dict[str, str], loss: str
) -> None:
    path = keys.chunk_path(ref_of(distant, done, "activations").chunk)
    if loss == "deleted":
        distant.store.delete(path)
    else:
        distant.store.put(path, distant.store.get(path)[:150])
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
