"""Tables that are in a bucket, as answers: fetched piece by piece, however large they are.

Whoever is sent a whole table is sent bytes that hash to its name. A large one is fetched once to be seen to, which
is remembered: objects are not written twice with other bytes. One that is a piece by itself is seen to each time. A part
of one is held against its length alone; that it is what was written is then the bucket's own care.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias, TypeVar

from api.files import Extent
from neural_mri.backing.storage import Damaged
from neural_mri.backing.stored import StoredTable

__all__ = ("PIECE_BYTES", "DistantTable", "Fetch", "Guarded", "checked", "hash_of")

PIECE_BYTES = 4 << 20
"""Fetched at once, and held for each reader: enough for a bucket's delay not to count."""
SEEN_KEPT = 4096

Fetch: TypeAlias = Callable[[int, int], bytes]
"""A table's bytes `start` up to `end`, in a thread; fewer where the file ends. Raises `Missing`."""

T = TypeVar("T")


class Guarded(Protocol):
    """Sees to what becomes of a table that turns out to be gone."""

    async def __call__(self, reading: Awaitable[T]) -> T:
        """What is read, where it is there. Raises `Missing`, `Damaged`."""


_seen: OrderedDict[tuple[str, int, str], None] = OrderedDict()
"""Tables that had the hash they are named for: their objects, where they begin in them, and the hash."""


class DistantTable:
    """One table's bytes, or those of them that are served. A `files.Remote`."""

    def __init__(
        self,
        table: StoredTable,
        fetch: Fetch,
        served: Extent,
        guarded: Guarded,
    ) -> None:
        self._table = table
        self._fetch = fetch
        self._served = served
        self._guarded = guarded

    async def first(self, part: Extent | None) -> bytes:
        """The first piece of a part, or of the whole where that is what was written. Raises `Missing`, `Damaged`."""
        return await self._guarded(self._first(part))

    async def piece(self, part: Extent) -> bytes:
        """Bytes of what is served, all that are asked for. Raises `Missing`, `Damaged`."""
        return await self._guarded(self._piece(part))

    async def _first(self, part: Extent | None) -> bytes:
        if part is not None:
            return await self._piece(Extent(part.start, min(part.end, part.start + PIECE_BYTES)))
        table, served = self._table, self._served
        if table.ref.bytes <= PIECE_BYTES:
            body = await asyncio.to_thread(self._fetch, 0, table.ref.bytes)
            checked(hashlib.sha256(body).hexdigest(), table)
            return body[served.start : served.end]
        key = (table.path, table.start, table.ref.chunk)
        if key not in _seen:
            checked(await asyncio.to_thread(hash_of, self._fetch, table.ref.bytes), table)
            _seen[key] = None
            if len(_seen) > SEEN_KEPT:
                _seen.popitem(last=False)
        return await self._piece(Extent(0, min(served.end - served.start, PIECE_BYTES)))

    async def _piece(self, part: Extent) -> bytes:
        start, end = (self._served.start + at for at in part)
        body = await asyncio.to_thread(self._fetch, start, end)
        if len(body) != end - start:
            path = self._table.path
            raise Damaged(f"{path} ends before its byte {self._table.start + end}", path=path)
        return body


def hash_of(fetch: Fetch, size: int) -> str:
    """What so many bytes hash to, or those that there are, wherever they are; a piece is in memory at once."""
    hashed, at = hashlib.sha256(), 0
    while at < size and (piece := fetch(at, min(size, at + PIECE_BYTES))):
        hashed.update(piece)
        at += len(piece)
    return hashed.hexdigest()


def checked(found: str, table: StoredTable) -> None:
    """Raises `Damaged` unless a table's bytes hash to its name."""
    ref = table.ref
    if found != ref.chunk:
        raise Damaged(
            f"the bytes of table {ref.name} have the hash {found}, not the {ref.chunk} they were "
            "stored under"
        )
