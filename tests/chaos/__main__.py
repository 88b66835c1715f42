"""Breaks the service at random under load, and says what was lost.

python -m tests.chaos [--jobs 10000] [--faults 1000] [--database sqlite] [--store folder]
                      [--hosts 1] [--only 'wire|clock'] [--seed N]
"""

import argparse
import sys
import time

from tests.chaos.premises import may_network
from tests.chaos.storm import Storm, weather

__all__ = ()


def main() -> int:
    """Exit status: 0 where nothing was lost, doubled or left lying about."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=1_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--store", choices=("folder", "s3"), default="folder")
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1)
    parser.add_argument("--only", default="", help="a pattern of the faults' names")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--quiet-seconds", type=float, default=180.0)
    parser.add_argument("--minutes", type=float, default=600.0, help="ask no more after so long")
    asked = parser.parse_args()
    if asked.hosts == 2 and not may_network():
        print("left out: this process may make no network namespaces, so there is one host")  # noqa: T201
        return 0
    storm = Storm(
        jobs=asked.jobs,
        faults=asked.faults,
        database=asked.database,
        store=asked.store,
        hosts=asked.hosts,
        workers=asked.workers,
        only=asked.only,
        seed=asked.seed,
        quiet_seconds=asked.quiet_seconds,
        minutes=asked.minutes,
    )
    print(f"seed {asked.seed}: {storm}", flush=True)  # noqa: T201
    report = weather(storm, tell=lambda line: print(line, flush=True))  # noqa: T201
    print(report)  # noqa: T201
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
