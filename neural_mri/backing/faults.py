"""Points at which a process can be made to die, to prove that nothing accepted is lost there.

Off unless the process was started with `NMRI_CRASH_POINTS` in its environment, a folder: whoever puts a file
of a point's name there ends the next process that comes to the point, as a power cut would, or has something
else befall it that the file names. Whoever comes to the point takes the file away, unless its second line says
`again`: then it befalls each process that comes, until the file is gone. It is no setting, and no request reaches it.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

__all__ = ("AGAIN", "POINTS", "WAYS", "crash_point")

POINTS = (
    "api.recorded",
    "api.batch-chunk",
    "worker.loading",
    "worker.ticket",
    "worker.claimed",
    "worker.computing",
    "worker.computed",
    "worker.written",
    "worker.stored",
    "worker.named",
    "worker.succeeded",
    "reaper.taken-back",
)
"""A job is in the database, its ticket is not sent; some lines of a batch are in the database, with their jobs;
a model is loading; a ticket is taken; jobs are claimed; a layer is computed, others are not; tables are computed; a file is written, not in its place; tables are
stored, no manifest names them; a manifest does, the job does not; the job has succeeded, nobody was told; jobs
are taken back, nobody was told."""

WAYS: dict[str, Callable[[], None]] = {"": lambda: os.kill(os.getpid(), signal.SIGKILL)}
"""What befalls a process at a point, by what stands in the file. Whoever starts it may know of more."""

AGAIN = "again"
"""The second line of a file that stays where it is."""

_FOLDER = os.environ.get("NMRI_CRASH_POINTS")


def crash_point(name: str) -> None:
    """End here, or have worse befall the process, if somebody has asked for it."""
    if _FOLDER is None:
        return
    place = Path(_FOLDER, name)
    try:
        way, _, times = place.read_text().partition("\n")
        if times != AGAIN:
            place.unlink()
    except FileNotFoundError:
        return
    WAYS[way]()
