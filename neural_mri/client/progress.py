"""What calls that wait are waiting for, drawn while they wait, and gone when they have their answer.

One display shows all calls of the process, from whatever threads: bars on a terminal's standard error, or under a
notebook's cell. Where neither is there nothing is drawn; `"lines"` then asks for a line a change, for a log.
"""

import importlib
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from neural_mri.contract import events
from neural_mri.contract.batches import BatchEvent, BatchProgress
from neural_mri.contract.jobs import JobView, QueuePlace

__all__ = (
    "Follower",
    "Log",
    "Row",
    "Screen",
    "ShowProgress",
    "Terminal",
    "amount_in_words",
    "both",
    "name_of",
    "place_in_words",
    "shown",
)

ShowProgress: TypeAlias = bool | Literal["lines"]
"""Whether a call that waits shows how far it is: where somebody can see it, or as lines of a log."""

_COUNTED_IN_BYTES = frozenset({"download", "convert", "load", "weights"})
_PAUSE_SECONDS = 0.1
"""A notebook's cell is drawn anew so often at most."""


def place_in_words(place: QueuePlace | events.Queued) -> str:
    """Where a waiting job stands, and when it is likely to start."""
    said = "next in the queue" if place.position == 1 else f"place {place.position} in the queue"
    if place.estimated_start_seconds is None:
        return said
    return f"{said}, starts in about {_about(place.estimated_start_seconds)}"


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def amount_in_words(stage: str, done: int, total: int) -> str:
    """How much of a stage is done, in its own unit."""
    if stage in _COUNTED_IN_BYTES:
        return f"{decimal(done)} of {decimal(total)}"
    return f"{done} of {total}"


def name_of(job: JobView) -> str:
    """What a job is called where several are shown."""
    return f"{job.request.get('scan_mode', job.kind.value)} {job.model} {str(job.id)[-6:]}"


class Row(NamedTuple):
    """How a call stands."""

    name: str
    said: str
    done: int = 0
    total: int | None = None
    """None: nobody knows how much there is to do."""
    amount: str = ""


class Screen(ABC):
    """Somewhere that rows can be seen. Usable from several threads at once."""

    @abstractmethod
    def draw(self, key: object, row: Row) -> None:
        """Show how a call stands now."""

    @abstractmethod
    def clear(self, key: object) -> None:
        """Show the call no more."""


class Terminal(Screen):
    """Bars, from the first call that waits to the last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.RLock()
        self._bars: Progress | None = None
        self._tasks: dict[object, TaskID] = {}

    def draw(self, key: object, row: Row) -> None:
        """Begin, or move, the call's bar."""
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            fields: dict[str, Any] = {"said": row.said, "amount": row.amount}
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(row.name, total=row.total, **fields)
            self._bars.update(self._tasks[key], completed=row.done, total=row.total, **fields)

    def clear(self, key: object) -> None:
        """Take the call's bar away."""
        with self._lock:
            if self._bars is None or (task := self._tasks.pop(key, None)) is None:
                return
            self._bars.remove_task(task)
            if not self._tasks:
                self._bars.stop()
                self._bars = None


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[said]}", markup=False, style="dim"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


class Log(Screen):
    """A line a change, and none for every step of a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[object, str] = {}

    def draw(self, key: object, row: Row) -> None:
        """Print how the call stands, where that is another thing."""
        if self._said.get(key) != row.said:
            self._said[key] = row.said
            self._console.print(Text(f"{row.name}: {row.said}"), soft_wrap=True)

    def clear(self, key: object) -> None:
        """Forget it: what was printed stays."""
        self._said.pop(key, None)


class _Notebook(Screen):
    """A table under the cell, which needs no widgets."""

    def __init__(self, display: ModuleType) -> None:
        self._display = display
        self._lock = threading.Lock()
        self._rows: dict[object, Row] = {}
        self._handle: Any = None
        self._drawn_at = 0.0

    def draw(self, key: object, row: Row) -> None:
        with self._lock:
            was = self._rows.get(key)
            self._rows[key] = row
            told = was is not None and was.said == row.said
            if not told or time.monotonic() - self._drawn_at > _PAUSE_SECONDS:
                self._paint()

    def clear(self, key: object) -> None:
        with self._lock:
            if self._rows.pop(key, None) is not None:
                self._paint()

    def _paint(self) -> None:
        self._drawn_at = time.monotonic()
        picture = self._display.HTML(table_of(list(self._rows.values())))
        if self._handle is None:
            self._handle = self._display.display(picture, display_id=True)
        else:
            self._handle.update(picture)
        if not self._rows:
            self._handle = None  # the next call is another cell's


def table_of(rows: list[Row]) -> str:
    """Rows as a notebook shows them."""
    lines = "".join(
        f"<tr><td>{escape(row.name)}</td><td>{escape(row.said)}</td><td>{_meter(row)}</td>"
        f"<td>{escape(row.amount)}</td></tr>"
        for row in rows
    )
    return f"<table>{lines}</table>" if rows else ""


def _meter(row: Row) -> str:
    if row.total is None:
        return ""
    return f'<progress value="{row.done}" max="{max(row.total, 1)}"></progress>'


_lock = threading.Lock()
_screens: dict[str, Screen] = {}


def _screen(wanted: ShowProgress) -> Screen | None:
    """Where a call can be seen; the same for all of them."""
    if wanted is False:
        return None
    console = Console(stderr=True, emoji=False, highlight=False)
    kind = "log"
    if wanted is True:
        if console.is_jupyter and "IPython" in sys.modules:
            kind = "notebook"
        elif console.is_terminal:
            kind = "terminal"
        else:
            return None
    with _lock:
        if kind not in _screens:
            match kind:
                case "notebook":
                    _screens[kind] = _Notebook(importlib.import_module("IPython.display"))
                case "terminal":
                    _screens[kind] = Terminal(console)
                case _:
                    _screens[kind] = Log(console)
        return _screens[kind]


class Follower:
    """Turns the events of one call into its row."""

    def __init__(self, screen: Screen, row: Row) -> None:
        self._screen = screen
        self.row = row
        screen.draw(self, row)

    def __call__(self, event: events.Event | BatchEvent) -> None:
        """Show what an event says."""
        name = self.row.name
        match event:
            case events.StateChanged(state=state, attempt=attempt):
                again = f" (attempt {attempt})" if attempt > 1 else ""
                self._draw(Row(name, f"{state.value}{again}"))
            case events.Queued():
                self._draw(Row(name, place_in_words(event)))
            case events.Progress(stage=stage, done=done, total=total):
                amount = amount_in_words(stage, done, total)
                self._draw(Row(name, stage, done, total, amount))
            case events.Ended(state=state):
                self._draw(self.row._replace(said=state.value))
            case BatchProgress(done=done, total=total):
                self.count("scans", done, total)
            case _:
                pass

    def count(self, said: str, done: int, total: int) -> None:
        """Show how many of something there are."""
        self._draw(Row(self.row.name, said, done, total, f"{done} of {total}"))

    def say(self, said: str) -> None:
        """Show how it stands, in words."""
        self._draw(Row(self.row.name, said))

    def end(self) -> None:
        """Show it no more."""
        self._screen.clear(self)

    def _draw(self, row: Row) -> None:
        self.row = row
        self._screen.draw(self, row)


@contextmanager
def shown(name: str, wanted: ShowProgress, said: str = "submitted") -> Iterator[Follower | None]:
    """While a call waits: what hears its events and shows them; None where nobody would see it."""
    screen = _screen(wanted)
    if screen is None:
        yield None
        return
    follower = Follower(screen, Row(name, said))
    try:
        yield follower
    finally:
        follower.end()


def both(
    first: Callable[[Any], None] | None, second: Callable[[Any], None] | None
) -> Callable[[Any], None] | None:
    """One listener for two, or for whichever is there."""
    if first is None or second is None:
        return first or second

    def hear(event: Any) -> None:
        second(event)
        first(event)

    return hear
