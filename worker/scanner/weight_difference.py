"""How a tensor differs from the same tensor of another checkpoint."""

from typing import NamedTuple

import numpy as np

from worker.scanner.weight_files import StoredTensor
from worker.scanner.weight_statistics import Checkpoint, Sums, Workspace, blocks

__all__ = ("Change", "LineChanges", "compare")


class LineChanges(NamedTuple):
    """Of every row, or of every column: sums over this checkpoint a, and the baseline b."""

    differences: Sums
    """Of (a - b)^2."""
    products: Sums
    """Of a b."""
    squares: Sums
    """Of a^2."""
    baseline_squares: Sums
    """Of b^2."""
    peaks: Sums
    """Largest |a - b|."""


class Change(NamedTuple):
    """How one tensor changed. NaN where either checkpoint has values that are not finite."""

    rows: LineChanges
    columns: LineChanges | None

    def lines(self, axis: int) -> LineChanges:
        """Of the rows (0) or the columns (1). Raises `ValueError` for columns that were not kept."""
        if not axis:
            return self.rows
        if self.columns is None:
            raise ValueError("columns were not asked for")
        return self.columns


def compare(
    tensor: StoredTensor,
    baseline: StoredTensor,
    workspace: Workspace,
    checkpoint: Checkpoint,
    *,
    columns: bool,
) -> Change:
    """Sums over a tensor's lines, and over its columns too where `columns` says so."""
    rows = _empty(tensor.n_rows)
    of_columns = _empty(tensor.n_columns) if columns else None
    for block in blocks(tensor):
        checkpoint()
        size = (block.stop - block.start) * tensor.n_columns
        here = _exact(tensor, block, size, workspace, "here")
        there = _exact(baseline, block, size, workspace, "there")
        scratch = workspace.double("scratch", size).reshape(here.shape)
        with np.errstate(invalid="ignore"):
            for name, factor, other in (
                ("products", here, there),
                ("squares", here, here),
                ("baseline_squares", there, there),
            ):
                np.multiply(factor, other, out=scratch)
                _add(name, scratch, rows, of_columns, block)
            np.subtract(here, there, out=scratch)
            np.multiply(scratch, scratch, out=scratch)
            _add("differences", scratch, rows, of_columns, block)
            rows.peaks[block] = np.sqrt(scratch.max(1))
            if of_columns is not None:
                np.maximum(of_columns.peaks, np.sqrt(scratch.max(0)), out=of_columns.peaks)
    return Change(rows, of_columns)


def _empty(n_lines: int) -> LineChanges:
    return LineChanges(*(np.zeros(n_lines) for _ in LineChanges._fields))


def _add(
    name: str, terms: Sums, rows: LineChanges, columns: LineChanges | None, block: slice
) -> None:
    getattr(rows, name)[block] = terms.sum(1)
    if columns is not None:
        total: Sums = getattr(columns, name)
        total += terms.sum(0)


def _exact(tensor: StoredTensor, block: slice, size: int, workspace: Workspace, name: str) -> Sums:
    values = tensor.read(block, workspace.single("block", size))
    exact = workspace.double(name, size).reshape(values.shape)
    np.copyto(exact, values)
    return exact
