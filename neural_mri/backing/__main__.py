"""`python -m neural_mri.backing`: bring the database's schema to the newest revision."""

import sys

import structlog

from neural_mri.backing import database, logs
from neural_mri.backing.settings import InvalidSettings, load_settings
from neural_mri.contract.problems import Problem

log = structlog.get_logger("neural_mri.backing")


def main() -> int:
    """Exit status: 0 once the schema is the newest or a later one, 1 when that could not be done now."""
    try:
        settings = load_settings()
    except InvalidSettings as error:
        sys.stderr.write(f"neural-mri: {error}\n")
        return 2
    logs.configure(settings, process="migrations")
    try:
        later = database.migrate(settings)
    except Problem as problem:
        log.error("schema_not_migrated", reason=problem.detail)  # noqa: TRY400 (the reason is the whole)
        return 1
    if later is not None:
        log.warning("schema_is_newer", revision=later)
        return 0
    log.info("schema_migrated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
