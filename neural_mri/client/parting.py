"""What somebody began, and does not wait for any more, is stopped: they were interrupted, or their task was cancelled.

A thread that waits cannot be told that its caller has gone. Another one stops what it waits for, which ends its wait.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Event, Lock
from typing import ParamSpec, TypeVar

from neural_mri.client.errors import ClientError

__all__ = ("Begun", "Parting", "begun", "stay")

P = ParamSpec("P")
Answer = TypeVar("Answer")


class Begun:
    """Something that is stopped where its caller leaves before its end."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._stop: Callable[[], object] | None = None
        self._has_left = False
        self._settled = Event()

    def until(self, stop: Callable[[], object]) -> None:
        """It is under way, and this stops it. Where the caller has left by now, and waits no more, at once."""
        with self._lock:
            self._stop = stop
            is_late = self._has_left
        self._settled.set()
        if is_late:
            self.stop()

    def end(self) -> None:
        """There is nothing to stop any more."""
        with self._lock:
            self._stop = None
        self._settled.set()

    def stop(self) -> None:
        """Stop it where it is under way, and say nothing where that cannot be said either."""
        with self._lock:
            stop = self._stop
        if stop is not None:
            with suppress(ClientError):
                stop()

    def leave(self, seconds: float) -> None:
        """The caller has gone: stop it, and where it is still being asked for wait so long for the answer."""
        if not self._settled.wait(seconds):
            with self._lock:
                self._has_left = True
        self.stop()


class Parting:
    """One call made in a thread for somebody who may leave before it ends."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._begun: Begun | None = None
        self._has_left = False

    def begin(self, something: Begun) -> None:
        """The call is about to ask for this. Raises `ClientError` where nobody is there to want it."""
        with self._lock:
            self.stay()
            self._begun = something

    def stay(self) -> None:
        """The call is about to go on. Raises `ClientError` where nobody is there to want it."""
        if self._has_left:
            raise ClientError("who asked for it has left")

    def leave(self) -> Begun | None:
        """The caller has gone; what the call has begun until now, and will begin no more."""
        with self._lock:
            self._has_left = True
            return self._begun

    def during(self, call: Callable[P, Answer], *args: P.args, **kwargs: P.kwargs) -> Answer:
        """Make the call; what it begins is known here."""
        token = _PARTING.set(self)
        try:
            return call(*args, **kwargs)
        finally:
            _PARTING.reset(token)


_PARTING: ContextVar[Parting | None] = ContextVar("parting", default=None)


@contextmanager
def begun() -> Iterator[Begun]:
    """Around the asking for something and the wait for its end, which is stopped where somebody interrupts them."""
    something = Begun()
    parting = _PARTING.get()
    if parting is not None:
        parting.begin(something)
    try:
        yield something
    except KeyboardInterrupt:
        something.stop()
        raise
    finally:
        something.end()


def stay() -> None:
    """Between two steps of a long call: raises `ClientError` where who asked for it has left."""
    parting = _PARTING.get()
    if parting is not None:
        parting.stay()
