"""Sessions: scans kept together with what was seen in them, to be opened again, shared and compared.

Every save is a revision that never changes. Its name is the SHA-256 of its document, canonical JSON that holds
the name of the revision before it: who has the hash of a revision has it of everything that led there. A scan
is named by the hash of its result's manifest, which names its tables by theirs. No id of a job, a user or a
service stands in a document, so that it is the same wherever it is imported.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeAlias
from uuid import UUID

import msgspec
from msgspec import Meta

from neural_mri.contract.archives import Sha256
from neural_mri.contract.jobs import JobState
from neural_mri.contract.perturbations import Perturbation
from neural_mri.contract.problems import NotFound, Problem, ProblemDocument, Unprocessable
from neural_mri.contract.scan_base import Address
from neural_mri.contract.scans import ScanKind

__all__ = (
    "MOST_DEPTH",
    "MOST_SCANS",
    "Arrival",
    "ComponentDifference",
    "CreatedShare",
    "KeyImage",
    "NestedTooDeeply",
    "NewScan",
    "NewSession",
    "NewShare",
    "NoSuchScan",
    "Note",
    "Origin",
    "PreconditionFailed",
    "PreconditionRequired",
    "RevisionView",
    "SavedScan",
    "ScanArrived",
    "ScanChange",
    "ScanDifference",
    "ScanReference",
    "SessionChanges",
    "SessionClosed",
    "SessionContent",
    "SessionDetail",
    "SessionDifference",
    "SessionDocument",
    "SessionEvent",
    "SessionFork",
    "SessionPage",
    "SessionSave",
    "SessionSaved",
    "SessionView",
    "ShareAccess",
    "ShareView",
    "TableDifference",
    "UnknownRevision",
    "UnknownSession",
    "UnknownShare",
    "check_depth",
    "check_views",
    "decode_session_event",
    "depth_of",
)

MOST_SCANS = 1000
MOST_NOTES = 1000
MOST_DEPTH = 64
"""Levels of objects and lists in what is kept in somebody's own words: who shows it goes down all of them."""

ScanName = Annotated[
    str,
    Meta(pattern=r"^([0-9a-f]{64}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$", max_length=64),
]
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
Label = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00]*$")]
Text = Annotated[str, Meta(max_length=20_000)]


class UnknownSession(NotFound):
    """There is no such session."""


class UnknownRevision(NotFound):
    """The session has no such revision."""


class UnknownShare(NotFound):
    """There is no such link, or not any more."""


class PreconditionFailed(Problem):
    """Somebody has saved the session since you read it."""

    status = 412


class PreconditionRequired(Problem):
    """A session is saved over the revision that was read."""

    status = 428


class NoSuchScan(Unprocessable):
    """The session names a scan that it does not have."""


class NestedTooDeeply(Unprocessable):
    """What is to be kept is nested too deeply."""


class ScanReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scan to be kept: by the job that measured it, or by the result that the session has already."""

    job: UUID | None = None
    """A job of yours that has succeeded."""
    result: Sha256 | None = None
    """As a revision of this session names it."""
    label: Label = ""

    def __post_init__(self) -> None:
        if (self.job is None) == (self.result is None):
            raise ValueError("a scan is named by its job or by its result: expected one of the two")


class SavedScan(msgspec.Struct, frozen=True, kw_only=True):
    """A scan as a revision keeps it."""

    result: Sha256
    """SHA-256 of the result's manifest."""
    scan_key: str
    kind: ScanKind
    model: str
    revision: str
    """Of the model's weights."""
    request: dict[str, Any]
    """As it was understood, defaults written out."""
    label: Label = ""


class Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something seen, and where."""

    text: Text
    scan: ScanName | None = None
    """The result it is about, or, in a save, the job that measured it; the session as a whole where left
    out."""
    component: Address | None = None
    position: Annotated[int, Meta(ge=0)] | None = None
    """A token's."""
    author: Label = ""


class KeyImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A view worth coming back to."""

    caption: Text = ""
    scan: ScanName | None = None
    """As of a note."""
    view: dict[str, Any] = {}
    """The viewer's state, in its own words."""


Perturbations = Annotated[tuple[Perturbation, ...], Meta(max_length=256)]
Notes = Annotated[tuple[Note, ...], Meta(max_length=MOST_NOTES)]
KeyImages = Annotated[tuple[KeyImage, ...], Meta(max_length=MOST_NOTES)]


class SessionContent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What somebody wants kept."""

    scans: Annotated[tuple[ScanReference, ...], Meta(max_length=MOST_SCANS)] = ()
    """In the order in which they are shown."""
    perturbations: Perturbations = ()
    """Laid out in the stimulation panel."""
    notes: Notes = ()
    key_images: KeyImages = ()
    view: dict[str, Any] = {}
    """The viewer's state, in its own words."""


class SessionSave(SessionContent, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new revision: everything that the session shall hold from now on."""

    message: Label = ""
    """What changed, for the list of revisions."""


class NewSession(SessionSave, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A session to be made."""

    name: Name


class NewScan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A scan to be added to whatever the session holds by then."""

    job: UUID
    """Of yours; one that still runs is added when it has succeeded."""
    label: Label = ""


class SessionChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be changed of a session without a new revision."""

    name: Name | None = None
    pinned: bool | None = None
    """Pinned sessions stand first."""


class SessionFork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A session of your own, to be begun where another stands."""

    name: Name | None = None
    """The other's where left out."""
    revision: Sha256 | None = None
    """The latest where left out."""


class SessionDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What a revision holds; the SHA-256 of its canonical JSON is the revision's name."""

    version: int = 1
    parent: Sha256 | None = None
    """The revision before it."""
    scans: tuple[SavedScan, ...] = ()
    perturbations: Perturbations = ()
    notes: Notes = ()
    key_images: KeyImages = ()
    view: dict[str, Any] = {}


def depth_of(value: object) -> int:
    """How many levels of objects and lists a value of JSON has: 0 for a number, 1 for `{}`."""
    depth, level = 0, [value]
    while nested := [each for each in level if isinstance(each, dict | list | tuple)]:
        depth += 1
        level = [
            inner
            for each in nested
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return depth


def check_depth(where: str, value: object) -> None:
    """Raises `NestedTooDeeply`, which says where, beyond `MOST_DEPTH`."""
    if (depth := depth_of(value)) > MOST_DEPTH:
        raise NestedTooDeeply(
            f"{where} is nested {depth} levels deep: expected {MOST_DEPTH} at most",
            where=where,
            depth=depth,
            limit=MOST_DEPTH,
        )


def check_views(content: SessionContent | SessionDocument) -> None:
    """See that no view is nested too deeply. Raises as `check_depth` does."""
    check_depth("view", content.view)
    for index, image in enumerate(content.key_images):
        check_depth(f"key_images[{index}].view", image.view)


class Origin(StrEnum):
    """How a session came to be."""

    MADE = "made"
    FORKED = "forked"
    IMPORTED = "imported"
    """Its results are as a file has them: nobody measured them here."""


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """A session, in a list."""

    id: UUID
    """A UUIDv7."""
    name: str
    owner: str
    pinned: bool = False
    head: str
    """The latest revision."""
    revision: int
    """Its number, from 1."""
    scans: int
    models: tuple[str, ...] = ()
    origin: Origin
    forked_from: UUID | None = None
    created_at: datetime
    updated_at: datetime
    links: dict[str, str] = {}
    """`self`, `results`, `events`, `export`."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A scan that joins the session when it has succeeded."""

    job: UUID
    author: str
    label: str = ""
    state: JobState
    problem: ProblemDocument | None = None
    """Why it does not join, as RFC 9457 has it: its bytes are gone, or the session is full. Told for a day."""


class SessionDetail(SessionView, frozen=True, kw_only=True):
    """A session, opened at one revision."""

    opened: str
    """The revision that the document is of."""
    document: SessionDocument
    arriving: tuple[Arrival, ...] = ()
    redacted: bool = False
    """Whether prompts and tokens were taken out."""


class SessionPage(msgspec.Struct, frozen=True, kw_only=True):
    """Some sessions: the pinned ones, then those saved last."""

    sessions: tuple[SessionView, ...]
    next: str | None = None
    """What `after` must be for the next page; none where this is the last."""


class RevisionView(msgspec.Struct, frozen=True, kw_only=True):
    """One save."""

    number: int
    revision: str
    parent: str | None = None
    author: str
    message: str = ""
    created_at: datetime


class ShareAccess(StrEnum):
    """What a link allows."""

    READ = "read"
    FORK = "fork"
    """Also to make a session of one's own of it."""
    CONTRIBUTE = "contribute"
    """Also to add one's own scans to it."""


class NewShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link to be made."""

    access: ShareAccess = ShareAccess.READ
    redact: bool = False
    """Take prompts and tokens out of everything that the link reaches; it can then only be read."""
    label: Label = ""
    """Whom it is for."""
    expires_in_seconds: Annotated[float, Meta(gt=0, le=3_153_600_000)] | None = None
    """Never where left out."""

    def __post_init__(self) -> None:
        if self.redact and self.access is not ShareAccess.READ:
            raise ValueError(
                f"a redacted link cannot allow {self.access.value!r}: expected access 'read'"
            )


class ShareView(msgspec.Struct, frozen=True, kw_only=True):
    """A link, without what would let anybody follow it."""

    id: str
    session: UUID
    access: ShareAccess
    redacted: bool
    label: str = ""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class CreatedShare(ShareView, frozen=True, kw_only=True):
    """A link that has just been made."""

    token: str
    """Its secret, 128 random bits: shown this once. Sent as `Share-Token`."""
    path: str
    """Where the viewer opens it: the token stands behind the #, which no browser sends to anybody."""

    def __repr__(self) -> str:
        return f"CreatedShare({self.id})"


class ScanChange(StrEnum):
    """How a scan of one session relates to the other's."""

    SAME = "same"
    """The same result."""
    CHANGED = "changed"
    """Of the same kind and name, or prompt, but another scan."""
    ADDED = "added"
    REMOVED = "removed"


class ComponentDifference(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a table, before and after: of a row of many values their means."""

    component: str
    quantity: str | None = None
    before: float
    after: float
    difference: float
    largest: float
    """The largest difference of any one value of the row, by size."""


class TableDifference(msgspec.Struct, frozen=True, kw_only=True):
    """How the main tables of two scans differ."""

    table: str
    column: str
    unit: str
    rows: int
    """That both have and that were measured in both."""
    only_before: int = 0
    only_after: int = 0
    mean_difference: float | None = None
    root_mean_square: float | None = None
    largest: float | None = None
    rank_correlation: float | None = None
    """Spearman's, over rows; none where a rank says nothing."""
    strongest: tuple[ComponentDifference, ...] = ()
    """The rows that differ most."""


class ScanDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A scan of either session, or one of each."""

    change: ScanChange
    kind: ScanKind
    label: str = ""
    before: str | None = None
    """Its result in the first session."""
    after: str | None = None
    """And in the second."""
    fields: dict[str, tuple[Any, Any]] = {}
    """What differs of the two requests, before and after."""
    table: TableDifference | None = None
    """What differs of what was measured."""
    incomparable: str | None = None
    """Why no numbers are given."""


class SessionDifference(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between two sessions, or two revisions of one."""

    before: str
    """The revision."""
    after: str
    scans: tuple[ScanDifference, ...]
    notes_added: tuple[Note, ...] = ()
    notes_removed: tuple[Note, ...] = ()
    key_images_added: int = 0
    key_images_removed: int = 0
    perturbations_changed: bool = False
    view_changed: bool = False


class SessionSaved(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="saved"):
    """The session stands at a revision: the first event of a stream, and one for each save."""

    revision: str
    number: int
    name: str
    author: str = ""
    added: tuple[str, ...] = ()
    """Results that the save brought."""


class ScanArrived(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="scan"):
    """Where a scan stands that somebody adds."""

    job: UUID
    author: str
    label: str = ""
    state: JobState
    problem: ProblemDocument | None = None
    """Why it does not join though it has ended well."""


class SessionClosed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="closed"):
    """The session has been deleted: the last event."""

    reason: Literal["deleted"] = "deleted"


SessionEvent: TypeAlias = SessionSaved | ScanArrived | SessionClosed

_decoder: msgspec.json.Decoder[SessionEvent] = msgspec.json.Decoder(SessionEvent)


def decode_session_event(body: bytes | str) -> SessionEvent:
    """An event as it was sent."""
    return _decoder.decode(body)
