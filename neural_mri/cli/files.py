"""Files that commands write and read: what is wrong with one is a sentence, not a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from neural_mri.cli.exits import ExitCode
from neural_mri.cli.terminal import complain, note

__all__ = ("existing", "writing")


@contextmanager
def writing(path: Path, *, quiet: bool) -> Iterator[Path]:
    """Around the writing of a file; says that it was written."""
    try:
        yield path
    except OSError as error:
        complain(f"cannot write {path}: {error.strerror or error}")
        raise typer.Exit(ExitCode.USAGE) from error
    if not quiet:
        note(f"wrote {path}")


def existing(path: Path, hint: str = "FILE") -> Path:
    """A file that can be read. Raises `typer.BadParameter`."""
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}", param_hint=hint)
    return path
