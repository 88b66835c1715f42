"""Which GPUs this process sees. To be settled before torch first looks for any."""

import os

from neural_mri.backing.settings import InvalidSettings, Settings

__all__ = ("choose_gpu",)

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose_gpu(settings: Settings) -> None:
    """`cuda:1` means that this process sees no other GPU than the second of those that it was given.

    A scheduler that gives it some names them in `CUDA_VISIBLE_DEVICES`. Raises `InvalidSettings` where they are fewer,
    or that is no number.
    """
    device, _, number = settings.device.partition(":")
    if device != "cuda" or not number:
        return
    if not number.isdecimal():
        raise InvalidSettings(
            f"NEURAL_MRI_DEVICE is {settings.device!r}: expected cuda:N, N a number"
        )
    given = os.environ.get(_VISIBLE)
    if given is None:
        os.environ[_VISIBLE] = number
        return
    gpus = [gpu for gpu in map(str.strip, given.split(",")) if gpu]
    if "-1" in gpus:  # what stands behind it is not seen
        gpus = gpus[: gpus.index("-1")]
    if int(number) >= len(gpus):
        raise InvalidSettings(
            f"NEURAL_MRI_DEVICE={settings.device}, counted from 0, and {_VISIBLE}={given} gives this process "
            f"{len(gpus) or 'none'}: expected a lower number, or `cuda` for all of them"
        )
    os.environ[_VISIBLE] = gpus[int(number)]
