"""What is done alike wherever a process that has imported everything forks others."""

import ctypes
import gc
import os
import signal
import sys

__all__ = ("forked", "ready_to_import")

_PR_SET_PDEATHSIG = 1


def ready_to_import() -> None:
    """Before PyTorch and its like are imported by a process that is to fork. Collects no garbage from then on."""
    # An allocator of Arrow's that is not in use would start a thread.
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    # Millions of objects come with torch and stay. To look for garbage among them is a fifth of the start.
    gc.disable()


def forked() -> int:
    """The child's process id; 0 in the child, which the kernel ends with its parent. On Linux."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if not child:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)
    return child
