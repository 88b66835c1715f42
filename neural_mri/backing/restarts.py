"""How soon what has ended is started again: at once, and then ever more patiently."""

__all__ = ("FAILURES_BEFORE_GIVING_UP", "HEALTHY_SECONDS", "pause_before_restart")

HEALTHY_SECONDS = 30.0
"""A process that ran for so long has not failed at starting."""
LONGEST_PAUSE_SECONDS = 30.0
FAILURES_BEFORE_GIVING_UP = 3
"""Ends in a row while starting: one restart more would not help."""


def pause_before_restart(failures: int) -> float:
    """Seconds to wait after that many failures in a row: 0, 0.5, 1, 2, ... 30."""
    return 0.0 if failures <= 1 else min(0.5 * 2.0 ** (failures - 2), LONGEST_PAUSE_SECONDS)
