"""Sessions from Python: kept, opened without a worker, compared, shared, taken away as a file.

session = mri.sessions.create("Eiffel", [scan_a, scan_b], notes=[Note(text="Layer 21")])
opened = mri.sessions.open(session.id)   # two requests, however many tables
opened.results[0].plot()
mri.sessions.export(session.id, Path("eiffel.nmri"))
read_file(Path("eiffel.nmri")).results   # needs no service at all
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeAlias
from uuid import UUID

import msgspec

from neural_mri.client.errors import Damaged, NotUnderstood, Refused
from neural_mri.client.exchange import DEFAULT_URL, Exchange, FileBody, decoded
from neural_mri.client.replacing import replacing
from neural_mri.client.result import Result
from neural_mri.client.watching import NO_HEADERS, messages
from neural_mri.contract.archives import SESSION_FILE, Archive, InvalidArchive, open_archive
from neural_mri.contract.jobs import JobView
from neural_mri.contract.perturbations import Perturbation
from neural_mri.contract.results import Manifest
from neural_mri.contract.sessions import (
    CreatedShare,
    KeyImage,
    NewScan,
    NewSession,
    NewShare,
    Note,
    RevisionView,
    ScanReference,
    SessionChanges,
    SessionClosed,
    SessionDetail,
    SessionDifference,
    SessionDocument,
    SessionEvent,
    SessionFork,
    SessionPage,
    SessionSave,
    SessionView,
    ShareAccess,
    ShareView,
    UnknownSession,
    decode_session_event,
)

__all__ = (
    "KeptResult",
    "OpenedSession",
    "ScanLike",
    "SessionReference",
    "Sessions",
    "SharedSession",
    "read_file",
)

SessionReference: TypeAlias = SessionView | UUID | str
ScanLike: TypeAlias = Result | JobView | UUID | str | ScanReference
"""A scan to be kept: what a client gave for it, or its job's id."""

_NAMES = frozenset({"saved", "scan", "closed"})
_LARGEST_FILE = 1 << 36
_SPOOLED = 64 << 20
_PAGE = 1000


class KeptResult(Result):
    """A result out of a session: its tables are here already."""

    def __init__(self, exchange: Exchange, archive: Archive, digest: str) -> None:
        manifest: Manifest = archive.results[digest]
        super().__init__(exchange, UUID(int=0), manifest)
        self.digest = digest
        self._archive = archive

    def arrow(self, name: str | None = None) -> bytes:
        """The bytes of a table's Arrow file. Raises `ValueError` where there is no such table."""
        return self._archive.chunk(self._ref(name or self.main_table).chunk)

    def summary(self) -> dict[str, Any]:
        """The manifest: a summary is the service's, and this needs none."""
        said: dict[str, Any] = msgspec.to_builtins(self.manifest)
        return said

    def _attention_on_demand(self, layer: int) -> Any:
        raise ValueError(
            f"the session holds no attention of layer {layer}: it holds "
            + (", ".join(map(str, self.attention_layers)) or "none")
        )


class OpenedSession:
    """A session and everything in it, read once. Use it as a context manager, or `close` it."""

    def __init__(
        self, exchange: Exchange, file: IO[bytes], document: SessionDocument, name: str
    ) -> None:
        self._file = file
        self.document = document
        self.name = name
        archive = _archive(file)
        self.results: tuple[KeptResult, ...] = tuple(
            KeptResult(exchange, archive, scan.result) for scan in document.scans
        )
        """In the session's order; `document.scans` has their labels."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go: tables that were not read cannot be read any more."""
        self._file.close()

    def labelled(self, label: str) -> KeptResult:
        """The scan of that label. Raises `ValueError` naming those there are."""
        for scan, result in zip(self.document.scans, self.results, strict=True):
            if scan.label == label:
                return result
        labels = sorted({scan.label for scan in self.document.scans if scan.label})
        raise ValueError(f"the session has no scan {label!r}, but {', '.join(labels) or 'none'}")


def read_file(path: Path) -> OpenedSession:
    """A session's file, without any service. Raises `Damaged`, which names what is wrong in it."""
    exchange = Exchange(
        DEFAULT_URL, timeout_seconds=1.0, patience_seconds=0.0, headers={}, api_key=""
    )
    return _opened(exchange, path.open("rb"), str(path))


def _opened(exchange: Exchange, file: IO[bytes], called: str) -> OpenedSession:
    """A session's file, opened; closed where it is none. Raises `Damaged`."""
    try:
        archive = open_archive(file, largest=_LARGEST_FILE)
        document = msgspec.json.decode(archive.document(), type=SessionDocument)
        return OpenedSession(exchange, file, document, archive.name)
    except (msgspec.DecodeError, InvalidArchive) as error:
        file.close()
        raise Damaged(f"{called}: {error}") from error
    except BaseException:
        file.close()
        raise


def _archive(file: IO[bytes]) -> Archive:
    try:
        return open_archive(file, largest=_LARGEST_FILE)
    except InvalidArchive as error:
        raise Damaged(error.detail) from error


class Sessions:
    """The sessions of one service. Raises as `Client` does."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def create(
        self,
        name: str,
        scans: Iterable[ScanLike] = (),
        *,
        perturbations: Iterable[Perturbation] = (),
        notes: Iterable[Note] = (),
        key_images: Iterable[KeyImage] = (),
        view: Mapping[str, Any] | None = None,
        labels: Sequence[str] = (),
        message: str = "",
    ) -> SessionDetail:
        """Make a session of scans, in order; `labels` name them one by one."""
        wanted = NewSession(
            name=name,
            scans=_references(scans, labels),
            perturbations=tuple(perturbations),
            notes=tuple(notes),
            key_images=tuple(key_images),
            view=dict(view or {}),
            message=message,
        )
        body = msgspec.json.encode(wanted)
        return self._exchange.ask(SessionDetail, "POST", "/api/sessions", body=body)

    def save(
        self,
        session: SessionDetail,
        *,
        scans: Iterable[ScanLike] | None = None,
        perturbations: Iterable[Perturbation] | None = None,
        notes: Iterable[Note] | None = None,
        key_images: Iterable[KeyImage] | None = None,
        view: Mapping[str, Any] | None = None,
        message: str = "",
    ) -> SessionDetail:
        """A new revision over the one that was read; what is left out stays as it is.

        Scans that were added since, as those that still ran then, stay behind the others. Raises `Refused` with status 412 where somebody has saved since: `members["head"]` names theirs.
        """
        held = session.document
        kept = tuple(ScanReference(result=s.result, label=s.label) for s in held.scans)
        wanted = SessionSave(
            scans=kept if scans is None else _references(scans, ()),
            perturbations=held.perturbations if perturbations is None else tuple(perturbations),
            notes=held.notes if notes is None else tuple(notes),
            key_images=held.key_images if key_images is None else tuple(key_images),
            view=held.view if view is None else dict(view),
            message=message,
        )
        return self._exchange.ask(
            SessionDetail,
            "PUT",
            _path(session),
            body=msgspec.json.encode(wanted),
            headers={"If-Match": f'"{session.opened}"'},
        )

    def add(self, session: SessionReference, scan: ScanLike, *, label: str = "") -> SessionDetail:
        """Add a scan to whatever the session holds; one that still runs is added when it has succeeded."""
        (reference,) = _references([scan], [label] if label else ())
        if reference.job is None:
            raise ValueError("a scan is added by its job: expected one of a job's")
        body = msgspec.json.encode(NewScan(job=reference.job, label=reference.label))
        return self._exchange.ask(SessionDetail, "POST", f"{_path(session)}/scans", body=body)

    def get(self, session: SessionReference, *, revision: str | None = None) -> SessionDetail:
        """A session's document, at its latest revision or another."""
        query = {} if revision is None else {"revision": revision}
        return self._exchange.ask(SessionDetail, "GET", _path(session), query=query)

    def open(self, session: SessionReference, *, revision: str | None = None) -> OpenedSession:
        """A session with every table in it, by two requests. No worker and no model need be there."""
        detail = self.get(session, revision=revision)
        path = f"{_path(session)}/results"
        file = _downloaded(self._exchange, path, query={"revision": detail.opened})
        return OpenedSession(self._exchange, file, detail.document, detail.name)

    def revisions(
        self, session: SessionReference, limit: int = 100, *, before: int | None = None
    ) -> list[RevisionView]:
        """The saves, the latest first; `before` the one of that number."""
        path, query = f"{_path(session)}/revisions", {"limit": str(limit)}
        if before is not None:
            query["before"] = str(before)
        return self._exchange.ask(list[RevisionView], "GET", path, query=query)

    def revision(self, session: SessionReference, digits: str) -> str:
        """The whole name of the revision that begins with these digits.

        Raises `ValueError` where there is none, or more than one.
        """
        found: list[RevisionView] = []
        before: int | None = None
        while page := self.revisions(session, _PAGE, before=before):
            found += (each for each in page if each.revision.startswith(digits))
            before = page[-1].number
            if before <= 1:
                break
        if len(found) == 1:
            return found[0].revision
        if not found:
            raise ValueError(f"the session has no revision {digits!r}")
        names = ", ".join(f"{each.revision[:16]}… (number {each.number})" for each in found[:5])
        raise ValueError(f"{digits!r} begins {len(found)} revisions: {names}: expected more digits")

    def rename(self, session: SessionReference, name: str) -> SessionView:
        """Give it another name."""
        return self._change(session, SessionChanges(name=name))

    def pin(self, session: SessionReference, *, pinned: bool = True) -> SessionView:
        """Let it stand first, or not any more."""
        return self._change(session, SessionChanges(pinned=pinned))

    def fork(
        self, session: SessionReference, name: str | None = None, *, revision: str | None = None
    ) -> SessionDetail:
        """A session of your own that begins where another stands."""
        body = msgspec.json.encode(SessionFork(name=name, revision=revision))
        return self._exchange.ask(SessionDetail, "POST", f"{_path(session)}/fork", body=body)

    def delete(self, session: SessionReference) -> None:
        """Delete it, its revisions and its links."""
        # The second of two would be told that there is no such session.
        self._exchange.send("DELETE", _path(session), repeatable=False)

    def difference(
        self,
        session: SessionReference,
        other: SessionReference,
        *,
        revision: str | None = None,
        other_revision: str | None = None,
        strongest: int = 20,
    ) -> SessionDifference:
        """What differs between two sessions, or two revisions of one."""
        query = {"other": _path(other).rpartition("/")[2], "strongest": str(strongest)}
        if revision is not None:
            query["revision"] = revision
        if other_revision is not None:
            query["other_revision"] = other_revision
        path = f"{_path(session)}/difference"
        return self._exchange.ask(SessionDifference, "GET", path, query=query)

    def export(self, session: SessionReference, path: Path, *, revision: str | None = None) -> None:
        """Write the session into one file: whole, or not at all."""
        query = {} if revision is None else {"revision": revision}
        with replacing(path) as file:
            self._exchange.download(
                f"{_path(session)}/export", file, SESSION_FILE, headers=NO_HEADERS, query=query
            )

    def import_file(self, path: Path) -> SessionDetail:
        """Take in a session's file. Raises `Refused`, whose `members["entry"]` names what is wrong in it."""
        return self._exchange.ask(
            SessionDetail,
            "POST",
            "/api/sessions/import",
            body=FileBody(path),
            headers={"Content-Type": SESSION_FILE},
        )

    def watch(self, session: SessionReference) -> Iterator[SessionEvent]:
        """A session's events, through broken connections, to `SessionClosed`: until it is deleted."""
        return _until_deleted(_events(self._exchange, f"{_path(session)}/events"))

    def share(
        self,
        session: SessionReference,
        *,
        access: ShareAccess | str = ShareAccess.READ,
        redact: bool = False,
        label: str = "",
        expires_in_seconds: float | None = None,
    ) -> CreatedShare:
        """Make a link to it; `redact` takes prompts and tokens out of everything that the link reaches."""
        wanted = NewShare(
            access=ShareAccess(access),
            redact=redact,
            label=label,
            expires_in_seconds=expires_in_seconds,
        )
        body = msgspec.json.encode(wanted)
        return self._exchange.ask(CreatedShare, "POST", f"{_path(session)}/shares", body=body)

    def shares(self, session: SessionReference) -> list[ShareView]:
        """Its links, newest first."""
        return self._exchange.ask(list[ShareView], "GET", f"{_path(session)}/shares")

    def revoke(self, session: SessionReference, share: ShareView | str) -> ShareView:
        """End a link for good."""
        share_id = share if isinstance(share, str) else share.id
        return self._exchange.ask(ShareView, "DELETE", f"{_path(session)}/shares/{share_id}")

    def shared(self, token: str) -> "SharedSession":
        """What a link leads to."""
        return SharedSession(self._exchange, token)

    def list(
        self,
        *,
        query: str = "",
        model: str | None = None,
        pinned: bool | None = None,
        limit: int | None = None,
    ) -> Iterator[SessionView]:
        """Your sessions, the pinned ones first, then those saved last; page by page as they are read."""
        asked = {"q": query} if query else {}
        if model is not None:
            asked["model"] = model
        if pinned is not None:
            asked["pinned"] = str(pinned).lower()
        after: str | None = None
        given = 0
        while True:
            place = {} if after is None else {"after": after}
            page = self._exchange.ask(SessionPage, "GET", "/api/sessions", query={**asked, **place})
            for view in page.sessions:
                if given == limit:
                    return
                given += 1
                yield view
            after = page.next
            if after is None:
                return

    def _change(self, session: SessionReference, changes: SessionChanges) -> SessionView:
        body = msgspec.json.encode(changes)
        return self._exchange.ask(SessionView, "PATCH", _path(session), body=body)


class SharedSession:
    """A session as a link shows it. Raises as `Client` does."""

    def __init__(self, exchange: Exchange, token: str) -> None:
        self._exchange = exchange
        self._headers = {"Share-Token": token}

    def get(self) -> SessionDetail:
        """The document."""
        response = self._exchange.send("GET", "/api/shared", headers=self._headers)
        return decoded(SessionDetail, response)

    def open(self) -> OpenedSession:
        """The session with every table in it, by one request: between two it might be saved."""
        file = _downloaded(self._exchange, "/api/shared/export", headers=self._headers)
        return _opened(self._exchange, file, "/api/shared/export")

    def fork(self, name: str | None = None) -> SessionDetail:
        """A session of your own, where the link allows it."""
        body = msgspec.json.encode(SessionFork(name=name))
        return self._exchange.ask(
            SessionDetail, "POST", "/api/shared/fork", body=body, headers=self._headers
        )

    def add(self, scan: ScanLike, *, label: str = "") -> SessionDetail:
        """Add a scan of yours, where the link allows it."""
        (reference,) = _references([scan], [label] if label else ())
        if reference.job is None:
            raise ValueError("a scan is added by its job: expected one of a job's")
        body = msgspec.json.encode(NewScan(job=reference.job, label=reference.label))
        return self._exchange.ask(
            SessionDetail, "POST", "/api/shared/scans", body=body, headers=self._headers
        )

    def export(self, path: Path) -> None:
        """Write the session into one file, as far as the link shows it: whole, or not at all."""
        with replacing(path) as file:
            self._exchange.download("/api/shared/export", file, SESSION_FILE, headers=self._headers)

    def watch(self) -> Iterator[SessionEvent]:
        """The session's events, to `SessionClosed`: until it is deleted.

        Raises `Refused` where the link is none any more when a broken connection is opened again.
        """
        return _events(self._exchange, "/api/shared/events", self._headers)


def _downloaded(
    exchange: Exchange,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    headers: Mapping[str, str] = NO_HEADERS,
) -> IO[bytes]:
    """An answer of any length, as a file."""
    file = tempfile.SpooledTemporaryFile(_SPOOLED)  # noqa: SIM115 -- it outlives this
    try:
        exchange.download(path, file, SESSION_FILE, headers=headers, query=query)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _events(
    exchange: Exchange, path: str, headers: Mapping[str, str] = NO_HEADERS
) -> Iterator[SessionEvent]:
    for message in messages(exchange, path, headers=headers):
        if message.event not in _NAMES:
            continue  # of a newer service: nothing we could show
        try:
            event = decode_session_event(message.data)
        except msgspec.DecodeError as error:
            raise NotUnderstood(
                f"the stream holds a `{message.event}` that this version cannot read: {error}"
            ) from error
        yield event
        if isinstance(event, SessionClosed):
            return


def _until_deleted(events: Iterator[SessionEvent]) -> Iterator[SessionEvent]:
    """The events of a session that is one's own: where it is not there any more, it has been deleted."""
    was_there = False
    try:
        for event in events:
            was_there = True
            yield event
    except Refused as refused:
        if not was_there or refused.type != UnknownSession.type_urn():
            raise
        yield SessionClosed()


def _references(scans: Iterable[ScanLike], labels: Sequence[str]) -> tuple[ScanReference, ...]:
    listed = [_reference(scan) for scan in scans]
    if labels and len(labels) != len(listed):
        raise ValueError(f"{len(labels)} labels for {len(listed)} scans: expected as many")
    if labels:
        listed = [
            msgspec.structs.replace(reference, label=label)
            for reference, label in zip(listed, labels, strict=True)
        ]
    return tuple(listed)


def _reference(scan: ScanLike) -> ScanReference:
    match scan:
        case ScanReference():
            return scan
        case KeptResult():
            return ScanReference(result=scan.digest)
        case Result():
            return ScanReference(job=scan.job_id)
        case JobView():
            return ScanReference(job=scan.id)
        case UUID():
            return ScanReference(job=scan)
        case str():
            return ScanReference(job=_uuid(scan, "a job"))


def _path(session: SessionReference) -> str:
    if isinstance(session, SessionView):
        return f"/api/sessions/{session.id}"
    given = session if isinstance(session, UUID) else _uuid(session, "a session")
    return f"/api/sessions/{given}"


def _uuid(text: str, whose: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {whose}'s id: expected a UUID") from None
