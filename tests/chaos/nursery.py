"""A process that has imported everything and runs nothing, so that children of it start at once.

    python -m tests.chaos.nursery

Reads one JSON line a child wanted and answers with its process id. A child is the service's own program, in
a session of its own, with its own environment, log and, if so asked, network namespace and host name; it
dies with the nursery. A worker that imports torch anew would take longer to start than most of what is done
to it.
"""

import ctypes
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from neural_mri.backing import faults
from tests.chaos.ways import WAYS

__all__ = ("PROGRAMS",)

PROGRAMS = ("api", "worker", "reaper")
DEAF_LOOKS = 5
"""Nobody here waits for as long as elsewhere."""
CLONE_NEWUTS = 0x04000000
PR_SET_PDEATHSIG = 1


def _run(wanted: dict[str, Any]) -> int:
    os.environ.update(wanted["environment"])
    random.seed()
    faults.WAYS.update(WAYS)
    match wanted["program"]:
        case "api":
            from api.__main__ import main
        case "worker":
            from worker import hearing
            from worker.__main__ import main

            hearing.DEAF_LOOKS = DEAF_LOOKS
        case "reaper":
            from worker.reaper import main
        case other:
            raise LookupError(other)
    return main()


def _settle(wanted: dict[str, Any]) -> None:
    """Become a process of the wanted host, alone in its session, that writes to its log."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    if namespace := wanted.get("network"):
        with Path("/run/netns", namespace).open() as place:
            if libc.setns(place.fileno(), 0) or libc.unshare(CLONE_NEWUTS):
                raise OSError(ctypes.get_errno(), "the namespace cannot be entered")
        name = namespace.encode()
        libc.sethostname(name, len(name))
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for file, place_of in ((null, 0), (log, 1), (log, 2)):
        os.dup2(file, place_of)
    os.closerange(3, 1024)


def _born(wanted: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        _settle(wanted)
        status = _run(wanted)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001  the child's last word; it must not go on as the nursery
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _import_everything() -> None:
    import importlib

    for module in (
        "api.app",
        "uvicorn",
        "uvloop",
        "worker.process",
        "worker.reaper",
        "transformers",
    ):
        importlib.import_module(module)
    from transformers import LlamaForCausalLM

    if LlamaForCausalLM is None:
        raise ImportError("transformers has no Llama")


def _answer(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Bear children until the input ends; then end, and they with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_everything()
    _answer("ready")
    for line in sys.stdin:
        _answer(str(_born(json.loads(line))))
    os._exit(0)  # at once: the children go with us


if __name__ == "__main__":
    main()
