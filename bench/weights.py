"""T2: every weight of a model folder, read once and for all."""

from collections.abc import Iterator
from pathlib import Path

from bench.timing import Row, median_seconds, plain_forward, prompt
from neural_mri.contract.weights import WeightScan
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.weights import scan_weights

__all__ = ("rows",)

_TOKENS = 10
_MOST_ROUNDS = 5


def rows(folder: Path, model: LoadedModel, *, rounds: int) -> Iterator[Row]:
    """All of it, tables and circuits included; the folder is the model's."""
    seconds = median_seconds(
        {
            "plain": plain_forward(model, prompt(model, _TOKENS)),
            "T2": lambda: scan_weights(folder, WeightScan(), Silent()),
        },
        rounds=min(rounds, _MOST_ROUNDS),
        warm_up=1,
    )
    yield Row("T2, once a model", _TOKENS, seconds["T2"], seconds["plain"], 8.0)
