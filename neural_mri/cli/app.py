"""The commands put together, and errors turned into a sentence and an exit code."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from neural_mri import __version__
from neural_mri.cli import (
    batch,
    cluster,
    diagnose,
    jobs,
    keys,
    models,
    options,
    scans,
    sessions,
    stimulation,
    users,
    watch,
)
from neural_mri.cli.exits import EXIT_CODES, ExitCode, exit_code_of
from neural_mri.cli.terminal import complain, print_json, standard_output
from neural_mri.client import TIMEOUT_VARIABLE, ClientError

__all__ = ("app", "run")

app = typer.Typer(
    name="neural-mri",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    help="Images of the inside of an open-weight language model.",
)
app.add_typer(scans.commands, name="scan")
app.command()(stimulation.perturb)
app.command()(stimulation.patching)
app.command()(stimulation.trace)
app.command()(stimulation.calibrate)
app.command()(models.models)
app.add_typer(models.commands, name="model")
app.command()(jobs.job)
app.command()(jobs.jobs)
app.command()(jobs.result)
app.command()(jobs.cancel)
app.command()(jobs.delete)
app.command()(watch.watch)
app.command()(models.tokenize)
app.command()(cluster.cluster)
app.command()(diagnose.diagnose)
app.command()(diagnose.report)
app.add_typer(batch.commands, name="batch")
app.add_typer(sessions.commands, name="sessions")
app.add_typer(keys.commands, name="keys")
app.add_typer(users.commands, name="users")
app.command()(users.usage)
app.command()(users.audit)


@app.command()
def health(as_json: options.Json = False, url: options.Url = None) -> None:
    """Ask the service how it is; fails when it is down."""
    with options.open_client(url) as client:
        state = client.health()
    if as_json:
        print_json(state)
    else:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        told = {"workers": _worker, "models": _model}
        for name, value in state.items():
            table.add_row(name, _in_words(value, told.get(name, str)))
        standard_output().print(table)
    if state.get("status") == "down":
        raise typer.Exit(ExitCode.FAILED)


def _in_words(value: object, each: Callable[[Any], str]) -> str:
    return ("\n".join(map(each, value)) or "none") if isinstance(value, list) else str(value)


def _worker(seen: Mapping[str, Any]) -> str:
    """Who it is and what it holds; `neural-mri cluster` has the rest."""
    held = (f"{model['name']} {model.get('state', '')}".strip() for model in seen.get("models", ()))
    return f"{seen['worker']} on {seen.get('device', '?')}: {', '.join(held) or 'no model'}"


def _model(named: Mapping[str, Any]) -> str:
    state = f" {named['state']}" if "state" in named else ""
    return f"{named['name']}{state}, {named.get('queued', 0)} queued"


def _print_version(wanted: bool) -> None:  # noqa: FBT001 -- typer's callback
    if wanted:
        standard_output().print(f"neural-mri {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # noqa: ARG001 -- its callback has read it
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            envvar=TIMEOUT_VARIABLE,
            parser=options.number(0.001, 86_400),
            metavar="SECONDS",
            help="How long to wait for an answer to any one request. Before the command.",
            show_default="30",
        ),
    ] = None,
) -> None:
    options.timeout.set(timeout)


def run(arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code; prints every expected error as one sentence."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, never a traceback.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = app(list(arguments), prog_name="neural-mri", standalone_mode=False)
    except typer.TyperException as error:
        if message := error.format_message():  # none where the help was printed instead
            complain(message.replace("Value error, ", "", 1))  # who found it is nobody's matter
        return ExitCode.USAGE
    except typer.Abort:  # who was asked has said no, or nothing
        complain("nothing was done")
        return ExitCode.FAILED
    except ClientError as error:
        complain(str(error))
        return exit_code_of(error)
    return ExitCode(code or 0)
