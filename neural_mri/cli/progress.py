"""What a job is doing, drawn on standard error from its own events, and gone when it has ended."""

from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from neural_mri.cli.heat import frame_strip
from neural_mri.cli.terminal import complaints
from neural_mri.client.progress import amount_in_words, place_in_words
from neural_mri.contract import events
from neural_mri.contract.components import Component
from neural_mri.contract.jobs import JobView

__all__ = ("JobProgress",)

_EFFECTS_SHOWN = 8


_WHOLE_MODEL = frozenset({"embed", "unembed"})


class _Effect(NamedTuple):
    value: float
    exact: bool


class JobProgress:
    """Call it with each event of a job, inside a `with`. Draws nothing where nobody can see it."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = complaints()
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._state = self._bars.add_task("submitted", total=None, amount="")
        self._stages: dict[str, TaskID] = {}
        self._frames: dict[int, float] = {}
        self._effects: dict[str, _Effect] = {}
        self._effects_unit = ""
        self._live = (
            None
            if quiet or not self._console.is_terminal
            else Live(console=self._console, transient=True, get_renderable=self._picture)
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            try:
                self._live.start()
            except BaseException:  # Ctrl-C in the middle must not leave the cursor hidden
                self._live.stop()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, job: JobView) -> None:
        """Show how a job stands before its first event."""
        said = place_in_words(job.queue) if job.queue else job.state.value
        self._bars.update(self._state, description=said)

    def __call__(self, event: events.Event) -> None:
        """Show what an event says."""
        match event:
            case events.StateChanged(state=state, attempt=attempt):
                again = f" (attempt {attempt})" if attempt > 1 else ""
                self._bars.update(self._state, description=f"{state.value}{again}")
            case events.Queued():
                self._bars.update(self._state, description=place_in_words(event))
            case events.Progress(stage=stage, done=done, total=total):
                if stage not in self._stages:
                    self._stages[stage] = self._bars.add_task(stage, total=total, amount="")
                amount = amount_in_words(stage, done, total)
                self._bars.update(self._stages[stage], completed=done, total=total, amount=amount)
            case events.LayerFrame(layer=layer, heads=heads, attn=attn, mlp=mlp):
                measured = [value for value in (*heads, attn, mlp) if value is not None]
                self._frames[layer] = max(measured, default=float("nan"))
            case events.EffectsFrame(exact=exact, components=components, effects=effects):
                # What was measured takes the place of what was estimated.
                for component, effect in zip(components, effects, strict=True):
                    self._effects[component] = _Effect(effect, exact)
                self._effects_unit = event.unit
            case _:
                pass  # token frames and tables are for pictures; the end closes the display

    def _picture(self) -> Group:
        """The bars; under them a cell a layer reached, hot where something strong is, or the effects so far."""
        below = [self._layers()] if self._frames else []
        return Group(self._bars, *below, *self._strongest())

    def _strongest(self) -> list[Text]:
        """The largest effects known so far, estimates marked."""
        inner = [item for item in self._effects.items() if item[0] not in _WHOLE_MODEL]
        ranked = sorted(inner, key=lambda item: -abs(item[1].value))[:_EFFECTS_SHOWN]
        return [
            Text(f"  {Component.parse(address).label:<10}").append(
                f"{effect.value:+9.4f} {self._effects_unit}  "
                + ("measured" if effect.exact else "estimate"),
                style="" if effect.exact else "dim",
            )
            for address, effect in ranked
        ]

    def _layers(self) -> Text:
        values = np.full(max(self._frames) + 1, np.nan, dtype=np.float32)
        values[list(self._frames)] = list(self._frames.values())
        return frame_strip(values, self._console)
