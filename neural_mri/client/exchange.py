"""One HTTP exchange with the service: a request out, a value or one of `errors` back.

A request whose answer was lost, or that met a service which was away or full, is sent again where that can do
no harm, for as long as the caller has patience. The only module that knows httpx's exceptions and problem
documents on the wire.
"""

import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from typing import IO, Any, TypeVar
from uuid import uuid4

import httpx
import msgspec

from neural_mri import __version__
from neural_mri.client.errors import (
    ClientClosed,
    ClientError,
    Late,
    NotUnderstood,
    Refused,
    Unreachable,
)
from neural_mri.client.patience import Patience, Transfer
from neural_mri.client.sockets import Sockets
from neural_mri.contract.auth import KEY_PATTERN
from neural_mri.contract.problems import MEDIA_TYPE

__all__ = (
    "DEFAULT_URL",
    "IDEMPOTENCY_KEY",
    "KEY_VARIABLE",
    "PARTING_SECONDS",
    "PATIENCE_VARIABLE",
    "QUIET_SECONDS",
    "TIMEOUT_VARIABLE",
    "URL_VARIABLE",
    "Exchange",
    "FileBody",
    "decoded",
    "once",
    "pieces",
    "require",
)

DEFAULT_URL = "http://127.0.0.1:8642"
URL_VARIABLE = "NMRI_URL"
"""Not `NEURAL_MRI_*`: those are the processes' settings, and they refuse one they do not know."""
KEY_VARIABLE = "NMRI_API_KEY"
PATIENCE_VARIABLE = "NMRI_PATIENCE"
"""Seconds for which every call goes on trying, where the program says nothing else."""
TIMEOUT_VARIABLE = "NMRI_TIMEOUT"
"""Seconds for which an answer to any one request is waited for, where the program says nothing else."""
IDEMPOTENCY_KEY = "Idempotency-Key"

QUIET_SECONDS = 60.0
"""Silence after which a stream is given up and opened again; the service comments every 15 s."""

PARTING_SECONDS = 3.0
"""For what is still to be said by somebody who has been interrupted, and waits to be let go."""

_PATIENCE_SECONDS = 60.0
_TIMEOUT_SECONDS = 30.0
_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})
"""Methods of which two requests do what one does (RFC 9110, section 9.2.2)."""

_NEVER_SENT = (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol)
"""Errors before a request has left."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")

T = TypeVar("T")


class Exchange:
    """Requests to one service, over a pool of connections. Usable from several threads at once."""

    def __init__(
        self,
        base_url: str | None,
        *,
        timeout_seconds: float | None,
        patience_seconds: float | None,
        headers: Mapping[str, str],
        api_key: str | None = None,
    ) -> None:
        self.patience_seconds = (
            _seconds(PATIENCE_VARIABLE, _PATIENCE_SECONDS)
            if patience_seconds is None
            else patience_seconds
        )
        self._timeout_seconds = (
            _seconds(TIMEOUT_VARIABLE, _TIMEOUT_SECONDS, least=0.001)
            if timeout_seconds is None
            else timeout_seconds
        )
        self._left = Event()
        self._was_heard = False
        self._sockets = Sockets()
        self.base_url = _checked_url(base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL)
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=self._timeout_seconds,
            headers={
                "User-Agent": f"neural-mri/{__version__}",
                **_authorization(os.environ.get(KEY_VARIABLE) if api_key is None else api_key),
                **headers,
            },
            # A proxy named in the environment cannot reach this machine's own loopback.
            trust_env=httpx.URL(self.base_url).host not in _LOOPBACK,
        )

    def close(self) -> None:
        """Close the connections. What waits for an answer ends now, with `Unreachable`; later requests raise `ClientClosed`."""
        self._left.set()
        self._sockets.shut_down()
        self._http.close()

    def patience(self, most_seconds: float = math.inf) -> Patience:
        """What one call has, from now on."""
        return Patience(min(self.patience_seconds, most_seconds), self._left)

    def persist(
        self,
        attempt: Callable[[Transfer], T],
        *,
        repeatable: bool = True,
        most_seconds: float = math.inf,
    ) -> T:
        """What an attempt gives, made again while it meets what passes. Raises what it raised at last.

        The attempt tells the transfer it is given of all that it sends and receives.
        """
        patience = self.patience(most_seconds)
        transfer = Transfer(patience)
        while True:
            transfer.begin()
            try:
                return attempt(transfer)
            except (Unreachable, Refused) as error:
                patience.bear(error, repeatable=repeatable, met=self._was_heard)

    def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | Iterable[bytes] | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        answers: Container[int] = (),
        repeatable: bool | None = None,
        most_seconds: float = math.inf,
    ) -> httpx.Response:
        """The whole answer. Raises `Unreachable` or `Refused`.

        A body is JSON, unless the headers say otherwise; one in pieces is sent as they come. `answers` are
        statuses beside 2xx that carry an answer to this request, and are no refusal. `repeatable` says
        whether two such requests do what one does, where the method and the headers do not tell. A refusal for
        want of room did nothing, and is borne in any case. Nothing is borne, and no answer waited for, for longer
        than `most_seconds`.
        """
        sent = dict(headers or {})
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        if repeatable is None:
            repeatable = IDEMPOTENCY_KEY in sent or (
                method in _REPEATABLE and "If-Match" not in sent
            )

        seconds = min(self._timeout_seconds, most_seconds)

        def attempt(transfer: Transfer) -> httpx.Response:
            content = body if body is None or isinstance(body, bytes) else transfer.told(body)
            with (
                self._reaching(seconds),
                self._http.stream(
                    method,
                    path,
                    content=content,
                    params=query,
                    headers=sent,
                    timeout=seconds,
                    extensions=self._sockets.extensions,
                ) as answer,
            ):
                is_answer = answer.is_success or answer.status_code in answers
                # A refusal, however long, is not what the call waits for.
                received = transfer.told(answer.iter_raw()) if is_answer else answer.iter_raw()
                response = _whole(answer, b"".join(received))
            return response if response.status_code in answers else _accepted(response)

        if isinstance(body, Iterator):
            # What is read as it is sent cannot be sent again from the start.
            return attempt(Transfer(self.patience()))
        return self.persist(
            attempt,
            repeatable=repeatable,
            most_seconds=most_seconds,
        )

    def ask(
        self,
        wanted: type[T],
        method: str,
        path: str,
        *,
        body: bytes | Iterable[bytes] | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        answers: Container[int] = (),
        repeatable: bool | None = None,
        most_seconds: float = math.inf,
    ) -> T:
        """The answer's JSON as a `wanted`. Raises `Unreachable`, `Refused` or `NotUnderstood`."""
        response = self.send(
            method,
            path,
            body=body,
            query=query,
            headers={"Accept": "application/json", **(headers or {})},
            answers=answers,
            repeatable=repeatable,
            most_seconds=most_seconds,
        )
        return decoded(wanted, response)

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        headers: Mapping[str, str],
        quiet_seconds: float,
        query: Mapping[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        """An answer read as it arrives; silence of `quiet_seconds` counts as a broken connection.

        Of the timeout, where that is longer. Tried once: who reads it knows where it would have to go on.
        """
        quiet_seconds = max(quiet_seconds, self._timeout_seconds)
        timeout = httpx.Timeout(self._timeout_seconds, read=quiet_seconds)
        with (
            self._reaching(quiet_seconds),
            self._http.stream(
                "GET",
                path,
                headers=headers,
                params=query,
                timeout=timeout,
                extensions=self._sockets.extensions,
            ) as response,
        ):
            self._was_heard = True
            if not response.is_success:
                response.read()
            yield _accepted(response)

    def download(
        self,
        path: str,
        file: IO[bytes],
        wanted: str,
        *,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None = None,
    ) -> None:
        """Write an answer of any length into a file; from its start again where the connection breaks.

        Raises `NotUnderstood` where the answer is of another media type than the one wanted.
        """

        def attempt(transfer: Transfer) -> None:
            file.seek(0)
            file.truncate()
            with self.stream(
                path, headers=headers, quiet_seconds=QUIET_SECONDS, query=query
            ) as response:
                require(response, wanted)
                for chunk in transfer.told(response.iter_bytes()):
                    file.write(chunk)

        self.persist(attempt)

    @contextmanager
    def _reaching(self, seconds: float) -> Iterator[None]:
        if self._left.is_set():
            raise ClientClosed
        try:
            yield
        except (httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Unreachable(self.base_url, "no answer in time", sent=False) from error
        except httpx.TimeoutException as error:
            raise Late(self.base_url, seconds) from error
        except httpx.LocalProtocolError as error:
            # It would be no better the next time: a header of the caller's, most likely.
            raise ClientError(f"the request cannot be sent as it is: {error}") from error
        except httpx.TransportError as error:
            reason = _ERRNO.sub("", str(error)).lower() or type(error).__name__
            sent = not isinstance(error, _NEVER_SENT)
            raise Unreachable(self.base_url, reason, sent=sent, broken=sent) from error
        except RuntimeError as error:
            if not self._left.is_set():
                raise
            raise ClientClosed from error  # between the look and the request
        self._was_heard = True


class FileBody:
    """A file's bytes, from its start whenever they are sent."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from pieces(file)


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    """The rest of a file, some at a time."""
    while piece := file.read(1 << 20):
        yield piece


def once(word: str | None) -> dict[str, str]:
    """The header under which a request may be sent twice and is done once: the caller's word, or a new one."""
    return {IDEMPOTENCY_KEY: str(uuid4()) if word is None else word}


def decoded(wanted: type[T], response: httpx.Response) -> T:
    """An answer's JSON. Unknown fields are passed over: a newer service may say more."""
    try:
        return msgspec.json.decode(response.content, type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotUnderstood(
            f"{response.request.method} {response.request.url} answered what this version "
            f"({__version__}) cannot read: {error}"
        ) from error


def require(response: httpx.Response, wanted: str, called: str | None = None) -> None:
    """Raises `NotUnderstood` where the answer is of another media type than the one wanted.

    Whoever else answers, a gateway's page or another program, will not know better the next time.
    """
    found = response.headers.get("content-type", "nothing")
    if found.partition(";")[0].strip().lower() != wanted:
        raise NotUnderstood(
            f"{response.request.url} answers with {found}: expected {called or wanted}"
        )


def _whole(answer: httpx.Response, body: bytes) -> httpx.Response:
    """An answer with its body, which has been received as it was sent."""
    return httpx.Response(
        answer.status_code,
        headers=answer.headers,
        content=body,
        request=answer.request,
        extensions=answer.extensions,
    )


def _accepted(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise Refused(
        _problem(response),
        status=response.status_code,
        retry_after_seconds=_retry_after(response),
    )


def _problem(response: httpx.Response) -> dict[str, Any]:
    """The problem document; one made from the status where something between us answered instead."""
    if response.headers.get("content-type", "").partition(";")[0].strip() == MEDIA_TYPE:
        try:
            return msgspec.json.decode(response.content, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass  # said below, as any other answer that is no problem document
    request = response.request
    return {
        "type": "about:blank",
        "title": response.reason_phrase or "Unknown status",
        "status": response.status_code,
        "detail": (
            f"{request.method} {request.url} was answered {response.status_code} "
            f"{response.reason_phrase}, without a problem document: is this a Neural MRI service?"
        ),
    }


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After, which may be a moment as well (RFC 9110, section 10.2.3)."""
    said = response.headers.get("retry-after", "")
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        moment = parsedate_to_datetime(said)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _seconds(variable: str, usual: float, *, least: float = 0.0) -> float:
    """What the environment says, or the usual. Raises `ValueError`."""
    said = os.environ.get(variable) or str(usual)
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not least <= seconds < math.inf:
        raise ValueError(f"{variable} is {said!r}: expected seconds, {least:g} or more")
    return seconds


def _authorization(api_key: str | None) -> dict[str, str]:
    """The header that names the caller. Raises `ValueError`, which does not repeat what may be a secret."""
    if not api_key or not (key := api_key.strip()):
        return {}
    if KEY_PATTERN.fullmatch(key) is None:
        raise ValueError(f"the API key ({KEY_VARIABLE}) is none: expected nmri_<id>_<secret>")
    return {"Authorization": f"Bearer {key}"}


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is not an address: {error}") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError(f"{url!r} is not an address: expected something like {DEFAULT_URL}")
    return url.rstrip("/")
