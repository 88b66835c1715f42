"""`neural-mri job`, `jobs`, `result`, `cancel` and `delete`."""

import re
from typing import Annotated
from uuid import UUID

import typer
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options, outcomes
from neural_mri.cli.options import Outputs
from neural_mri.cli.terminal import local_time, note, print_json, standard_output
from neural_mri.client.progress import place_in_words
from neural_mri.contract.jobs import JobState, JobView

__all__ = ("cancel", "delete", "job", "jobs", "result")


def _read_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a job's id: expected a UUID") from None


def _read_scan_key(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{16,64}", text):
        raise typer.BadParameter(
            f"{text!r} is not a scan's key: expected 16 to 64 hexadecimal digits"
        )
    return text


JobId = Annotated[UUID, typer.Argument(metavar="ID", parser=_read_id, help="The job's id.")]

_STATE_COLOURS = {
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.EXPIRED: "red",
    JobState.QUARANTINED: "red",
    JobState.CANCELLED: "yellow",
}


def job(
    job_id: JobId,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the job to its end first.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Show how a job stands. With --watch the exit code tells how it ended, and Ctrl-C cancels it."""
    with options.open_client(url) as client:
        view = client.job(job_id)
        if watch:
            view = outcomes.follow(client, view, quiet=quiet)
    if as_json:
        print_json(outcomes.job_document(view))
    elif not quiet:
        _print_job(view)


def jobs(
    limit: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(1, 200), metavar="N", help="How many, the newest first."
        ),
    ] = 20,
    after: Annotated[
        UUID | None,
        typer.Option(
            metavar="ID",
            parser=_read_id,
            help="Only older ones than this: the last of those shown.",
        ),
    ] = None,
    scan_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            parser=_read_scan_key,
            help="Only those of this scan, by its key or the first 16 digits of it.",
        ),
    ] = None,
    state: Annotated[
        JobState | None,
        typer.Option(
            parser=options.one_of(JobState),
            metavar="|".join(JobState),
            help="Only those in this state, of the latest thousand.",
        ),
    ] = None,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """List the latest jobs."""
    with options.open_client(url) as client:
        listed = client.jobs(limit, after=after, scan_key=scan_key, state=state)
    if as_json:
        print_json([outcomes.job_document(view) for view in listed])
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("job", "state", "scan", "model", "submitted"):
        table.add_column(heading, no_wrap=heading == "job")
    for view in listed:
        table.add_row(
            str(view.id),
            _state(view),
            _kind(view),
            view.model,
            local_time(view.created_at),
        )
    standard_output().print(table)
    if len(listed) == limit:
        note(f"older ones: --after {listed[-1].id}")


def result(
    job_id: JobId,
    *,
    top: options.Top = 5,
    as_json: options.Json = False,
    arrow: options.ArrowFile = None,
    csv: options.CsvFile = None,
    plot: options.PlotFile = None,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Show the result of a scan, waiting for it if need be. Ctrl-C stops the waiting, and nothing else."""
    outputs = Outputs(as_json, quiet, top, arrow, csv, plot).check()
    with options.open_client(url) as client:
        view = outcomes.follow(client, client.job(job_id), quiet=quiet, cancels=False)
        outcomes.deliver(client, view, outputs)


def cancel(
    job_id: JobId,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Ask for a job to be stopped."""
    with options.open_client(url) as client:
        view = client.cancel(job_id)
    if as_json:
        print_json(outcomes.job_document(view))
    elif not quiet:
        standard_output().print(f"job {view.id} stands at {view.state.value!r}")


def delete(
    job_ids: Annotated[
        list[UUID], typer.Argument(metavar="ID...", parser=_read_id, help="The jobs' ids.")
    ],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Delete jobs that have ended, and their results. What sessions keep stays."""
    if not yes:
        what = (
            "this job and its result"
            if len(job_ids) == 1
            else f"{len(job_ids)} jobs and their results"
        )
        typer.confirm(f"Delete {what}?", abort=True, err=True)
    deleted = []
    try:
        with options.open_client(url) as client:
            for job_id in job_ids:
                deleted.append(each := client.delete(job_id))
                if not (quiet or as_json):
                    kept = ", ".join(map(str, each.sessions))
                    kept = f"; session {kept} keeps its result" if kept else ""
                    note(f"deleted {job_id}{kept}")
    finally:
        if as_json:
            print_json(deleted)  # also where another could not be: these are gone


def _print_job(view: JobView) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("job", str(view.id))
    table.add_row("state", _state(view))
    if view.queue is not None:
        table.add_row("queue", place_in_words(view.queue))
    table.add_row("scan", _kind(view))
    table.add_row("model", f"{view.model} {view.revision[:8]}")
    table.add_row("attempt", str(view.attempt))
    for name, moment in (
        ("submitted", view.created_at),
        ("started", view.started_at),
        ("finished", view.finished_at),
    ):
        if moment is not None:
            table.add_row(name, moment.isoformat(timespec="milliseconds"))
    if view.problem is not None:
        table.add_row("problem", Text(str(view.problem.get("detail") or view.problem.get("title"))))
    standard_output().print(table)


def _state(view: JobView) -> Text:
    known = " (known already)" if view.cached else ""
    return Text(f"{view.state.value}{known}", style=_STATE_COLOURS.get(view.state, "cyan"))


def _kind(view: JobView) -> str:
    """The modality of a scan, or what sort of job it is instead."""
    return str(view.request.get("scan_mode", view.kind.value))
