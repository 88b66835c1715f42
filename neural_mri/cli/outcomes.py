"""From a submitted job to what the caller asked for: waiting, interrupting, printing, writing files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import typer
from pyarrow import csv

from neural_mri.cli.exits import ExitCode
from neural_mri.cli.options import Outputs
from neural_mri.cli.progress import JobProgress
from neural_mri.cli.report import print_report
from neural_mri.cli.terminal import complain, note, print_json, standard_output
from neural_mri.client import Client, ClientError, Result
from neural_mri.client.exchange import PARTING_SECONDS
from neural_mri.contract.jobs import JobView, Lane
from neural_mri.contract.scans import Scan

__all__ = ("deliver", "follow", "job_document", "scan")


def scan(
    client: Client,
    request: Scan,
    outputs: Outputs,
    *,
    lane: Lane,
    wait: bool,
    head: int | None = None,
) -> None:
    """Submit a scan, and deliver its result unless the caller does not want to wait."""
    try:
        job = client.submit(request, lane=lane)
    except KeyboardInterrupt:
        complain(
            "interrupted before the service answered: `neural-mri jobs` tells what it accepted"
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if not wait:
        if outputs.as_json:
            print_json(job_document(job))
        else:
            print(job.id)  # noqa: T201 -- the answer, for a shell to take
            if not outputs.quiet:
                note(f"follow it with: neural-mri result {job.id}")
        return
    deliver(client, follow(client, job, quiet=outputs.quiet), outputs, head=head)


def follow(client: Client, job: JobView, *, quiet: bool, cancels: bool = True) -> JobView:
    """The job once it has succeeded, its progress shown. An interruption cancels it, or says how to."""
    with _interrupted(client, job, cancels=cancels), JobProgress(quiet=quiet) as progress:
        progress.begin(job)
        return client.wait(job, progress)


def deliver(client: Client, job: JobView, outputs: Outputs, *, head: int | None = None) -> None:
    """Write the files and print the report of a succeeded scan."""
    result = client.result(job)
    if outputs.arrow is not None:
        _write(outputs.arrow, result.arrow(), outputs)
    if outputs.csv is not None:
        with _writing(outputs.csv, outputs):
            csv.write_csv(result.to_long(), outputs.csv)
    if outputs.plot is not None:
        _draw(result, outputs.plot, outputs)
    if outputs.as_json:
        print_json({**job_document(job), "result": result.summary()})
    elif not outputs.quiet:
        print_report(result, job, standard_output(), top=outputs.top, head=head)


def job_document(job: JobView) -> dict[str, Any]:
    """A job as the service writes it."""
    document: dict[str, Any] = msgspec.to_builtins(job)
    return document


@contextmanager
def _interrupted(client: Client, job: JobView, *, cancels: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if cancels:
            complain(f"interrupted: {_cancelled(client, job.id)}")
        else:
            note(f"interrupted: job {job.id} goes on; stop it with: neural-mri cancel {job.id}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _cancelled(client: Client, job_id: UUID) -> str:
    """Cancel a job, and say how that went."""
    try:
        view = client.cancel(job_id, most_seconds=PARTING_SECONDS)
    except (ClientError, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted again"
        return f"job {job_id} could not be cancelled and may still run: {reason}"
    return f"job {job_id} was asked to stop and stands at {view.state.value!r}"


def _draw(result: Result, path: Path, outputs: Outputs) -> None:
    picture = result.plot()
    with _writing(path, outputs):
        picture.savefig(path, dpi=150)


def _write(path: Path, body: bytes, outputs: Outputs) -> None:
    with _writing(path, outputs):
        path.write_bytes(body)


@contextmanager
def _writing(path: Path, outputs: Outputs) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        complain(f"cannot write {path}: {error.strerror or error}")
        raise typer.Exit(ExitCode.USAGE) from error
    if not outputs.quiet:
        note(f"wrote {path}")
