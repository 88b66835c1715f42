"""How a session is named in the shell: by its id, its address in the viewer, or a link to it.

A link is a key of its own: it is followed to its service without the caller's API key, unless that is the service
the caller uses, so that nobody's link collects keys.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import typer

from neural_mri.cli import options
from neural_mri.client import Client
from neural_mri.client.sessions import OpenedSession, SharedSession
from neural_mri.contract.sessions import SessionDetail, SessionEvent

__all__ = ("Kept", "Place", "reached_own", "reaching", "read_own", "read_place", "whole_revision")

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22}")


@dataclass(frozen=True)
class Place:
    """Where a session is: its id, or a link's token; and the service, where that is named."""

    session: UUID | None = None
    token: str | None = None
    service: str | None = None


def read_place(text: str) -> Place:
    """An id, an address or a link. Raises `typer.BadParameter`."""
    address, mark, fragment = text.partition("#")
    if not mark:
        return Place(session=_uuid(text))
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise typer.BadParameter(f"this is no link: {error}") from error
    service = address.rstrip("/") or None
    if service is not None and (parts.scheme not in {"http", "https"} or not parts.netloc):
        raise typer.BadParameter(
            "this is no link: expected one that begins with http:// or https://"
        )
    named = {name: values[0] for name, values in parse_qs(fragment).items()}
    if (token := named.get("shared")) is not None:
        if _TOKEN.fullmatch(token) is None:
            raise typer.BadParameter("this is no whole link: expected 22 letters after shared=")
        return Place(token=token, service=service)
    return Place(session=_uuid(named.get("session", text)), service=service)


def read_own(text: str) -> Place:
    """An id or an address, for what a link does not allow. Raises `typer.BadParameter`."""
    place = read_place(text)
    if place.token is not None:
        raise typer.BadParameter(
            "this is a link, which does not allow that: expected the id of a session of yours"
        )
    return place


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a session's id: expected a UUID, or a link to the session"
        ) from None


class Kept(ABC):
    """A session that was found, and what can be done with it."""

    @abstractmethod
    def get(self, revision: str | None = None) -> SessionDetail:
        """The document."""

    @abstractmethod
    def open(self, revision: str | None = None) -> OpenedSession:
        """The session with every table in it."""

    @abstractmethod
    def fork(self, name: str | None, revision: str | None = None) -> SessionDetail:
        """A session of the caller's own."""

    @abstractmethod
    def add(self, job: UUID, label: str) -> SessionDetail:
        """Add a scan."""

    @abstractmethod
    def export(self, path: Path, revision: str | None = None) -> None:
        """Write it into a file."""

    @abstractmethod
    def watch(self) -> Iterator[SessionEvent]:
        """Its events."""


class _Own(Kept):
    def __init__(self, client: Client, session: UUID) -> None:
        self._client = client
        self._session = session

    def get(self, revision: str | None = None) -> SessionDetail:
        revision = whole_revision(self._client, self._session, revision)
        return self._client.sessions.get(self._session, revision=revision)

    def open(self, revision: str | None = None) -> OpenedSession:
        revision = whole_revision(self._client, self._session, revision)
        return self._client.sessions.open(self._session, revision=revision)

    def fork(self, name: str | None, revision: str | None = None) -> SessionDetail:
        revision = whole_revision(self._client, self._session, revision)
        return self._client.sessions.fork(self._session, name, revision=revision)

    def add(self, job: UUID, label: str) -> SessionDetail:
        return self._client.sessions.add(self._session, job, label=label)

    def export(self, path: Path, revision: str | None = None) -> None:
        revision = whole_revision(self._client, self._session, revision)
        self._client.sessions.export(self._session, path, revision=revision)

    def watch(self) -> Iterator[SessionEvent]:
        return self._client.sessions.watch(self._session)


class _Linked(Kept):
    def __init__(self, shared: SharedSession) -> None:
        self._shared = shared

    def get(self, revision: str | None = None) -> SessionDetail:
        _only_latest(revision)
        return self._shared.get()

    def open(self, revision: str | None = None) -> OpenedSession:
        _only_latest(revision)
        return self._shared.open()

    def fork(self, name: str | None, revision: str | None = None) -> SessionDetail:
        _only_latest(revision)
        return self._shared.fork(name)

    def add(self, job: UUID, label: str) -> SessionDetail:
        return self._shared.add(job, label=label)

    def export(self, path: Path, revision: str | None = None) -> None:
        _only_latest(revision)
        self._shared.export(path)

    def watch(self) -> Iterator[SessionEvent]:
        return self._shared.watch()


def _only_latest(revision: str | None) -> None:
    if revision is not None:
        raise typer.BadParameter(
            "a link leads to the latest revision alone", param_hint="--revision"
        )


@contextmanager
def reaching(place: Place, url: str | None, *, as_oneself: bool = False) -> Iterator[Kept]:
    """The session at a place. `as_oneself` says that a link alone is not enough for what is wanted."""
    if place.session is not None:
        with reached_own(place, url) as client:
            yield _Own(client, place.session)
        return
    with options.open_client(url) as client:
        if place.service in (None, client.base_url):
            yield _Linked(client.sessions.shared(place.token or ""))
            return
        if as_oneself:
            raise _elsewhere(place, client)
    # Nothing of the caller's goes to a service that only a link names.
    with Client(place.service, timeout_seconds=options.timeout.get(), api_key="") as stranger:
        yield _Linked(stranger.sessions.shared(place.token or ""))


@contextmanager
def reached_own(place: Place, url: str | None) -> Iterator[Client]:
    """The service that has a session of the caller's. Raises `typer.BadParameter` where another was named."""
    with options.open_client(url) as client:
        if place.service not in (None, client.base_url):
            raise _elsewhere(place, client)
        yield client


def _elsewhere(place: Place, client: Client) -> typer.BadParameter:
    return typer.BadParameter(
        f"this is at {place.service}, and you are asking {client.base_url}: to go there with your own key, "
        f"add --url {place.service}"
    )


def whole_revision(
    client: Client, session: UUID, digits: str | None, *, option: str = "--revision"
) -> str | None:
    """The name of a revision of which an option gave some digits. Raises `typer.BadParameter`."""
    if digits is None or len(digits) == 64:
        return digits
    try:
        return client.sessions.revision(session, digits)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
