"""Files that are written whole or not at all."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ("replacing",)

_STREAMS = ("/dev/", "/proc/")
"""Whatever stands there is somebody's open file."""
_SPOOLED = 16 << 20


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the path's place once the block has ended well; else what was there stays.

    What is no file, or leads to one that is open, such as `/dev/stdout`, is written to its end from there. Raises
    `OSError` that names the path.
    """
    if str(path.absolute()).startswith(_STREAMS) or (path.exists() and not path.is_file()):
        with tempfile.SpooledTemporaryFile(_SPOOLED) as whole, path.open("wb") as stream:
            yield whole
            whole.seek(0)
            shutil.copyfileobj(whole, stream)
        return
    there = path.resolve()  # of a link it is what the link leads to that is replaced
    workshop = there.with_name(f".{there.name}.{secrets.token_hex(4)}.part")
    try:
        file = workshop.open("xb")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with file:
            yield file
        workshop.replace(there)
    finally:
        workshop.unlink(missing_ok=True)
