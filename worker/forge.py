"""Forks processes that scan checkpoints: `python -m worker.forge SOCKET`, a descriptor to inherit.

Importing PyTorch and its like takes longer than measuring a small checkpoint, and nothing in it depends on
which. So it is done once, and each checkpoint has processes that begin where the imports end
(`contract.local.Open`). The second to hold a checkpoint is forked from the first once that has loaded it:
weights that nobody changes are in memory once. Not so where there may be a GPU, whose context no fork
survives: there each loads for itself. It ends when the socket does, and its processes with it.
"""

import argparse
import gc
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import BinaryIO, NamedTuple, NoReturn

import msgspec

from neural_mri.backing import logs
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings
from neural_mri.contract.local import MOST_PROCESSES, Open
from worker.children import forked, ready_to_import
from worker.visible import choose_gpu

__all__ = ("main", "may_share_weights")

_LARGEST_MESSAGE = 1 << 16
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA's driver, of AMD's, and of Linux under Windows."""


class _Pipes(NamedTuple):
    """One process's."""

    asks: int
    answers: int

    def opened(self) -> tuple[BinaryIO, BinaryIO]:
        """As files."""
        return os.fdopen(self.asks, "rb"), os.fdopen(self.answers, "wb")

    def close(self) -> None:
        """They are another process's."""
        os.close(self.asks)
        os.close(self.answers)


def main(arguments: list[str] | None = None) -> int:
    """Import, then fork whoever is asked for until the socket ends."""
    parser = argparse.ArgumentParser(prog="python -m worker.forge")
    parser.add_argument("socket", type=int, help="the descriptor of a datagram socket")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where our output goes is where whoever started us prints what was asked for.
    os.dup2(2, 1)
    try:
        settings = load_settings()
        choose_gpu(settings)
    except InvalidSettings as error:
        sys.stderr.write(f"neural-mri: {error}\n")
        return 1
    logs.configure(settings, process="local")
    ready_to_import()
    import worker.local  # noqa: F401

    # What stands now is every child's: a collection that marked it would copy it.
    gc.freeze()
    gc.enable()
    with socket.socket(fileno=given.socket) as asked:
        _fork_for(settings, asked)
    return 0


def _fork_for(settings: Settings, asked: socket.socket) -> None:
    """Until the socket ends."""
    with selectors.DefaultSelector() as either:
        either.register(asked, selectors.EVENT_READ)
        while True:
            for key, _ in either.select():
                if key.data is not None:
                    either.unregister(key.fd)
                    os.close(key.fd)
                    _bury(*key.data)
                    continue
                message, descriptors, *_ = socket.recv_fds(
                    asked, _LARGEST_MESSAGE, 2 * MOST_PROCESSES
                )
                if not message:
                    return
                wanted = msgspec.msgpack.decode(message, type=Open)
                pairs = zip(descriptors[::2], descriptors[1::2], strict=True)
                pipes = [_Pipes(*pair) for pair in pairs]
                child = forked()
                if not child:
                    asked.close()
                    _be(settings, wanted, pipes)
                for each in pipes:
                    each.close()
                ended = os.pidfd_open(child)
                either.register(ended, selectors.EVENT_READ, (child, wanted.model))


def _bury(child: int, model: str) -> None:
    """Say by what a process ended that did not end with its input."""
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        how = f"status {code}" if code > 0 else signal.Signals(-code).name
        sys.stderr.write(f"neural-mri: the process that scans {model} ended by {how}\n")


def _be(settings: Settings, wanted: Open, pipes: Sequence[_Pipes]) -> NoReturn:
    """A process that scans, to its end. What is left of the parent's in it is not taken apart."""
    status = 1
    try:
        _serve(settings, wanted, pipes)
        status = 0
    except BrokenPipeError:  # nobody waits any more
        status = 0
    except BaseException:  # noqa: BLE001  whatever it is, the caller's frames are the parent's
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(settings: Settings, wanted: Open, pipes: Sequence[_Pipes]) -> None:
    """Be the first process, and fork the others once the checkpoint stands in memory."""
    import torch

    from worker import local

    def opened() -> local.LocalScanner:
        return local.opened(settings, wanted.model, Path(wanted.store))

    own, *others = pipes
    if not may_share_weights(settings):
        mine = _fork_each(others, wanted.model)
        if mine is not None:
            own.close()
        torch.set_num_threads(wanted.threads)
        local.serve(opened, *(mine or own).opened())
        return
    # A pool of threads would be missing in whoever is forked later, who would wait for it for ever.
    torch.set_num_threads(1 if others else wanted.threads)
    asks, answers = own.opened()
    scanner = local.serve(opened, asks, answers, until_prepared=True)
    if scanner is None:
        return
    if (mine := _fork_each(others, wanted.model)) is not None:
        asks.close()
        answers.close()
        asks, answers = mine.opened()
    torch.set_num_threads(wanted.threads)
    local.serve(lambda: scanner, asks, answers)


def may_share_weights(settings: Settings) -> bool:
    """Whether a process that has loaded a checkpoint may still be forked."""
    on_cpu = settings.device == "cpu"
    return on_cpu or (settings.device == "auto" and not any(map(os.path.exists, _GPUS)))


def _fork_each(others: Sequence[_Pipes], model: str) -> _Pipes | None:
    """Fork a process for each. Its pipes, in such a process; None in the one that forked them."""
    children = []
    for index, its in enumerate(others):
        child = forked()
        if not child:
            for each in others[index + 1 :]:
                each.close()
            return its
        its.close()
        children.append(child)
    for child in children:
        # This process has its own scans to see to, and forks nobody any more.
        Thread(target=_bury, args=(child, model), daemon=True).start()
    return None


if __name__ == "__main__":
    sys.exit(main())
