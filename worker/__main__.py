"""`python -m worker`: hold the pinned and wanted models, then take tickets until SIGTERM."""

import os
import sys

import structlog

from neural_mri.backing import logs, tracing
from neural_mri.backing.settings import InvalidSettings, load_settings
from neural_mri.contract.problems import Problem
from worker import children
from worker.visible import choose_gpu

log = structlog.get_logger("worker")


def main() -> int:
    """Exit status: 0 after SIGTERM, 1 when it could not start.

    Everything up to the fork is done once and is every later worker's: imports, and nothing that is open.
    """
    try:
        settings = load_settings()
        tracing.check(settings)
        choose_gpu(settings)
    except InvalidSettings as error:
        sys.stderr.write(f"neural-mri: {error}\n")
        return 1
    logs.configure(settings, process="worker")
    os.environ.setdefault("NUMBA_CACHE_DIR", str(settings.data_dir / "compiled"))
    # Nobody looks for garbage again until the models are loaded.
    children.ready_to_import()
    from worker import forking, process

    forking.import_the_rest(settings)

    def work(life: forking.Life) -> int:
        try:
            with tracing.exported(settings, process="worker"):
                return process.run(settings, life)
        except Problem as problem:
            log.critical("worker_not_started", reason=problem.detail)
            return 1

    if reason := forking.why_not():
        log.info("worker_not_forked", reason=reason)
        return work(forking.Life())
    return forking.kept_alive(work)


if __name__ == "__main__":
    sys.exit(main())
