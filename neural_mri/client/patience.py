"""How long a call goes on when the service is away, busy or full, and how it waits in between.

Knows nothing of HTTP: which failures pass by themselves is `errors`' to say.
"""

import random
import time
from collections.abc import Iterable, Iterator
from threading import Event

from neural_mri.client.errors import ClientError, Refused, Unreachable

__all__ = ("Patience", "Transfer")

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 10.0


class Patience:
    """One call's: how long to wait before the next attempt, and when to stop trying."""

    def __init__(self, seconds: float, left: Event) -> None:
        """Give up `seconds` after the service was last heard; at once when the caller has `left`."""
        self._seconds = seconds
        self._left = left
        self._first_pause = _FIRST_PAUSE_SECONDS
        self._heard_at = time.monotonic()
        self._failures = 0

    def heard(self, asked_pause_seconds: float | None = None) -> None:
        """The service is there, and may have said how long to wait before coming back."""
        self._heard_at = time.monotonic()
        if asked_pause_seconds is not None:
            self._first_pause = asked_pause_seconds

    def got_on(self) -> None:
        """The attempt brought something; the next pause is a short one again."""
        self._failures = 0

    def rest(self, at_least: float = 0.0) -> None:
        """Wait before the next attempt."""
        self._left.wait(max(self._pause(), at_least))

    def bear(
        self, error: Unreachable | Refused, *, repeatable: bool = True, met: bool = True
    ) -> None:
        """Wait before another attempt; raise the error where none would help, or it would come too late.

        `repeatable` says that the request may be done twice, `met` that the service was there before: one
        that never was is no service that will soon be back.
        """
        asked = error.retry_after_seconds or 0.0 if isinstance(error, Refused) else 0.0
        elapsed = time.monotonic() - self._heard_at
        if (
            not _passes(error, repeatable=repeatable, met=met)
            or elapsed + asked > self._seconds
            or self._left.is_set()
        ):
            raise error
        self.rest(asked)
        if self._left.is_set():
            raise error  # there is no connection any more to ask on

    def _pause(self) -> float:
        """Seconds before the next attempt: doubling, up to a bound.

        Jitter keeps the clients of a restarted service from coming back all at once.
        """
        longest: float = min(self._first_pause * 2**self._failures, _LONGEST_PAUSE_SECONDS)
        self._failures += 1
        return longest * (0.5 + random.random() / 2)  # noqa: S311 -- spreads load, guards nothing


class Transfer:
    """What one call sends and receives: each piece is a word from the service that it is there.

    Not where an earlier attempt has got as far: what breaks at the same place every time would never end.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._bytes = self._furthest = 0

    def begin(self) -> None:
        """Another attempt, from the start."""
        self._bytes = 0

    def told(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces, one after another, as they go by."""
        for piece in pieces:
            yield piece
            self._bytes += len(piece)
            if self._bytes > self._furthest:
                self._furthest = self._bytes
                self._patience.heard()


def _passes(error: ClientError, *, repeatable: bool, met: bool) -> bool:
    """Whether a later attempt may not meet the error, and would do no harm."""
    match error:
        case Refused(did_nothing=True):
            return True
        case Refused(passes=passes):
            return passes and repeatable
        case Unreachable(sent=sent, broken=broken):
            return (repeatable or not sent) and (broken or met)
        case _:
            return False
