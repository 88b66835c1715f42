"""What a bucket can do that a folder cannot: be away, refuse, answer half."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from neural_mri.backing import s3, storage
from neural_mri.backing.s3 import S3Store
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings
from neural_mri.backing.storage import StoreFull, StoreUnavailable
from tests.servers import Bucket, free_port

PATH = "chunks/ab/x.arrow"

Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, shared_bucket: Bucket) -> None:
    """Gives up soon. The shared bucket brings credentials."""
    monkeypatch.setattr(s3, "RETRIES", 1)
    monkeypatch.setattr(s3, "REQUEST_SECONDS", 1)


@contextmanager
def server(answer: Answer) -> Iterator[S3Store]:
    """A store whose server answers as told."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_PUT = do_GET  # noqa: N815 (http.server asks for the name)

        def log_message(self, *_: object) -> None:
            """Quietly."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield S3Store("results", endpoint=f"http://127.0.0.1:{served.server_address[1]}")
        finally:
            served.shutdown()
            thread.join()


def saying(status: int, code: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers.get("content-length", 0)))
        request.send_response(status)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


def breaking_off(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("content-length", "1000")
    request.send_header("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT")
    request.send_header("etag", '"x"')
    request.end_headers()
    request.wfile.write(b"half")
    request.close_connection = True


def test_a_server_that_is_away_is_unavailable() -> None:
    store = S3Store("results", endpoint=f"http://127.0.0.1:{free_port()}")
    for call in (store.get, store.size, store.exists, store.delete):
        with pytest.raises(StoreUnavailable, match=PATH):
            call(PATH)
    with pytest.raises(StoreUnavailable) as caught:
        store.put(PATH, b"x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"), [(507, "XMinioStorageFull"), (403, "QuotaExceeded"), (507, "Whatever")]
)
def test_a_bucket_without_room_says_so(status: int, code: str) -> None:
    with server(saying(status, code)) as store, pytest.raises(StoreFull, match=PATH):
        store.put(PATH, b"x")


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (500, "InternalError"), (503, "SlowDown")]
)
def test_a_refusal_is_not_taken_for_a_lost_result(status: int, code: str) -> None:
    with server(saying(status, code)) as store:
        for call in (store.get, lambda path: store.put(path, b"x")):
            with pytest.raises(StoreUnavailable) as caught:
                call(PATH)
            assert type(caught.value) is StoreUnavailable


def test_an_answer_that_breaks_off_is_not_taken_for_the_whole() -> None:
    with server(breaking_off) as store, pytest.raises(StoreUnavailable):
        store.get(PATH)


def test_a_bucket_that_does_not_exist_is_not_taken_for_a_lost_result(shared_bucket: Bucket) -> None:
    store = S3Store("elsewhere", endpoint=shared_bucket.endpoint)
    for call in (store.get, lambda path: store.put(path, b"x")):
        with pytest.raises(StoreUnavailable, match="bucket does not exist"):
            call(PATH)


def test_a_part_costs_one_request(shared_bucket: Bucket) -> None:
    store = S3Store(Bucket.NAME, "counted", endpoint=shared_bucket.endpoint)
    store.put(PATH, b"arrow")
    before = len(shared_bucket.requests())
    assert store.get_range(PATH, 1, 3) == b"rr"
    assert shared_bucket.requests()[before:] == [f"GET /results/counted/{PATH}"]


def test_the_endpoint_may_come_from_the_environment(
    shared_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", shared_bucket.endpoint)
    store = storage.open_store(Settings(store_url="s3://results/by-environment"))
    store.put(PATH, b"x")
    assert store.get(PATH) == b"x"


@pytest.mark.parametrize(
    "url", ["s3://", "s3://UPPER", "https://results", "s3://results/../x y", "results", "s3://a"]
)
def test_what_names_no_bucket_is_refused_at_start(url: str) -> None:
    with pytest.raises(InvalidSettings, match="NEURAL_MRI_STORE_URL is"):
        load_settings({"NEURAL_MRI_STORE_URL": url})


def test_a_secret_in_the_endpoint_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="NEURAL_MRI_STORE_ENDPOINT is") as caught:
        load_settings({"NEURAL_MRI_STORE_ENDPOINT": "https://ada:lovelace@minio:9000"})
    assert "lovelace" not in str(caught.value)


def test_without_the_library_the_setting_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "neural_mri.backing.s3")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InvalidSettings, match=r"neural-mri\[s3\]"):
        storage.open_store(Settings(store_url="s3://results"))
