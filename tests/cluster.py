"""`python -m tests.cluster [FILES AND OPTIONS OF PYTEST]`: tests on PostgreSQL and S3 instead of SQLite and a folder.

Starts a server of either, for all processes of the tests, and throws them away afterwards.
"""

import os
import subprocess
import sys

from tests.servers import bucket, postgresql


def main() -> int:
    """Exit status of pytest."""
    with postgresql() as database, bucket() as store:
        servers = {"TEST_POSTGRESQL_URL": database, "TEST_STORE_ENDPOINT": store.endpoint}
        return subprocess.call(
            [sys.executable, "-m", "pytest", *sys.argv[1:]], env=os.environ | servers
        )


if __name__ == "__main__":
    sys.exit(main())
