"""Stores of either kind, looked into behind their backs."""

import errno
import os
from pathlib import Path
from typing import Any

import obstore
import pytest

from neural_mri.backing.s3 import S3Store
from neural_mri.backing.storage import FolderStore, Store

__all__ = ("clear", "fail_disk", "files", "overwrite", "paths")


def files(root: Path) -> set[str]:
    """Every file under a folder."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def paths(store: Store) -> list[str]:
    """Everything that a store holds."""
    if isinstance(store, FolderStore):
        return sorted(files(store._root))
    assert isinstance(store, S3Store)
    return sorted(entry["path"] for entry in obstore.list(store._store).collect())


def clear(store: Store, prefix: str = "") -> None:
    """Forget everything that a store holds, or what of it begins so; of a folder's store the folders as well."""
    if isinstance(store, FolderStore):
        for path in sorted((store._root / prefix).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        return
    for name in paths(store):
        if name.startswith(prefix):
            store.delete(name)


def fail_disk(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Have the disk refuse a step of every write, by its name in `os`; what is only read stays readable."""
    real = getattr(os, step)

    def fail(*arguments: Any, **options: Any) -> Any:
        if step == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **options)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, step, fail)


def overwrite(store: Store, path: str, body: bytes) -> None:
    """Damage what stands there."""
    if isinstance(store, FolderStore):
        (store._root / path).write_bytes(body)
    else:
        store.put(path, body)
