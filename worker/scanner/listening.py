"""What a scan tells while it runs, and how it is stopped."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from neural_mri.contract.events import ActivationFrame, EffectsFrame, LayerFrame

__all__ = ("Cancelled", "Listener", "Silent", "Timed")


class Cancelled(Exception):
    """The scan was asked to stop, and stopped."""


@runtime_checkable
class Listener(Protocol):
    """Hears a scan. Called on the thread that runs it, between steps of the model: be quick."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are behind us."""

    def layer(self, layer: int, make: Callable[[], LayerFrame]) -> None:
        """A layer has been computed. Its frame is made as those of tokens are."""

    def frames(self, make: Callable[[], Sequence[ActivationFrame]]) -> None:
        """Tokens' values are known, exactly as they will be stored.

        Made only where somebody is to see them, perhaps a little later and by another thread.
        """

    def effects(self, frame: EffectsFrame) -> None:
        """Effects of components have been estimated, or measured."""

    def checkpoint(self) -> None:
        """Raises `Cancelled` when the scan should go no further."""

    def pause(self) -> None:
        """The same between two steps, when no hook of the scan's is on any model, or none is heeded.

        Another scan may run before it returns, of this model too.
        """


class Silent:
    """Hears everything and says nothing."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Nothing."""

    def layer(self, layer: int, make: Callable[[], LayerFrame]) -> None:
        """Nothing: it is not even made."""

    def frames(self, make: Callable[[], Sequence[ActivationFrame]]) -> None:
        """Nothing: they are not even made."""

    def effects(self, frame: EffectsFrame) -> None:
        """Nothing."""

    def checkpoint(self) -> None:
        """Nothing: a scan that nobody hears is never stopped."""

    def pause(self) -> None:
        """Only a checkpoint: there is nobody to let in between."""
        self.checkpoint()


class Timed:
    """Passes on what work tells and asks, and knows how much of the time since then was the work's own.

    May be asked for it by another thread.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._since = time.monotonic()
        """When it began, moved on by what it has lent."""
        self._paused_at: float | None = None

    @property
    def own_seconds(self) -> float:
        """How long it has run, without its pauses: others run in them."""
        paused_at = self._paused_at
        return (time.monotonic() if paused_at is None else paused_at) - self._since

    def progress(self, stage: str, done: int, total: int) -> None:
        """Passed on."""
        self._listener.progress(stage, done, total)

    def layer(self, layer: int, make: Callable[[], LayerFrame]) -> None:
        """Passed on."""
        self._listener.layer(layer, make)

    def frames(self, make: Callable[[], Sequence[ActivationFrame]]) -> None:
        """Passed on."""
        self._listener.frames(make)

    def effects(self, frame: EffectsFrame) -> None:
        """Passed on."""
        self._listener.effects(frame)

    def checkpoint(self) -> None:
        """Passed on."""
        self._listener.checkpoint()

    def pause(self) -> None:
        """Passed on; what it takes is not the work's."""
        self._paused_at = began = time.monotonic()
        try:
            self._listener.pause()
        finally:
            self._since += time.monotonic() - began
            self._paused_at = None
