"""`neural-mri watch`: jobs, batches and sessions followed side by side to their ends."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Annotated, Any, NamedTuple, TypeAlias
from uuid import UUID

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options
from neural_mri.cli.exits import ExitCode, exit_code_of_batch
from neural_mri.cli.terminal import complaints, note, print_json, standard_output
from neural_mri.client import Client, Refused
from neural_mri.client.progress import (
    Follower,
    Log,
    Row,
    Screen,
    Terminal,
    name_of,
    place_in_words,
)
from neural_mri.client.watching import MOST_TOGETHER, JobEvent
from neural_mri.contract.batches import BatchEnded, BatchView
from neural_mri.contract.events import Ended
from neural_mri.contract.jobs import JobState, JobView, QueuePlace
from neural_mri.contract.sessions import ScanArrived, SessionClosed, SessionSaved, SessionView

__all__ = ("watch",)

Watched: TypeAlias = JobView | BatchView | SessionView


class _Told(NamedTuple):
    """An event, and what it is of."""

    watched: UUID
    event: Any


def _read_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no id of a job, batch or session: expected a UUID"
        ) from None


def watch(
    ids: Annotated[
        list[UUID],
        typer.Argument(
            metavar="ID...", parser=_read_id, help="Of jobs, batches or sessions, in any order."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event as a line of JSON, as it comes.")
    ] = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Follow jobs and batches to their ends: progress, places in the queue, estimates.

    The exit code tells whether all succeeded. Ctrl-C stops the watching, and nothing else. A session is followed
    until it is deleted.
    """
    with options.open_client(url) as client:
        watched = {each: _found(client, each) for each in dict.fromkeys(ids)}
        try:
            told = _merged(_sources(client, watched))
            ends = _printed(told, watched) if as_json else _drawn(told, watched, quiet=quiet)
        except KeyboardInterrupt:
            note("interrupted: what was watched goes on")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
    if not as_json and not quiet:
        _print_ends(watched, ends)
    raise typer.Exit(_verdict(ends.values()))


def _found(client: Client, each: UUID) -> Watched:
    """What bears an id. Raises the `Refused` that says that nothing does."""
    looks: tuple[Callable[[UUID], Watched], ...] = (
        client.job,
        client.batches.get,
        client.sessions.get,
    )
    for look in looks:
        try:
            return look(each)
        except Refused as refused:
            if refused.status != 404:
                raise
    raise Refused(
        {"status": 404, "title": "Unknown", "detail": f"there is no job, batch or session {each}"}
    )


def _sources(client: Client, watched: dict[UUID, Watched]) -> list[Iterator[_Told]]:
    """Streams that tell of everything between them."""
    jobs = [view.id for view in watched.values() if isinstance(view, JobView)]
    groups = [jobs[at : at + MOST_TOGETHER] for at in range(0, len(jobs), MOST_TOGETHER)]
    streams: list[Iterator[_Told]] = [map(_of_job, client.watch_many(group)) for group in groups]
    for view in watched.values():
        if isinstance(view, BatchView):
            streams.append(map(partial(_Told, view.id), client.batches.watch(view)))
        elif isinstance(view, SessionView):
            streams.append(map(partial(_Told, view.id), client.sessions.watch(view)))
    return streams


def _of_job(told: JobEvent) -> _Told:
    return _Told(told.job, told.event)


def _merged(sources: Sequence[Iterator[_Told]]) -> Iterator[_Told]:
    """What several streams tell, as it comes; raises what one of them raises."""
    if len(sources) == 1:
        yield from sources[0]
        return
    arrived: SimpleQueue[_Told | BaseException | None] = SimpleQueue()

    def read(source: Iterator[_Told]) -> None:
        try:
            for told in source:
                arrived.put(told)
        except BaseException as error:  # noqa: BLE001 -- raised where the events are read
            arrived.put(error)
        else:
            arrived.put(None)

    for source in sources:
        # Whoever stops watching does not wait for what comes next.
        threading.Thread(target=read, args=(source,), daemon=True).start()
    left = len(sources)
    while left:
        told = arrived.get()
        if isinstance(told, BaseException):
            raise told
        if told is None:
            left -= 1
        else:
            yield told


class _End(NamedTuple):
    """How something ended."""

    said: str
    code: ExitCode


def _end(event: Any, view: Watched) -> _End | None:
    """The end that an event tells of."""
    match event:
        case Ended(state=state):
            return _End(state.value, _CODES.get(state, ExitCode.FAILED))
        case BatchEnded(state=state, counts=counts):
            said = f"{state.value}, {counts.succeeded} of {counts.total} succeeded"
            deleted = view.deleted if isinstance(view, BatchView) else 0
            return _End(said, exit_code_of_batch(state, counts, deleted=deleted))
        case SessionClosed():
            return _End("deleted", ExitCode.DONE)
        case _:
            return None


_CODES = {JobState.SUCCEEDED: ExitCode.DONE, JobState.CANCELLED: ExitCode.CANCELLED}


def _verdict(ends: Iterable[_End]) -> ExitCode:
    """The worst of them: a failure before a cancellation."""
    codes = {end.code for end in ends}
    return next(
        (code for code in (ExitCode.FAILED, ExitCode.CANCELLED) if code in codes), ExitCode.DONE
    )


def _printed(told: Iterator[_Told], watched: dict[UUID, Watched]) -> dict[UUID, _End]:
    """Each event as a line of JSON that says what it is of."""
    ends = {}
    for which, event in told:
        print_json({_sort(watched[which]): str(which), **msgspec.to_builtins(event)})
        if (end := _end(event, watched[which])) is not None:
            ends[which] = end
    return ends


def _drawn(told: Iterator[_Told], watched: dict[UUID, Watched], *, quiet: bool) -> dict[UUID, _End]:
    """A bar for each, where somebody can see it; else a line a change."""
    ends = {}
    with ExitStack() as drawing:
        followers = {} if quiet else _followers(watched, drawing)
        for which, event in told:
            if which in followers:
                _show(followers[which], event)
            if (end := _end(event, watched[which])) is not None:
                ends[which] = end
    return ends


def _followers(watched: dict[UUID, Watched], drawing: ExitStack) -> dict[UUID, Follower]:
    console = complaints()
    screen: Screen = Terminal(console) if console.is_terminal else Log(console)
    followers = {}
    for each, view in watched.items():
        followers[each] = Follower(screen, _first_row(view))
        drawing.callback(followers[each].end)
    return followers


def _first_row(view: Watched) -> Row:
    match view:
        case JobView(queue=QueuePlace() as place):
            return Row(name_of(view), place_in_words(place))
        case JobView(state=state):
            return Row(name_of(view), state.value)
        case BatchView(name=name, state=state):
            return Row(f"batch {name or view.id}", state.value)
        case _:
            return Row(f"session {view.name}", f"revision {view.revision}")


def _show(follower: Follower, event: Any) -> None:
    match event:
        case SessionSaved(number=number):
            follower.say(f"revision {number}")
        case ScanArrived(label=label, job=job, state=state):
            follower.say(f"{label or job} is {state.value}")
        case _:
            follower(event)


def _sort(view: Watched) -> str:
    if isinstance(view, JobView):
        return "job"
    return "batch" if isinstance(view, BatchView) else "session"


def _print_ends(watched: dict[UUID, Watched], ends: dict[UUID, _End]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("id", "what", "ended"):
        table.add_column(heading, no_wrap=heading != "what", overflow="fold")
    for each, view in watched.items():
        end = ends.get(each)
        table.add_row(
            str(each), Text(_first_row(view).name), Text("?" if end is None else end.said)
        )
    standard_output().print(table)
