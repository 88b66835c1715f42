"""How a process of ours ends when it can do nothing useful any more."""

import os
import signal

__all__ = ("end_process",)


def end_process() -> None:
    """Kill this process: what it held is taken up elsewhere, and its parent starts another in its place.

    Nothing else is tidied up, for whatever would do that may be what hangs.
    """
    os.kill(os.getpid(), signal.SIGKILL)
