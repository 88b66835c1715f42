"""Commands of `neural-mri`, run in this process."""

from typing import Any, NamedTuple

import msgspec
import pytest

from neural_mri.cli.app import run

__all__ = ("Said", "Shell")


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)

    @property
    def lines(self) -> list[Any]:
        """A document a line."""
        return [msgspec.json.decode(line) for line in self.out.splitlines()]


class Shell:
    """Runs commands in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str) -> Said:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("COLUMNS", raising=False)  # where tests run is no terminal
            code = run(arguments)
        captured = self._capture.readouterr()
        return Said(code, captured.out, captured.err)
