"""A canonical scan is the same to the last bit whatever company is kept; others agree to the last digits."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bench.cluster.figures import Figure, plain
from bench.cluster.kinds import KINDS, SharedScan, scanned
from bench.timing import prompt
from neural_mri.contract.results import to_ipc
from worker.scanner.loading import LoadedModel

__all__ = ("figures",)

COMPANIES = 100
N_TOKENS = 9
QUANTITIES = frozenset(
    {
        *("value", "log_probability", "entropy", "gain", "kl", "metric_after", "probability_after"),
        *("effect", "estimate", "direct", "clean", "probability_clean"),
    }
)
"""Columns of measured numbers. Ranks and flags follow from them, by steps."""
STEPS = frozenset({"answer_rank", "agrees", "anomalous"})


class _Compared(NamedTuple):
    n_identical: int
    worst: float
    """Largest difference of rows that shared a forward, as a share of the column's largest value."""


def _compared(model: LoadedModel, request: SharedScan, n_companies: int) -> _Compared:
    """One scan before, between and after passes of others, and as a row of them."""
    canonical = msgspec.structs.replace(request, canonical=True)
    own = prompt(model, N_TOKENS, seed=1)
    [alone] = scanned(model, canonical, [own])
    chance = random.Random(1)  # noqa: S311 (loads are no secrets)
    n_identical, worst = 0, 0.0
    for number in range(n_companies):
        others = [
            prompt(model, N_TOKENS, seed=1000 * number + row) for row in range(chance.randint(1, 3))
        ]
        rows = [*others, own]
        chance.shuffle(rows)
        mine = scanned(model, request, rows)[rows.index(own)]
        worst = max(worst, *_differences(alone.tables, mine.tables))
        [again] = scanned(model, canonical, [own])
        n_identical += _are_equal(alone.tables, again.tables)
    return _Compared(n_identical, worst)


def _differences(one: dict[str, pa.Table], other: dict[str, pa.Table]) -> Iterator[float]:
    for name, table in one.items():
        for column in QUANTITIES & {*table.column_names}:
            found, expected = (_numbers(each, column) for each in (other[name], table))
            difference = np.nan_to_num(np.abs(found - expected))
            yield float(difference.max() / max(1e-6, float(np.nanmax(np.abs(expected)))))


def _numbers(table: pa.Table, column: str) -> np.ndarray:
    if "quantity" in table.column_names:
        is_step = pc.is_in(table["quantity"], value_set=pa.array(sorted(STEPS)))
        table = table.filter(pc.invert(is_step))
    values = table[column].combine_chunks()
    flat = values.flatten() if pa.types.is_fixed_size_list(values.type) else values
    return np.asarray(flat.to_numpy(zero_copy_only=False))


def _are_equal(one: dict[str, pa.Table], other: dict[str, pa.Table]) -> bool:
    """NaN equals NaN: both say that nothing was measured there."""
    return one.keys() == other.keys() and all(
        to_ipc(one[name]) == to_ipc(other[name]) for name in one
    )


def figures(model: LoadedModel, *, n_companies: int = COMPANIES) -> list[Figure]:
    """Of each kind that shares a forward, among companies drawn by chance."""
    found: list[Figure] = []
    for name, kind in KINDS.items():
        compared = _compared(model, kind.request, n_companies)
        met = "met" if compared.n_identical == n_companies else "missed"
        found += [
            Figure(
                f"{name}: a `canonical` scan among passes of others, of {n_companies} the same to the "
                "last bit",
                str(compared.n_identical),
                f"{n_companies}: {met}",
            ),
            plain(
                f"{name}: a row of a shared forward beside the scan alone, largest difference of any "
                "value",
                f"{compared.worst:.1g} of the largest",
            ),
        ]
    return found
