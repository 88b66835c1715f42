"""The clock of a host, which can be set while its processes run."""

import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

__all__ = ("Clock", "may_step")

SOURCE = Path(__file__).with_suffix(".c")
STEP = struct.Struct("q")


def may_step() -> bool:
    """Whether this machine can make such clocks: it takes a C compiler."""
    return sys.platform == "linux" and shutil.which("cc") is not None


class Clock:
    """Whoever is started in its `environment` goes by it, and so do all children."""

    def __init__(self, folder: Path) -> None:
        """The folder must be one that all of them may read."""
        folder.mkdir()
        folder.chmod(0o755)
        library, self._step = folder / "clock.so", folder / "step"
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        self.set(0.0)
        self._step.chmod(0o644)
        self.environment: Mapping[str, str] = MappingProxyType(
            {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self._step)}
        )

    def set(self, ahead_seconds: float) -> None:
        """Be so far ahead of the right time from now on."""
        # In place: who has mapped the file sees the same one.
        with self._step.open("r+b" if self._step.exists() else "wb") as file:
            file.write(STEP.pack(int(ahead_seconds * 1e9)))
