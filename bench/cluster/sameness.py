"""A canonical scan is the same to the last bit whatever company is kept; others agree to the last digits."""

import random
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bench.cluster.figures import Figure, plain
from bench.timing import prompt
from neural_mri.contract.scans import ActivationScan
from worker.scanner.activations import scan_activations, scan_activations_together
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel

__all__ = ("figures",)

COMPANIES = 100
N_TOKENS = 9


class _Compared(NamedTuple):
    n_identical: int
    worst: float
    """Largest difference of rows that shared a forward, as a share of the largest value."""


def _values(table: pa.Table) -> np.ndarray:
    return np.asarray(table.column("value").combine_chunks().flatten().to_numpy())


def _compared(model: LoadedModel, n_companies: int) -> _Compared:
    """One scan before, between and after passes of others, and as a row of them."""
    canonical = ActivationScan(prompt="-", canonical=True)
    shared = ActivationScan(prompt="-")
    own = prompt(model, N_TOKENS, seed=1)
    alone = scan_activations(model, canonical, own, Silent()).tables
    values = _values(alone["activations"])
    chance = random.Random(1)  # noqa: S311 (loads are no secrets)
    n_identical, worst = 0, 0.0
    for number in range(n_companies):
        others = [
            prompt(model, N_TOKENS, seed=1000 * number + row) for row in range(chance.randint(1, 3))
        ]
        rows = [*others, own]
        chance.shuffle(rows)
        together = scan_activations_together(model, shared, rows, [Silent()] * len(rows))
        mine = _values(together[rows.index(own)].tables["activations"])
        worst = max(worst, float(np.abs(mine - values).max() / np.abs(values).max()))
        again = scan_activations(model, canonical, own, Silent()).tables
        n_identical += _are_equal(alone, again)
    return _Compared(n_identical, worst)


def _are_equal(one: dict[str, pa.Table], other: dict[str, pa.Table]) -> bool:
    return one.keys() == other.keys() and all(one[name].equals(other[name]) for name in one)


def figures(model: LoadedModel, *, n_companies: int = COMPANIES) -> list[Figure]:
    """A hundred companies, drawn by chance."""
    found = _compared(model, n_companies)
    met = "met" if found.n_identical == n_companies else "missed"
    return [
        Figure(
            f"a `canonical` scan among passes of others, of {n_companies} the same to the last bit",
            str(found.n_identical),
            f"{n_companies}: {met}",
        ),
        plain(
            "a row of a shared forward beside the scan alone, largest difference of any value",
            f"{found.worst:.1g} of the largest",
        ),
    ]
