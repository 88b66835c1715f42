"""What a job tells while nobody is known to watch it: frames wait until somebody does, or are never made.

A forward tells of every layer and token of every job in it, tens of kilobytes a scan, and how far it has come
as often. Most jobs are nobody's to look at while they run: batches, and whoever holds out for the answer. The
tables have all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import structlog

from neural_mri.contract.events import (
    ActivationFrame,
    EffectsFrame,
    Ended,
    Event,
    LayerFrame,
    Progress,
)

__all__ = ("Frames", "Unseen")

log = structlog.get_logger(__name__)


class Frames(NamedTuple):
    """Frames that are made only where somebody is to see them."""

    make: Callable[[], LayerFrame | Sequence[ActivationFrame]]
    layer: int | None = None
    """The one that there is a frame of; None where they are of tokens."""

    def made(self) -> Sequence[LayerFrame | ActivationFrame]:
        """Somebody is to see them."""
        made = self.make()
        return (made,) if isinstance(made, LayerFrame) else made


Picture: TypeAlias = LayerFrame | ActivationFrame | EffectsFrame | Frames | Progress
"""What only who watches is to see."""


class Unseen:
    """One job's events, in order, that have not been sent."""

    def __init__(self) -> None:
        self._kept: dict[object, Event | Frames] = {}
        """Of one layer the newest frame only, and of one stage the newest progress, in the place of the first."""
        self._n_pictures = 0
        self.was_asked_for = False
        """Whether it has been asked before who watches."""
        self.has_end = False
        """Whether the job's end is among them: behind it there is nothing to come."""

    @property
    def takes_pictures(self) -> bool:
        """Whether one more makes no difference to when somebody is asked who watches."""
        return self.was_asked_for and self._n_pictures > 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def has_pictures(self) -> bool:
        """Whether there is something that only who watches is to see."""
        return self._n_pictures > 0

    @property
    def has_news(self) -> bool:
        """Whether there is something that is told in any case."""
        return len(self._kept) > self._n_pictures

    def keep(self, event: Event | Frames) -> None:
        """Put an event behind the others."""
        place: object = None
        if isinstance(event, Progress):
            place = event.stage
        elif isinstance(event, LayerFrame | Frames):
            place = event.layer
        if place is None:
            place = object()
        if place not in self._kept and isinstance(event, Picture):
            self._n_pictures += 1
        self._kept[place] = event
        self.has_end |= isinstance(event, Ended)

    def taken(self) -> Iterator[Event]:
        """Takes everything out, pictures made: somebody watches. One that cannot be made is left out."""
        kept, self._kept, self._n_pictures = self._kept, {}, 0
        for event in kept.values():
            if isinstance(event, Frames):
                try:
                    made = event.made()
                except Exception:
                    # It reads what the scan has measured, on the scan's own device. What is told besides is not lost
                    # with it, and the scan finds out for itself what is wrong.
                    log.exception("frames_not_made", layer=event.layer)
                else:
                    yield from made
            else:
                yield event

    def news_taken(self) -> Iterator[Event]:
        """Takes out what is told in any case."""
        for place, event in tuple(self._kept.items()):
            if not isinstance(event, Picture):
                del self._kept[place]
                yield event
