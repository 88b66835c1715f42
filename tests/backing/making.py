"""Jobs to test with."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neural_mri.backing.jobs import LeaseOwner, Submission
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.tokens import Span, Tokens
from tests.servers import emptied

__all__ = ("ELSEWHERE", "QUEUE", "on_postgresql", "on_sqlite", "submission", "tokens", "unused")

on_sqlite = pytest.mark.parametrize("server", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("server", ["postgresql"], indirect=True)
"""Tests of one database's own ways; the others run on both."""

QUEUE = "scan.0123456789abcdef"
ELSEWHERE = LeaseOwner("another-host", 4242, 99)
"""A process of which nothing can be proved here."""


def tokens(count: int) -> Tokens:
    return Tokens(
        ids=tuple(range(count)),
        texts=tuple(f"t{index}" for index in range(count)),
        spans=tuple(Span(2 * index, 2 * index + 2) for index in range(count)),
    )


def submission(**changes: Any) -> Submission:
    fields = {
        "owner": "ada",
        "kind": JobKind.SCAN,
        "model": "tiny",
        "revision": "0123456789abcdef" * 4,
        "queue": QUEUE,
        "request": b'{"scan_mode":"fMRI","prompt":"Hello","model":"tiny"}',
        "tokens": tokens(8),
    }
    return Submission(**{**fields, **changes})


def unused(template: Settings, folder: Path) -> Settings:
    """A migrated database without a row: SQLite's copied, PostgreSQL's emptied."""
    folder.mkdir(parents=True, exist_ok=True)
    own = msgspec.structs.replace(template, data_dir=folder)
    if template.database_url:
        return emptied(own)
    shutil.copy(template.folder / "neural-mri.db", folder)
    return own
