"""`neural-mri sessions list|show|save|add|open|fork|revisions|rename|pin|delete|share|revoke|export|import|diff|watch`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options
from neural_mri.cli.exits import ExitCode
from neural_mri.cli.files import existing, writing
from neural_mri.cli.listing import print_heading, print_signed
from neural_mri.cli.places import Place, reached_own, reaching, read_own, read_place, whole_revision
from neural_mri.cli.terminal import local_time, note, print_json, standard_output
from neural_mri.client import Client
from neural_mri.client.sessions import OpenedSession, read_file
from neural_mri.contract.sessions import (
    Note,
    ScanDifference,
    SessionDetail,
    SessionDifference,
    SessionView,
    ShareAccess,
    ShareView,
)

__all__ = ("commands",)

commands = typer.Typer(
    no_args_is_help=True, help="Keep scans together, open them again, compare and share them."
)

DAY_SECONDS = 86_400.0


def _read_job(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a job's id: expected a UUID") from None


def _read_revision(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{4,64}", text) is None:
        raise typer.BadParameter(
            f"{text!r} is no revision: expected its 64 hexadecimal digits, or the first few of them"
        )
    return text


def _read_link(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{12}", text) is None:
        # Not the text: what is pasted here by mistake is the link itself, which is a secret.
        raise typer.BadParameter("this is not a link's id: expected 12 hexadecimal digits")
    return text


def _read_name(text: str) -> str:
    if not text.strip():
        raise typer.BadParameter("the name is empty: expected text")
    return text


Session = Annotated[
    Place,
    typer.Argument(
        metavar="ID",
        parser=read_place,
        help="The session's id, or a link as far as it allows that.",
    ),
]
OwnSession = Annotated[
    Place, typer.Argument(metavar="ID", parser=read_own, help="The id of a session of yours.")
]
AtRevision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        parser=_read_revision,
        help="Which one: its name's first digits, as `sessions revisions` lists them.",
        show_default="the latest",
    ),
]


@commands.command("list")
def list_(
    query: Annotated[
        str,
        typer.Argument(
            help="Words of the name, notes, prompts, labels or models.", show_default=False
        ),
    ] = "",
    model: options.Model = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Only pinned ones.")] = False,
    limit: Annotated[
        int,
        typer.Option(parser=options.whole_number(1, 10_000), metavar="N", help="How many at most."),
    ] = 50,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """List your sessions: the pinned ones, then those saved last."""
    with options.open_client(url) as client:
        found = list(
            client.sessions.list(query=query, model=model, pinned=pinned or None, limit=limit)
        )
    if as_json:
        print_json(found)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("session", "name", "scans", "models", "saved"):
        table.add_column(heading, no_wrap=heading == "session")
    for session in found:
        table.add_row(
            str(session.id),
            Text(("* " if session.pinned else "") + session.name),
            str(session.scans),
            " ".join(session.models),
            local_time(session.updated_at, "%Y-%m-%d %H:%M"),
        )
    standard_output().print(table)


@commands.command()
def show(
    session: Session,
    revision: AtRevision = None,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Show what a session holds."""
    with reaching(session, url) as kept:
        detail = kept.get(revision)
    if as_json:
        print_json(detail)
    else:
        _print_detail(detail)


@commands.command()
def save(
    name: Annotated[str, typer.Argument(parser=_read_name, help="What the session is called.")],
    jobs: Annotated[
        list[str], typer.Argument(help="Ids of scans that have succeeded, in the order wanted.")
    ],
    notes: Annotated[
        list[str] | None, typer.Option("--note", help="Something seen; repeatable.")
    ] = None,
    message: Annotated[str, typer.Option("--message", help="For the list of revisions.")] = "",
    into: Annotated[
        Place | None,
        typer.Option(
            "--into",
            parser=read_own,
            metavar="ID",
            help="Save over this session's latest revision.",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Keep scans together. With --into, a new revision that holds these instead."""
    said = [Note(text=text) for text in notes or ()]
    scans = [_read_job(job) for job in jobs]
    with reached_own(into or Place(), url) as client:
        if into is None or into.session is None:
            detail = client.sessions.create(name, scans, notes=said, message=message)
        else:
            held = client.sessions.get(into.session)
            detail = client.sessions.save(
                held, scans=scans, notes=[*held.document.notes, *said], message=message
            )
            if detail.name != name:
                client.sessions.rename(into.session, name)
    _print_id(detail, as_json=as_json, quiet=quiet)


@commands.command()
def add(
    session: Session,
    job: Annotated[
        str, typer.Argument(help="A scan's id; one that runs is added once it is done.")
    ],
    label: Annotated[str, typer.Option("--label", help="What to call it.")] = "",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Add a scan to whatever the session holds."""
    job_id = _read_job(job)
    with reaching(session, url, as_oneself=True) as kept:
        detail = kept.add(job_id, label)
    _print_id(detail, as_json=as_json, quiet=quiet)


@commands.command("open")
def open_(
    what: Annotated[
        str, typer.Argument(help="A session's id, a link to it, or an .nmri file on this disk.")
    ],
    revision: AtRevision = None,
    url: options.Url = None,
) -> None:
    """Read a session with everything in it, and list its tables. A file needs no service."""
    path = Path(what)
    if path.suffix == ".nmri" or path.is_file():
        with read_file(existing(path, "WHAT")) as opened:
            _print_opened(opened)
        return
    with reaching(read_place(what), url) as kept, kept.open(revision) as opened:
        _print_opened(opened)


@commands.command()
def fork(
    session: Session,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the new one.", show_default="the same")
    ] = None,
    revision: AtRevision = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Begin a session of your own where another stands."""
    with reaching(session, url, as_oneself=True) as kept:
        detail = kept.fork(name, revision)
    _print_id(detail, as_json=as_json, quiet=quiet)


@commands.command()
def revisions(
    session: OwnSession,
    limit: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(1, 1000), metavar="N", help="How many, the latest first."
        ),
    ] = 20,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """List a session's saves: what each is called, who made it, and why."""
    with _own(session, url) as (client, session_id):
        listed = client.sessions.revisions(session_id, limit)
    if as_json:
        print_json(listed)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("number", "revision", "saved", "by", "message"):
        table.add_column(heading, no_wrap=heading == "revision")
    for each in listed:
        table.add_row(
            str(each.number),
            each.revision[:12],
            local_time(each.created_at),
            Text(each.author),
            Text(each.message),
        )
    standard_output().print(table)


@commands.command()
def rename(
    session: OwnSession,
    name: Annotated[str, typer.Argument(parser=_read_name, help="What it shall be called.")],
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Give a session another name."""
    with _own(session, url) as (client, session_id):
        view = client.sessions.rename(session_id, name)
    _print_view(view, as_json=as_json)


@commands.command()
def pin(
    session: OwnSession,
    off: Annotated[
        bool, typer.Option("--off", help="Let it stand among the others again.")
    ] = False,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Let a session stand first in lists."""
    with _own(session, url) as (client, session_id):
        view = client.sessions.pin(session_id, pinned=not off)
    _print_view(view, as_json=as_json)


@commands.command()
def delete(
    session: OwnSession,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: options.Url = None,
) -> None:
    """Delete a session, its revisions and its links."""
    with _own(session, url) as (client, session_id):
        view = client.sessions.get(session_id)
        if not yes:
            revisions = (
                "its only revision" if view.revision == 1 else f"its {view.revision} revisions"
            )
            typer.confirm(f"Delete {view.name!r} and {revisions}?", abort=True)
        client.sessions.delete(session_id)
    note(f"deleted {session_id}")


@commands.command()
def share(
    session: OwnSession,
    access: Annotated[
        ShareAccess,
        typer.Option(
            "--access",
            parser=options.one_of(ShareAccess),
            metavar="|".join(ShareAccess),
            help="What the link allows.",
        ),
    ] = ShareAccess.READ,
    redact: Annotated[
        bool,
        typer.Option("--redact", help="Take prompts and tokens out of everything it reaches."),
    ] = False,
    label: Annotated[str, typer.Option("--label", help="Whom it is for.")] = "",
    days: Annotated[
        int | None,
        typer.Option(
            "--days",
            parser=options.whole_number(1, 36_500),
            metavar="N",
            help="How long it lasts.",
            show_default="for good",
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List its links instead.")] = False,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Make a link to a session. It is printed once, and kept nowhere."""
    with _own(session, url) as (client, session_id):
        if listed:
            _print_shares(client.sessions.shares(session_id), as_json=as_json)
            return
        if redact and access is not ShareAccess.READ:
            raise typer.BadParameter("a redacted link can only be read", param_hint="--access")
        made = client.sessions.share(
            session_id,
            access=access,
            redact=redact,
            label=label,
            expires_in_seconds=None if days is None else days * DAY_SECONDS,
        )
        address = client.base_url + made.path
    if as_json:
        print_json(made)
        return
    standard_output().print(Text(address), soft_wrap=True)
    note(f"link {made.id}: allows to {made.access.value}" + (", redacted" if redact else ""))


@commands.command()
def revoke(
    session: OwnSession,
    link: Annotated[
        str,
        typer.Argument(parser=_read_link, help="The link's id, as `share --list` names it."),
    ],
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """End a link for good."""
    with _own(session, url) as (client, session_id):
        ended = client.sessions.revoke(session_id, link)
    if as_json:
        print_json(ended)
    else:
        standard_output().print(f"link {ended.id}: revoked")


@commands.command()
def export(
    session: Session,
    file: Annotated[
        Path | None, typer.Argument(help="Where to.", show_default="ID.nmri here")
    ] = None,
    revision: AtRevision = None,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Write a session into one file, tables and all."""
    with reaching(session, url) as kept:
        path = file or Path(f"{kept.get().id}.nmri")
        with writing(path, quiet=quiet):
            kept.export(path, revision)


@commands.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="An .nmri file.")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Take in a session's file; every hash in it is checked first."""
    with options.open_client(url) as client:
        detail = client.sessions.import_file(existing(file))
    _print_id(detail, as_json=as_json, quiet=quiet)


@commands.command()
def diff(
    session: OwnSession,
    other: Annotated[Place, typer.Argument(metavar="OTHER", parser=read_own, help="Another's id.")],
    revision: AtRevision = None,
    other_revision: Annotated[
        str | None,
        typer.Option("--other-revision", parser=_read_revision, help="Of the other."),
    ] = None,
    top: options.Top = 5,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Tell what differs between two sessions: which scans, what was asked, what was measured."""
    with (
        _own(session, url) as (client, session_id),
        _own(other, url) as (_, other_id),
    ):
        told = client.sessions.difference(
            session_id,
            other_id,
            revision=whole_revision(client, session_id, revision),
            other_revision=whole_revision(
                client, other_id, other_revision, option="--other-revision"
            ),
            strongest=top,
        )
    if as_json:
        print_json(told)
    else:
        _print_difference(told)


@commands.command()
def watch(session: Session, url: options.Url = None) -> None:
    """Print a session's events, a line of JSON each, until Ctrl-C or until it is deleted."""
    with reaching(session, url) as kept:
        try:
            for event in kept.watch():
                print_json(event)
        except KeyboardInterrupt:
            note("interrupted: the session goes on")
            raise typer.Exit(ExitCode.INTERRUPTED) from None


@contextmanager
def _own(place: Place, url: str | None) -> Iterator[tuple[Client, UUID]]:
    """The service of a session of the caller's, and its id."""
    with reached_own(place, url) as client:
        if place.session is None:
            raise typer.BadParameter("a link names no session of yours: expected an id")
        yield client, place.session


def _print_id(detail: SessionDetail, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(detail)
        return
    print(detail.id)  # noqa: T201 -- the answer, for a shell to take
    if not quiet:
        note(f"{detail.name!r}, revision {detail.head[:12]} (number {detail.revision})")


def _print_view(view: SessionView, *, as_json: bool) -> None:
    if as_json:
        print_json(view)
    else:
        pinned = ", pinned" if view.pinned else ""
        standard_output().print(Text(f"{view.id}  {view.name}{pinned}"))


def _print_detail(detail: SessionDetail) -> None:
    console = standard_output()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("session", str(detail.id))
    table.add_row("name", Text(detail.name))
    table.add_row("revision", f"{detail.opened} (of {detail.revision})")
    table.add_row("origin", detail.origin.value)
    table.add_row("saved", local_time(detail.updated_at))
    console.print(table)
    document = detail.document
    if document.scans:
        print_heading("scans", console)
        for number, scan in enumerate(document.scans, 1):
            asked = str(scan.request.get("prompt", ""))[:60]
            label = f"{scan.label}: " if scan.label else ""
            console.print(Text(f"  {number}  {scan.kind.value:<12} {scan.model}  {label}{asked}"))
    for arrival in detail.arriving:
        why = f", but: {arrival.problem['detail']}" if arrival.problem else ""
        console.print(Text(f"  …  {arrival.label or arrival.job} is {arrival.state.value}{why}"))
    _print_notes("notes", [_said(each) for each in document.notes], console)
    captions = [image.caption or "(no caption)" for image in document.key_images]
    _print_notes("key images", captions, console)


def _print_notes(heading: str, lines: Sequence[str], console: Console) -> None:
    if lines:
        print_heading(heading, console)
        for line in lines:
            console.print(Text(f"  {line}"))


def _said(each: Note) -> str:
    place = [each.component] if each.component else []
    place += [f"token {each.position}"] if each.position is not None else []
    return each.text + (f"  ({', '.join(place)})" if place else "")


def _print_opened(opened: OpenedSession) -> None:
    console = standard_output()
    console.print(Text(opened.name, style="bold"))
    for scan, result in zip(opened.document.scans, opened.results, strict=True):
        print_heading(f"{result.title}  {scan.label}", console)
        for ref in result.manifest.tables:
            console.print(Text(f"  {ref.name:<24} {ref.rows:>8} rows  {ref.unit}"))
    _print_notes("notes", [_said(each) for each in opened.document.notes], console)


def _print_shares(shares: Sequence[ShareView], *, as_json: bool) -> None:
    if as_json:
        print_json(shares)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("link", "allows", "redacted", "label", "state"):
        table.add_column(heading)
    for each in shares:
        table.add_row(
            each.id,
            each.access.value,
            "yes" if each.redacted else "no",
            Text(each.label),
            _link_state(each),
        )
    standard_output().print(table)


def _link_state(link: ShareView) -> str:
    if link.revoked_at is not None:
        return "revoked"
    if link.expires_at is None:
        return "good"
    over = link.expires_at <= datetime.now(link.expires_at.tzinfo)
    return f"{'expired' if over else 'until'} {local_time(link.expires_at, '%Y-%m-%d %H:%M')}"


def _print_difference(told: SessionDifference) -> None:
    console = standard_output()
    for scan in told.scans:
        print_heading(f"{scan.change.value}: {scan.kind.value} {scan.label}", console)
        _print_scan(scan, console)
    said = [f"+ {each.text}" for each in told.notes_added]
    said += [f"- {each.text}" for each in told.notes_removed]
    _print_notes("notes", said, console)
    if told.view_changed:
        console.print(Text("the view differs", style="dim"))


def _print_scan(scan: ScanDifference, console: Console) -> None:
    for name, (before, after) in scan.fields.items():
        console.print(Text(f"  {name}: {before!r} -> {after!r}"))
    if scan.incomparable is not None:
        console.print(Text(f"  no numbers: {scan.incomparable}", style="dim"))
    table = scan.table
    if table is None or table.root_mean_square is None:
        return
    rank = (
        "" if table.rank_correlation is None else f", rank correlation {table.rank_correlation:.4f}"
    )
    console.print(
        Text(
            f"  {table.table}.{table.column} in {table.unit}: {table.rows} rows, root mean square "
            f"{table.root_mean_square:.4g}, largest {table.largest or 0:.4g}{rank}"
        )
    )
    # In the order of their largest: a mean over tokens alone would look like no order at all.
    print_signed(
        [row.component for row in table.strongest],
        [row.difference for row in table.strongest],
        [f"mean, largest {row.largest:.4g} {row.quantity or ''}" for row in table.strongest],
        console,
    )
