"""`python -m tests.cluster`: the tests that have a database or a store, on PostgreSQL and S3 instead.

A server of either is started for all of them and thrown away afterwards; each test has a database and a part of the
bucket of its own there. What follows goes to pytest; where it names no tests, `SUITES` are run. Those of
`tests/backing` are none of them: each runs on either database, or either store, in every run. The client and the
command line are tested without a service, or by the suites here.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from tests.servers import bucket, postgresql

__all__ = ("SUITES", "run")

SUITES = (
    "tests/api",
    "tests/deploy/test_probes.py",
    "tests/diagnostics",
    "tests/security",
    "tests/system",
    "tests/worker",
)
WITHOUT = "--ignore=tests/worker/scanner"
"""Models, and nothing that is kept."""


def run(arguments: Sequence[str]) -> int:
    """Exit status of pytest."""
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments = (*arguments, WITHOUT, *SUITES)
    with postgresql() as database, bucket() as store:
        servers = {"TEST_POSTGRESQL_URL": database, "TEST_STORE_ENDPOINT": store.endpoint}
        tests = [sys.executable, "-m", "pytest", *arguments]
        return subprocess.call(tests, env=os.environ | servers)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
