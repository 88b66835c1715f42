"""Pass connections on, as an engine does for a port that is published: `publishing.py ADDRESS PORT TARGET PORT`.

A program of its own, as it listens where others are: in the network that it is started in.
"""

import asyncio
import sys
from contextlib import suppress


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()


async def main(address: str, port: str, target: str, its_port: str) -> None:
    """Serve for ever."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            theirs, ours = await asyncio.open_connection(target, int(its_port))
            await asyncio.gather(_pass_on(reader, ours), _pass_on(theirs, writer))
            ours.close()
        writer.close()

    server = await asyncio.start_server(connected, address, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
