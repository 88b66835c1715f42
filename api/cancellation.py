"""Ending tasks for certain."""

import asyncio

__all__ = ("cancelled",)

ASK_AGAIN_SECONDS = 0.05


async def cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel the tasks, wait until each has ended, and raise what one of them raised.

    Asks until they do: before Python 3.12 `asyncio.wait_for`, within which redis-py sends, loses a
    cancellation that comes just as the sending succeeds (bpo-42130). Seen in one of two tries.
    """
    waiting = {task for task in tasks if not task.done()}
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=ASK_AGAIN_SECONDS)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
