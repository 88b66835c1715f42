"""`neural-mri keys create|list|revoke`."""

import re
from datetime import datetime
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from neural_mri.cli import options
from neural_mri.cli.terminal import local_time, note, print_json, standard_output
from neural_mri.contract.auth import KeyView, NewKey, Scope

__all__ = ("commands",)

commands = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

DAY_SECONDS = 86_400.0


def _read_key_id(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{12}", text) is None:
        raise typer.BadParameter("this is not a key's id: expected 12 hexadecimal digits")
    return text


@commands.command()
def create(
    label: Annotated[str, typer.Option("--label", help="What it is for.")] = "",
    user: Annotated[
        str | None, typer.Option("--user", help="Whose, for an admin.", show_default="yours")
    ] = None,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(
            "--scope", help="What it allows; repeatable.", show_default="scan:read, scan:write"
        ),
    ] = None,
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
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Make a key. It is printed once, and kept nowhere."""
    try:
        wanted = msgspec.convert(
            {
                "user": user,
                "label": label,
                "scopes": scope or NewKey().scopes,
                "expires_in_seconds": None if days is None else days * DAY_SECONDS,
            },
            NewKey,
        )
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error)) from error
    with options.open_access(url) as access:
        made = access.create(wanted)
    if as_json:
        print_json(made)
        return
    standard_output().print(made.key, soft_wrap=True)
    note(f"key {made.id} of {made.user}: {', '.join(made.scopes)}")


@commands.command("list")
def list_(
    user: Annotated[
        str | None, typer.Option("--user", help="Whose, for an admin.", show_default="everybody's")
    ] = None,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """List your keys; everybody's for an admin."""
    with options.open_access(url) as access:
        listed = access.keys(user)
    if as_json:
        print_json(listed)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("key", "user", "label", "scopes", "made", "state"):
        table.add_column(heading, no_wrap=heading == "key")
    for key in listed:
        table.add_row(
            key.id,
            key.user,
            key.label,
            " ".join(key.scopes),
            local_time(key.created_at, "%Y-%m-%d %H:%M"),
            _state(key),
        )
    standard_output().print(table)


@commands.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", parser=_read_key_id, help="The key's id.")],
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """End a key for good, and every session opened with it."""
    with options.open_access(url) as access:
        key = access.revoke(key_id)
    if as_json:
        print_json(key)
    else:
        standard_output().print(f"key {key.id} of {key.user}: revoked")


def _state(key: KeyView) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "good"
    over = key.expires_at <= datetime.now(key.expires_at.tzinfo)
    return "expired" if over else f"until {local_time(key.expires_at, '%Y-%m-%d')}"
