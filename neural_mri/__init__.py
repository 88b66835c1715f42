"""Neural MRI: images of the inside of an open-weight language model.

The library every process and every user stands on. `contract` says what things are, `backing` keeps
them, `client` and `cli` are the ways in. It knows nothing of torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ("Client", "__version__")


def __getattr__(name: str) -> Any:
    # `neural_mri.Client` is for people; the processes import this package too, and need no HTTP client.
    # The stub beside this file tells type checkers about it.
    if name == "Client":
        return importlib.import_module("neural_mri.client").Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
