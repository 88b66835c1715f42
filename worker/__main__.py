"""`python -m worker`: hold the pinned and wanted models, then take tickets until SIGTERM."""

import gc
import os
import sys

import structlog

from neural_mri.backing import logs, tracing
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings
from neural_mri.contract.problems import Problem

log = structlog.get_logger("worker")


def main() -> int:
    """Exit status: 0 after SIGTERM, 1 when it could not start."""
    try:
        settings = load_settings()
        tracing.check(settings)
    except InvalidSettings as error:
        sys.stderr.write(f"neural-mri: {error}\n")
        return 1
    logs.configure(settings, process="worker")
    _choose_gpu(settings)
    os.environ.setdefault("NUMBA_CACHE_DIR", str(settings.data_dir / "compiled"))
    # Millions of objects come with torch and stay. To look for garbage among them is a fifth of the start,
    # so nobody looks until the models are loaded.
    gc.disable()
    from worker import process

    try:
        with tracing.exported(settings, process="worker"):
            return process.run(settings)
    except Problem as problem:
        log.critical("worker_not_started", reason=problem.detail)
        return 1


def _choose_gpu(settings: Settings) -> None:
    """`cuda:1` means that this process sees no other GPU. Torch looks when it is first used."""
    device, _, number = settings.device.partition(":")
    if device == "cuda" and number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number


if __name__ == "__main__":
    sys.exit(main())
