"""Standard output and standard error: where answers go, and where everything else does."""

import os
import sys
from datetime import datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

__all__ = ("complain", "complaints", "local_time", "note", "print_json", "standard_output")


_WIDTH_OF_A_PIPE = 200
"""Columns where there is no terminal: lines broken at 80 would only be harder to search."""


def standard_output() -> Console:
    """Console for answers. Prints text as it is: no markup, no emoji codes, nothing highlighted."""
    return _console(stderr=False)


def complaints() -> Console:
    """Console for progress, notes and errors."""
    return _console(stderr=True)


def print_json(document: Any) -> None:
    """One JSON document, in UTF-8 whatever the terminal's encoding, and nothing else."""
    sys.stdout.buffer.write(msgspec.json.encode(document) + b"\n")
    sys.stdout.flush()


def complain(sentence: str) -> None:
    """One line on standard error, under the program's name."""
    line = Text("neural-mri: ", style="bold red").append(sentence, style="default not bold")
    complaints().print(line, soft_wrap=True)


def note(sentence: str) -> None:
    """Something worth knowing that is not an error, on standard error."""
    complaints().print(Text(sentence, style="dim"), soft_wrap=True)


def local_time(moment: datetime, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A moment as a clock on the reader's wall shows it. JSON has it in UTC."""
    return moment.astimezone().strftime(form)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_PIPE
    return console
