"""Who asks, where proxies stand between.

Each proxy adds to `X-Forwarded-For` the address that asked it. What stands there is anybody's word until one comes to an
address that a trusted proxy has added, so it is read from its end: the last that is no trusted proxy's is the caller.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

__all__ = ("Proxies",)

Network = IPv4Network | IPv6Network


class Proxies:
    """Those whose word on who asks is taken."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = tuple(networks)

    def origin(self, peer: str, forwarded: Iterable[str]) -> str:
        """The caller's address: the peer's own, unless it is a proxy that is trusted and names another."""
        caller = peer
        told = [part for line in forwarded for part in line.split(",")]
        while told and self._has(caller):
            address = _read(told.pop())
            if address is None:
                break  # whoever wrote that is no proxy of ours: what it passed on counts as its own
            caller = str(address)
        return caller

    def _has(self, address: str) -> bool:
        read = _read(address)
        return read is not None and any(read in network for network in self._networks)


def _read(text: str) -> IPv4Address | IPv6Address | None:
    """An address, with a port behind it or not; an IPv4 address in IPv6's clothes is itself."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
