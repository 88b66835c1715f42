"""`neural-mri users list|limit`, `usage` and `audit`: how much everybody may, has had, and has done."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Annotated
from uuid import UUID

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options
from neural_mri.cli.terminal import local_time, note, print_json, standard_output
from neural_mri.contract.auth import AuditAction, AuditEntry, Usage, UserLimits

__all__ = ("audit", "commands", "usage")

commands = typer.Typer(no_args_is_help=True, help="See what users compute, and limit it.")

_NO_LIMIT = "none"


def _read_limit(text: str) -> float:
    """A limit as it is sent, which says 0 where there is none."""
    if text == _NO_LIMIT:
        return 0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1_000_000_000:
        raise typer.BadParameter(f"{text!r} is no limit: expected a number above 0, or {_NO_LIMIT}")
    return value


def _read_jobs(text: str) -> int:
    jobs = _read_limit(text)
    if jobs != int(jobs):
        raise typer.BadParameter(f"{text!r} is no number of jobs: expected a whole one")
    return int(jobs)


def _read_entry(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an entry's id: expected a UUID") from None


@commands.command("list")
def list_(as_json: options.Json = False, url: options.Url = None) -> None:
    """List everybody's usage beside their limits, for an admin."""
    with options.open_access(url) as access:
        listed = access.users()
    if as_json:
        print_json(listed)
    else:
        _print_usages(listed)


@commands.command()
def limit(
    user: Annotated[str, typer.Argument(help="Whose.")],
    max_jobs: Annotated[
        int | None,
        typer.Option(
            "--max-jobs",
            parser=_read_jobs,
            metavar="N",
            help=f"Jobs under way at once; or {_NO_LIMIT}.",
            show_default="everybody's",
        ),
    ] = None,
    daily_seconds: Annotated[
        float | None,
        typer.Option(
            "--daily-seconds",
            parser=_read_limit,
            metavar="SECONDS",
            help=f"Of a worker's time within any 24 hours; or {_NO_LIMIT}.",
            show_default="everybody's",
        ),
    ] = None,
    usual: Annotated[
        bool, typer.Option("--usual", help="Take the user's own limits back.")
    ] = False,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Give a user limits of their own, for an admin. What is left out is everybody's from then on."""
    if usual == (max_jobs is not None or daily_seconds is not None):
        raise typer.BadParameter(
            "expected --max-jobs, --daily-seconds or both; or --usual, alone, to take them back"
        )
    try:
        limits = msgspec.convert({"max_jobs": max_jobs, "daily_seconds": daily_seconds}, UserLimits)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error)) from error
    with options.open_access(url) as access:
        try:
            held = access.set_limits(user, limits)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json(held)
    else:
        _print_usages([held])


def usage(as_json: options.Json = False, url: options.Url = None) -> None:
    """Show what you have under way and have computed today, beside what you may."""
    with options.open_access(url) as access:
        mine = access.usage()
    if as_json:
        print_json(mine)
    else:
        _print_usages([mine])


def audit(
    user: Annotated[
        str | None, typer.Option("--user", help="Whose deeds.", show_default="everybody's")
    ] = None,
    action: Annotated[
        AuditAction | None,
        typer.Option(
            "--action",
            parser=options.one_of(AuditAction),
            metavar="ACTION",
            help=f"What sort: {', '.join(AuditAction)}.",
            show_default="all",
        ),
    ] = None,
    before: Annotated[
        UUID | None,
        typer.Option(
            "--before", parser=_read_entry, metavar="ID", help="Only what is older than this entry."
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(parser=options.whole_number(1), metavar="N", help="How many, newest first."),
    ] = 100,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each entry as a line of JSON.")
    ] = False,
    url: options.Url = None,
) -> None:
    """Tell who made keys, set limits, loaded models, stopped jobs, shared sessions; for an admin."""
    with options.open_access(url) as access:
        entries = access.audit(user=user, action=action, before=before, limit=limit)
        if as_json:
            for entry in entries:
                print_json(entry)
            return
        listed = list(entries)
    _print_entries(listed)
    if len(listed) == limit:
        note(f"older ones: --before {listed[-1].id}")


def _print_usages(usages: Iterable[Usage]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("user", no_wrap=True)
    for heading in ("under way", "allowed", "computed today", "allowed"):
        table.add_column(heading, justify="right")
    for each in usages:
        table.add_row(
            Text(each.user),
            str(each.in_flight),
            _NO_LIMIT if each.max_jobs is None else str(each.max_jobs),
            _duration(each.seconds_today),
            _NO_LIMIT if each.daily_seconds is None else _duration(each.daily_seconds),
        )
    standard_output().print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _print_entries(entries: Sequence[AuditEntry]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("at", "user", "key", "did", "to", "details"):
        # What is cut nowhere else has to fit a terminal of 80 columns.
        table.add_column(heading, no_wrap=heading in {"at", "did"}, overflow="fold")
    for each in entries:
        said = ", ".join(f"{name} {value}" for name, value in each.details.items())
        table.add_row(
            local_time(each.at),
            Text(each.user),
            each.key or "",
            each.action.value,
            Text(each.subject),
            Text(said),
        )
    standard_output().print(table)
