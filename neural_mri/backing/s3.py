"""The object store on S3, or on any server that speaks its protocol.

An object is seen whole or not at all: that is S3's own promise, for one request and for an upload in
parts alike, and every request is signed over the hash of its body. Credentials come from the environment
as every AWS client reads them (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, a web identity,
an instance's role); so does AWS_REGION.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import obstore.store
from obstore.exceptions import BaseError

from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import (
    Missing,
    NamedBytes,
    StoreFull,
    StoreUnavailable,
    Writing,
    checked,
)

__all__ = ("S3Store", "open_s3")

CONNECT_SECONDS = 2
REQUEST_SECONDS = 30
RETRIES = 3
RETRY_SECONDS = 15
"""After these the store counts as away; jobs are recomputed, requests sent again."""

SENDERS = 8
"""Objects sent at once."""
_SENDERS = ThreadPoolExecutor(SENDERS, thread_name_prefix="store-sender")

_FULL = ("507 Insufficient Storage", "QuotaExceeded", "StorageFull")
"""What servers answer that have no room: the status, Ceph's word, and MinIO's (XMinioStorageFull)."""
_BEYOND = "416 Range Not Satisfiable"
"""What they answer where an object ends before the part that is asked for."""


class S3Store:
    """A store in a bucket, under a prefix."""

    def __init__(
        self, bucket: str, prefix: str = "", *, endpoint: str = "", region: str = "us-east-1"
    ) -> None:
        self._store = obstore.store.S3Store(
            bucket,
            prefix=prefix or None,
            config={"region": region, "endpoint": endpoint} if endpoint else {"region": region},
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            retry_config={
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_SECONDS),
            },
        )

    def put(self, path: str, body: bytes) -> None:
        """Keep the bytes under the path, all of them or none. Raises `StoreFull`."""
        with _explained(path):
            obstore.put(self._store, path, body)

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        """Begin to send files. Raises `StoreFull`."""
        return _Uploads(self, files)

    def copy(self, path: str, to: str) -> None:
        """Have the bucket keep the bytes under another path as well. Raises `Missing`, `StoreFull`."""
        checked(to)
        with _explained(path):
            obstore.copy(self._store, path, to)

    def get(self, path: str) -> bytes:
        """The bytes under the path. Raises `Missing`."""
        with _explained(path):
            return obstore.get(self._store, path).bytes().to_bytes()

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` up to `end`, by one request; fewer at the end. Raises `Missing`."""
        checked(path)
        if start >= end:
            return b""
        with _explained(path):
            try:
                return obstore.get_range(self._store, path, start=start, end=end).to_bytes()
            except BaseError as error:
                if _BEYOND not in str(error):
                    raise
                return b""

    def exists(self, path: str) -> bool:
        """Whether there are bytes under the path."""
        try:
            self.size(path)
        except Missing:
            return False
        return True

    def size(self, path: str) -> int:
        """How many bytes there are. Raises `Missing`."""
        with _explained(path):
            return obstore.head(self._store, path)["size"]

    def local_path(self, path: str) -> Path | None:
        """None: no file of this machine has them."""
        checked(path)
        return None

    def delete(self, path: str) -> None:
        """Forget the bytes; nothing happens where there are none."""
        with _explained(path):
            obstore.delete(self._store, path)

    def sweep(self, older_seconds: float) -> int:  # noqa: ARG002  a bucket shows no half objects
        """Nothing: an object is there when it is whole."""
        return 0

    def aged(self, folder: str, older_seconds: float) -> Iterator[str]:
        """Paths in a folder under which bytes have stood for so long, in no order."""
        before = datetime.now(UTC) - timedelta(seconds=older_seconds)
        with _explained(folder):
            # As many as one request gives.
            for page in obstore.list(self._store, prefix=folder, chunk_size=1000):
                yield from (found["path"] for found in page if found["last_modified"] < before)

    def beginning(self, folder: str, names: Collection[str]) -> Iterator[str]:
        """Paths in a folder whose last name begins as one of these does, by a request for each."""
        for name in sorted(names):
            yield from self._beginning(folder, f"{folder}/{name}")

    def _beginning(self, folder: str, start: str) -> Iterator[str]:
        with _explained(folder):
            # A bucket lists its paths in order, and from wherever it is told to.
            for page in obstore.list(self._store, prefix=folder, offset=start, chunk_size=1000):
                for found in page:
                    if not found["path"].startswith(start):
                        return
                    yield found["path"]


class _Uploads:
    """Objects on their way to the bucket: each is there when it is whole, the last is sent by itself."""

    def __init__(self, store: S3Store, files: Iterable[NamedBytes]) -> None:
        self._store = store
        self._sending: list[Future[None]] = []
        self._last: NamedBytes | None = None
        try:
            for file in files:
                if self._last is not None:
                    self._send(self._last)
                self._last = file
        except BaseException:
            self.drop()
            raise

    def _send(self, file: NamedBytes) -> None:
        # Who is sent is in memory until it is there.
        for earlier in self._sending[:-SENDERS]:
            earlier.result()
        self._sending.append(_SENDERS.submit(self._store.put, file.path, file.body))

    def flush(self) -> None:
        """Nothing: all that may be sent before the others is on its way."""

    def place(self, placed: Callable[[int], None], last: Callable[[], None] = lambda: None) -> None:
        """Wait for all but the last, then send it."""
        for index, sent in enumerate(self._sending):
            sent.result()
            placed(index)
        last()
        if self._last is not None:
            self._send(self._last)

    def settles(self, within: float) -> bool:
        """Whether the last is there: for so many seconds it is waited for here."""
        return not wait(self._sending, within).not_done

    def settle(self) -> None:
        """Wait for the last."""
        for sent in self._sending:
            sent.result()

    def drop(self) -> None:
        """Send no more."""
        for sent in self._sending:
            sent.cancel()
        wait(self._sending)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns the server's refusals into ours, in a line: its own go on for pages."""
    checked(path)
    try:
        yield
    except FileNotFoundError as error:
        # A bucket that is not there says nothing about what was stored in it.
        if "NoSuchBucket" in str(error):
            raise StoreUnavailable("the result store's bucket does not exist", path=path) from error
        raise Missing(f"the store has no {path}", path=path) from error
    except (BaseError, OSError) as error:
        said = str(error)
        if any(word in said for word in _FULL):
            raise StoreFull(f"{path} was not stored: no room in the bucket", path=path) from error
        reason = said.partition("\n")[0]
        raise StoreUnavailable(f"{path}: {reason}", path=path) from error


def open_s3(settings: Settings) -> S3Store:
    """The bucket that `NEURAL_MRI_STORE_URL` names."""
    url = urlsplit(settings.store_url)
    environment = os.environ
    return S3Store(
        url.netloc,
        url.path.strip("/"),
        endpoint=settings.store_endpoint or environment.get("AWS_ENDPOINT_URL", ""),
        region=environment.get("AWS_REGION")
        or environment.get("AWS_DEFAULT_REGION")
        or "us-east-1",
    )
