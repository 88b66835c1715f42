"""`neural-mri batch submit|list|show|watch|results|cancel`."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from uuid import UUID

import msgspec
import pyarrow as pa
import typer
from pyarrow import csv, feather
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options
from neural_mri.cli.exits import ExitCode, exit_code_of_batch
from neural_mri.cli.files import existing, writing
from neural_mri.cli.progress import JobProgress
from neural_mri.cli.terminal import complain, local_time, note, print_json, standard_output
from neural_mri.client import Client, ClientError, Refused
from neural_mri.client.exchange import PARTING_SECONDS
from neural_mri.contract.batches import (
    LEFT_OUT,
    MOST_LINES,
    BatchEvent,
    BatchProgress,
    BatchState,
    BatchView,
    OnInvalid,
)
from neural_mri.contract.events import Progress
from neural_mri.contract.jobs import Lane

__all__ = ("commands",)

commands = typer.Typer(no_args_is_help=True, help="Ask for many scans at once.")

_SHOWN = 10
"""Lines that are reported one by one."""


def _read_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a batch's id: expected a UUID") from None


BatchId = Annotated[UUID, typer.Argument(metavar="ID", parser=_read_id, help="The batch's id.")]


@commands.command()
def submit(
    file: Annotated[
        str,
        typer.Argument(
            help="NDJSON, a scan's request a line, each with its scan_mode; `-` is standard input."
        ),
    ],
    lane: options.InLane = Lane.BATCH,
    on_invalid: Annotated[
        OnInvalid,
        typer.Option(
            "--on-invalid", help="Refuse all where a line cannot be done, or skip the line."
        ),
    ] = OnInvalid.REFUSE,
    max_failures: Annotated[
        int | None,
        typer.Option(
            "--max-failures",
            parser=options.whole_number(1, MOST_LINES),
            metavar="N",
            help="So many failed scans cancel the rest.",
            show_default="never",
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What it is for.")] = "",
    key: Annotated[
        str | None,
        typer.Option("--key", help="Your word for this batch: sent again it makes no second one."),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the batch's id and leave.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Submit a batch, and follow it to its end. The exit code tells whether every scan succeeded; Ctrl-C cancels it."""
    with _readable(file) as path, options.open_client(url) as client:
        try:
            batch = client.batches.submit(
                path,
                lane=lane,
                on_invalid=on_invalid,
                max_failures=max_failures,
                name=name,
                idempotency_key=key,
            )
        except Refused as refused:
            _say_invalid(refused)
            raise
        _say_skipped(batch, quiet=quiet)
        if no_wait:
            _print(batch, as_json=as_json, quiet=quiet, only_id=True)
            return
        _follow(client, batch, as_json=as_json, quiet=quiet)


@contextmanager
def _readable(file: str) -> Iterator[Path]:
    """A file's path; of standard input a copy, for it can be read but once."""
    if file != "-":
        yield existing(Path(file))
        return
    with tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        yield Path(copy.name)


def _say_invalid(refused: Refused) -> None:
    for line in refused.members.get("invalid", ())[:_SHOWN]:
        note(f"line {line['line']}: {line['detail']}")


def _say_skipped(batch: BatchView, *, quiet: bool) -> None:
    if quiet:
        return
    for line in batch.invalid[:_SHOWN]:
        note(f"line {line.line} is left out: {line.detail}")
    if batch.refused > _SHOWN:
        note(f"and {batch.refused - _SHOWN} lines more")


def _follow(client: Client, batch: BatchView, *, as_json: bool, quiet: bool) -> None:
    try:
        with JobProgress(quiet=quiet) as progress:
            batch = client.batches.wait(batch, _shown(progress))
    except KeyboardInterrupt:
        try:
            client.batches.cancel(batch, most_seconds=PARTING_SECONDS)
        except ClientError as error:
            complain(f"interrupted; batch {batch.id} could not be cancelled: {error}")
        else:
            complain(f"interrupted: batch {batch.id} was cancelled")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    _print(batch, as_json=as_json, quiet=quiet)
    _leave(batch)


def _shown(progress: JobProgress) -> Callable[[BatchEvent], None]:
    """A batch's progress as one of a job's stages."""

    def show(event: BatchEvent) -> None:
        if isinstance(event, BatchProgress):
            progress(Progress(stage="scans", done=event.done, total=event.total))

    return show


def _leave(batch: BatchView) -> None:
    if batch.state is BatchState.RUNNING:
        raise typer.Exit(ExitCode.CANCELLED)
    raise typer.Exit(exit_code_of_batch(batch.state, batch.counts, deleted=batch.deleted))


@commands.command("list")
def list_(
    limit: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(1, 100), metavar="N", help="How many, the newest first."
        ),
    ] = 20,
    after: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only older ones than this: the last of those shown."),
    ] = None,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """List the latest batches."""
    with options.open_client(url) as client:
        listed = client.batches.list(limit, after=after)
    if as_json:
        print_json(listed)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("batch", "name", "state", "scans", "done", "failed", "submitted"):
        table.add_column(heading, no_wrap=heading == "batch")
    for batch in listed:
        counts = batch.counts
        table.add_row(
            str(batch.id),
            Text(batch.name),
            batch.state.value,
            str(counts.total),
            str(counts.done),
            str(counts.failed),
            local_time(batch.created_at),
        )
    standard_output().print(table)
    if len(listed) == limit:
        note(f"older ones: --after {listed[-1].id}")


@commands.command()
def show(batch_id: BatchId, as_json: options.Json = False, url: options.Url = None) -> None:
    """Show how far a batch has come."""
    with options.open_client(url) as client:
        _print(client.batches.get(batch_id), as_json=as_json, quiet=False)


@commands.command()
def watch(
    batch_id: BatchId,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event as a line of JSON, as it comes.")
    ] = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Follow a batch to its end. The exit code tells whether every scan succeeded."""
    with options.open_client(url) as client:
        try:
            if not as_json:
                with JobProgress(quiet=quiet) as progress:
                    batch = client.batches.wait(batch_id, _shown(progress))
                _print(batch, as_json=False, quiet=quiet)
            else:
                for event in client.batches.watch(batch_id):
                    print_json(event)
                batch = client.batches.get(batch_id)
        except KeyboardInterrupt:
            note(f"interrupted: it goes on; stop it with: neural-mri batch cancel {batch_id}")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
    _leave(batch)


@commands.command()
def results(
    batch_id: BatchId,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write every manifest and table there is into this zip."),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option("--table", help="One table of all results: `predictions`, `effects`, ..."),
    ] = None,
    arrow: Annotated[
        Path | None, typer.Option("--arrow", help="With --table: write it here, as Arrow.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="With --table: write it here, as CSV.")
    ] = None,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Print the results so far, a line of JSON each; or take them away."""
    if out is not None and (table or arrow or csv_file):
        raise typer.BadParameter(
            "--out writes everything into one zip: leave out --table, --arrow and --csv"
        )
    if table is None and (arrow or csv_file):
        raise typer.BadParameter("--arrow and --csv write one table: name it by --table")
    with options.open_client(url) as client:
        if out is not None:
            with writing(out, quiet=quiet):
                client.batches.save(batch_id, out)
        elif table is not None:
            _deliver(client.batches.table(batch_id, table), arrow, csv_file, quiet=quiet)
        else:
            for line in client.batches.summaries(batch_id):
                print_json(line)


class _Lost(msgspec.Struct):
    """A line whose result is lost."""

    line: int


def _deliver(table: pa.Table, arrow: Path | None, csv_file: Path | None, *, quiet: bool) -> None:
    lost = msgspec.json.decode((table.schema.metadata or {}).get(LEFT_OUT, b"[]"), type=list[_Lost])
    if lost:
        numbers = ", ".join(str(each.line) for each in lost[:_SHOWN])
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        note(f"left out, because their results are lost: lines {numbers}{more}")
    if arrow is not None:
        with writing(arrow, quiet=quiet):
            feather.write_feather(table, str(arrow), compression="uncompressed")
    if csv_file is not None:
        lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
        with writing(csv_file, quiet=quiet):
            csv.write_csv(table.drop_columns(lists), csv_file)
        if lists:
            note(f"left out of the CSV, because each holds a list: {', '.join(lists)}")
    if arrow is None and csv_file is None:
        for row in table.to_pylist():
            print_json(row)


@commands.command()
def cancel(
    batch_id: BatchId,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Stop a batch: what waits at once, what runs at its next checkpoint."""
    with options.open_client(url) as client:
        _print(client.batches.cancel(batch_id), as_json=as_json, quiet=quiet)


def _print(batch: BatchView, *, as_json: bool, quiet: bool, only_id: bool = False) -> None:
    if as_json:
        print_json(batch)
        return
    if only_id:
        print(batch.id)  # noqa: T201 -- the answer, for a shell to take
        if not quiet:
            note(f"follow it with: neural-mri batch watch {batch.id}")
        return
    if quiet:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("batch", str(batch.id))
    if batch.name:
        table.add_row("name", Text(batch.name))
    table.add_row("state", batch.state.value)
    said = [f"{batch.lines} read"]
    said += [f"{batch.refused} refused"] if batch.refused else []
    said += [f"{batch.deleted} deleted since"] if batch.deleted else []
    said += [f"{batch.repeated} asked for what another had"] if batch.repeated else []
    table.add_row("lines", ", ".join(said))
    counts: dict[str, int] = msgspec.to_builtins(batch.counts)
    told = [f"{count} {name}" for name, count in counts.items() if count]
    table.add_row("scans", ", ".join(told))
    standard_output().print(table)
