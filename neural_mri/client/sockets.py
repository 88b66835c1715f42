"""The sockets of a client's connections, so that who waits at one can be woken.

Closing a socket does not wake a thread that reads from it; shutting it down does.
"""

import socket
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

__all__ = ("Sockets",)


class Sockets:
    """Those that requests with these `extensions` have opened. Usable from several threads at once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: WeakSet[socket.socket] = WeakSet()
        self._are_shut = False
        self.extensions: Mapping[str, Any] = MappingProxyType({"trace": self._hear})

    def shut_down(self) -> None:
        """End what waits at any of them, now and from now on."""
        with self._lock:
            self._are_shut = True
            for each in self._open:
                _shut(each)

    def _hear(self, event: str, told: Mapping[str, Any]) -> None:
        # TLS makes another socket of the one that was connected.
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            opened = told["return_value"].get_extra_info("socket")
            with self._lock:
                self._open.add(opened)
                if self._are_shut:
                    _shut(opened)


def _shut(each: socket.socket) -> None:
    with suppress(OSError):  # it has ended already
        each.shutdown(socket.SHUT_RDWR)
