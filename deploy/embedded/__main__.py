"""`python -m deploy.embedded`: everything on this machine, until Ctrl-C."""

import sys

from rich.console import Console

from deploy.embedded import premises
from deploy.embedded.launcher import Launcher
from deploy.embedded.premises import Refusal
from neural_mri.backing import access
from neural_mri.backing.settings import InvalidSettings, load_settings
from neural_mri.contract.problems import Problem


def main() -> int:
    """Exit status: 0 after a signal, 1 when it could not start."""
    try:
        settings = load_settings()
        access.check_bind(settings)
        premises.prepare_folder(settings.folder)
        premises.check_space(settings.folder, premises.SPACE_TO_RUN_BYTES)
        with premises.locked(settings.folder):
            premises.check_port(settings.host, settings.port)
            Launcher(settings, Console(highlight=False)).run()
    except (InvalidSettings, Refusal, Problem) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"neural-mri: {error}", markup=False
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
