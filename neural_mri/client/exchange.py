"""One HTTP exchange with the service: a request out, a value or one of `errors` back.

The only module that knows httpx's exceptions and problem documents on the wire.
"""

import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import msgspec

from neural_mri import __version__
from neural_mri.client.errors import NotUnderstood, Refused, Unreachable
from neural_mri.contract.auth import KEY_PATTERN
from neural_mri.contract.problems import MEDIA_TYPE

__all__ = ("DEFAULT_URL", "KEY_VARIABLE", "URL_VARIABLE", "Exchange")

DEFAULT_URL = "http://127.0.0.1:8642"
URL_VARIABLE = "NMRI_URL"
"""Not `NEURAL_MRI_*`: those are the processes' settings, and they refuse one they do not know."""
KEY_VARIABLE = "NMRI_API_KEY"

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")

T = TypeVar("T")


class Exchange:
    """Requests to one service, over a pool of connections. Usable from several threads at once."""

    def __init__(
        self,
        base_url: str | None,
        *,
        timeout_seconds: float,
        patience_seconds: float,
        headers: Mapping[str, str],
        api_key: str | None = None,
    ) -> None:
        self.patience_seconds = patience_seconds
        self._timeout_seconds = timeout_seconds
        self.base_url = _checked_url(base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL)
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=timeout_seconds,
            headers={
                "User-Agent": f"neural-mri/{__version__}",
                **_authorization(api_key or os.environ.get(KEY_VARIABLE)),
                **headers,
            },
            # A proxy named in the environment cannot reach this machine's own loopback.
            trust_env=httpx.URL(self.base_url).host not in _LOOPBACK,
        )

    def close(self) -> None:
        """Close the connections; requests after this raise `RuntimeError`."""
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | Iterable[bytes] | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        answers: Container[int] = (),
    ) -> httpx.Response:
        """The whole answer. Raises `Unreachable` or `Refused`.

        A body is JSON, unless the headers say otherwise; one in pieces is sent as they come. `answers` are
        statuses beside 2xx that carry an answer to this request, and are no refusal.
        """
        sent = dict(headers or {})
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        with self._reaching():
            response = self._http.request(method, path, content=body, params=query, headers=sent)
        return response if response.status_code in answers else _accepted(response)

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
    ) -> T:
        """The answer's JSON as a `wanted`. Raises `Unreachable`, `Refused` or `NotUnderstood`."""
        response = self.send(
            method,
            path,
            body=body,
            query=query,
            headers={"Accept": "application/json", **(headers or {})},
            answers=answers,
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
        """An answer read as it arrives; silence of `quiet_seconds` counts as a broken connection."""
        timeout = httpx.Timeout(self._timeout_seconds, read=quiet_seconds)
        with (
            self._reaching(),
            self._http.stream(
                "GET", path, headers=headers, params=query, timeout=timeout
            ) as response,
        ):
            if not response.is_success:
                response.read()
            yield _accepted(response)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise Unreachable(self.base_url, "no answer in time") from error
        except httpx.TransportError as error:
            reason = _ERRNO.sub("", str(error)).lower() or type(error).__name__
            raise Unreachable(self.base_url, reason) from error


def decoded(wanted: type[T], response: httpx.Response) -> T:
    """An answer's JSON. Unknown fields are passed over: a newer service may say more."""
    try:
        return msgspec.json.decode(response.content, type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotUnderstood(
            f"{response.request.method} {response.request.url} answered what this version "
            f"({__version__}) cannot read: {error}"
        ) from error


def _accepted(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise Refused(_problem(response))


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
