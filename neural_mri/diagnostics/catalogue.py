"""The suites that come with the package, and others by their path."""

from importlib import resources
from pathlib import Path

from neural_mri.contract.problems import InvalidRequest
from neural_mri.contract.suites import Suite, decode_suite

__all__ = ("load_suite", "suite_names")

_SUFFIX = ".toml"


def suite_names() -> tuple[str, ...]:
    """Names of the suites at hand."""
    folder = resources.files("neural_mri.diagnostics") / "suites"
    found = (entry.name for entry in folder.iterdir() if entry.name.endswith(_SUFFIX))
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found))


def load_suite(name: str) -> Suite:
    """A suite by its name, or by the path of its file. Raises `InvalidRequest`."""
    if name in suite_names():
        file = resources.files("neural_mri.diagnostics") / "suites" / f"{name}{_SUFFIX}"
        return decode_suite(file.read_bytes(), name)
    path = Path(name)
    if path.suffix != _SUFFIX:
        raise InvalidRequest(
            f"there is no suite {name!r}: expected one of {', '.join(suite_names())}, or the path of a "
            ".toml file",
            suite=name,
        )
    try:
        return decode_suite(path.read_bytes(), name)
    except OSError as error:
        raise InvalidRequest(
            f"suite {name} cannot be read: {error.strerror}", suite=name
        ) from error
