"""The model that a package carries, as everything here measures it."""

from pathlib import Path

from worker.scanner import conversion

__all__ = ("MODEL", "folder")

MODEL = "smollm2-135m-instruct"


def folder() -> Path:
    """Its folder, converted once for tests and measurements."""
    found = Path(__file__).parents[1] / ".cache" / "models" / MODEL
    if conversion.origin(found) is None:
        conversion.convert_gguf(conversion.bundled_smollm2(), found)
    return found
