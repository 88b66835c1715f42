"""Which queues a running worker takes tickets from."""

from typing import Protocol

__all__ = ("Intake",)


class Intake(Protocol):
    """The queues from which this worker takes tickets."""

    def open(self, queue: str) -> None:
        """Take tickets from the queue from now on."""

    def close(self, queue: str) -> None:
        """Take no more tickets from the queue."""
