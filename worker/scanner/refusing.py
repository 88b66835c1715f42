"""What a library says of a model that it cannot read becomes ours to say."""

from collections.abc import Iterator
from contextlib import contextmanager

from neural_mri.contract.problems import UnsupportedModel
from worker.scanner.halving import has_lost_device, ran_out

__all__ = ("refused",)


@contextmanager
def refused(says: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raises `UnsupportedModel`, which `says` so and why, where what is inside raises one of these kinds.

    Not where memory has run out or the device is lost: the model is none the worse for that.
    """
    try:
        yield
    except kinds as error:
        if ran_out(error) or has_lost_device(error):
            raise
        raise UnsupportedModel(f"{says}: {error}") from error
