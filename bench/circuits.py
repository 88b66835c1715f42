"""DTI against the plain forward: the exact sweep of everything, and `fast` until its first and last picture."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.timing import Row, clock, median_seconds, plain_forward
from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan, Granularity
from neural_mri.contract.events import EffectsFrame
from neural_mri.contract.tokens import Span, Tokens
from worker.scanner.circuits import scan_circuits
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel

__all__ = ("rows",)

_ANSWER, _FOIL = 100, 200

_EXACT = CircuitScan(
    prompt="x",
    corrupt_prompt="y",
    method=CircuitMethod.ABLATION,
    ablation=Ablation.ZERO,
    edges=0,
)
_BLOCKS = CircuitScan(
    prompt="x",
    corrupt_prompt="y",
    method=CircuitMethod.ABLATION,
    granularity=Granularity.BLOCKS,
    edges=0,
)
_FAST = CircuitScan(prompt="x", corrupt_prompt="y")
_FAST_WITHOUT_EDGES = CircuitScan(prompt="x", corrupt_prompt="y", edges=0)

_EXPENSIVE = 5
"""An exact sweep takes as long as dozens of forwards: it runs in one of so many rounds."""


class _FirstPicture(Silent):
    """Stops a scan's clock when the first effects are told."""

    def __init__(self) -> None:
        self.at = 0.0

    def effects(self, _frame: EffectsFrame) -> None:
        """The first frame has the estimates of everything."""
        self.at = self.at or clock()


def rows(model: LoadedModel, *, rounds: int) -> Iterator[Row]:
    """Every head and MLP exactly, every layer's attention and MLP exactly, and the default scan."""
    for n_tokens, goal in ((10, 28.0), (50, 65.0)):
        timed = partial(_timed, model, n_tokens)
        exact = timed({"exact": _EXACT}, rounds=max(3, rounds // _EXPENSIVE))
        yield _row("DTI, every head and MLP exactly", n_tokens, "exact", exact, goal)
    short = _timed(
        model,
        10,
        {"blocks": _BLOCKS, "fast": _FAST, "without edges": _FAST_WITHOUT_EDGES},
        rounds=rounds,
    )
    yield _row("DTI, every attention layer and MLP exactly", 10, "blocks", short, 6.0)
    yield _row("DTI `fast`, until the estimates are told", 10, "first picture", short, 2.0)
    yield _row("DTI `fast`, 30 exactly", 10, "without edges", short, 5.5)
    yield _row("DTI `fast`, 30 exactly and 300 edges", 10, "fast", short, None)


def _row(what: str, n_tokens: int, name: str, seconds: dict[str, float], goal: float | None) -> Row:
    return Row(what, n_tokens, seconds[name], seconds["plain"], goal)


def _timed(
    model: LoadedModel, n_tokens: int, scans: dict[str, CircuitScan], *, rounds: int
) -> dict[str, float]:
    clean, corrupt = _prompts(model, n_tokens)
    to_first: list[float] = []

    def scan(asked: CircuitScan) -> object:
        listener, started = _FirstPicture(), clock()
        output = scan_circuits(
            model, asked, clean, corrupt, _ANSWER, _FOIL, listener, reference=None
        )
        if asked is _FAST:
            to_first.append(listener.at - started)
        return output

    candidates: dict[str, Callable[[], Any]] = {"plain": plain_forward(model, clean)}
    candidates |= {name: partial(scan, asked) for name, asked in scans.items()}
    warm_up = 1
    seconds = median_seconds(candidates, rounds=rounds, warm_up=warm_up)
    if to_first:
        timed = sorted(to_first[warm_up:])
        seconds["first picture"] = timed[len(timed) // 2]
    return seconds


def _prompts(model: LoadedModel, n_tokens: int) -> tuple[Tokens, Tokens]:
    """Two prompts that differ in their third token alone."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.architecture.d_vocab, (n_tokens,), generator=generator).tolist()
    others = [*ids[:2], ids[2] - 1, *ids[3:]]
    clean, corrupt = (
        Tokens(ids=tuple(some), texts=("x",) * n_tokens, spans=(Span(0, 0),) * n_tokens)
        for some in (ids, others)
    )
    return clean, corrupt
