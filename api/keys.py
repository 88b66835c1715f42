"""`python -m api.keys create --admin`: the first key, made on the server's own machine.

Whoever can run this can read the database anyway. Every further key is made through the API.
"""

import argparse
import sys
from collections.abc import Sequence

import msgspec

from neural_mri.backing import access, database
from neural_mri.backing.audit import CONSOLE, audited
from neural_mri.backing.settings import InvalidSettings, load_settings
from neural_mri.contract.auth import ALL_SCOPES, CreatedKey, NewKey, Scope
from neural_mri.contract.problems import Problem

__all__ = ("main",)

DAY_SECONDS = 86_400.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a key and print it; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        wanted = msgspec.convert(
            {
                "user": given.user,
                "label": given.label,
                "scopes": ALL_SCOPES if given.admin else given.scope or NewKey().scopes,
                "expires_in_seconds": None if given.days is None else given.days * DAY_SECONDS,
            },
            NewKey,
        )
        made = _make(wanted)
    except (InvalidSettings, msgspec.ValidationError, Problem) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stderr.write(f"key {made.id} of {made.user}: {', '.join(made.scopes)}\n")
    sys.stdout.write(f"{made.key}\n")
    return 0


def _make(wanted: NewKey) -> CreatedKey:
    settings = load_settings()
    pepper = access.load_pepper(settings)
    database.migrate(settings)
    sessions = database.sessions(settings)
    try:
        return sessions.write(
            audited,
            CONSOLE,
            access.key_created,
            access.create_key,
            pepper,
            user=wanted.user or access.LOCAL.user,
            scopes=wanted.scopes,
            label=wanted.label,
            seconds=wanted.expires_in_seconds,
        )
    finally:
        sessions.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m api.keys", description=__doc__)
    commands = parser.add_subparsers(required=True)
    create = commands.add_parser("create", help="Make a key; it goes to standard output.")
    create.add_argument(
        "--user",
        default=access.LOCAL.user,
        help="Whose (default: %(default)s, who owns what was scanned before keys were asked for).",
    )
    create.add_argument("--label", default="", help="What it is for.")
    create.add_argument("--days", type=float, help="Days until it expires (default: never).")
    allowed = create.add_mutually_exclusive_group()
    allowed.add_argument("--admin", action="store_true", help="Let it do everything.")
    allowed.add_argument(
        "--scope", action="append", choices=[scope.value for scope in Scope], help="Repeatable."
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
