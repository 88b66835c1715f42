"""How cost grows: with the prompt's length, with the components asked about, with the rows of a batch."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch

from bench.stimulation import perturbing
from bench.timing import median_seconds, plain_forward, prompt
from neural_mri.contract.anomalies import AnomalyScan, Lens
from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan
from neural_mri.contract.components import Component
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.tokens import Tokens
from worker.scanner.activations import scan_activations
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.circuits import scan_circuits
from worker.scanner.interventions import Edit, Rows, forward
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel

__all__ = ("Growth", "growths")

_LENGTHS = (8, 32, 128, 512)
_COMPONENTS = (0, 10, 30, 100, 300)
_ROWS = (1, 4, 16, 64)
_MOST_ROUNDS = 3


class Growth(NamedTuple):
    """A table: seconds of some candidates at each size."""

    title: str
    size: str
    """What the first column counts."""
    candidates: tuple[str, ...]
    seconds: Mapping[int, Mapping[str, float]]
    """By size; `plain` among them: one plain forward of the prompt."""


def growths(model: LoadedModel, *, rounds: int) -> Iterator[Growth]:
    """The three tables."""
    few = min(rounds, _MOST_ROUNDS)
    yield _over_tokens(model, rounds=few)
    yield _over_components(model, rounds=few)
    yield _over_rows(model, rounds=few)


def _circuit(model: LoadedModel, tokens: Tokens, exact: int) -> Callable[[], object]:
    request = CircuitScan(
        prompt="x", method=CircuitMethod.FAST, ablation=Ablation.ZERO, exact=exact, edges=0
    )
    return lambda: scan_circuits(model, request, tokens, None, None, None, Silent(), None)


def _over_tokens(model: LoadedModel, *, rounds: int) -> Growth:
    fmri = ActivationScan(prompt="x")
    flair = AnomalyScan(prompt="x", lens=Lens.RAW, token_positions="target")
    middle = model.architecture.n_layers // 2
    found = {}
    for n_tokens in _LENGTHS:
        tokens = prompt(model, n_tokens)
        found[n_tokens] = median_seconds(
            {
                "plain": plain_forward(model, tokens),
                "fMRI": partial(scan_activations, model, fmri, tokens, Silent()),
                "FLAIR, answer": partial(
                    scan_anomalies, model, flair, tokens, Silent(), calibration=None
                ),
                "perturb": perturbing(model, tokens, middle, perturbed_scan=False),
                "DTI fast": _circuit(model, tokens, 30),
            },
            rounds=rounds if n_tokens < _LENGTHS[-1] else 1,
            warm_up=1 if n_tokens < _LENGTHS[-1] else 0,
        )
    candidates = ("fMRI", "FLAIR, answer", "perturb", "DTI fast")
    return Growth("With the prompt's length", "tokens", candidates, found)


def _over_components(model: LoadedModel, *, rounds: int) -> Growth:
    tokens = prompt(model, 10)
    found = {
        count: median_seconds(
            {"plain": plain_forward(model, tokens), "DTI": _circuit(model, tokens, count)},
            rounds=rounds,
            warm_up=1,
        )
        for count in _COMPONENTS
    }
    return Growth("With the components measured exactly", "components", ("DTI",), found)


def _over_rows(model: LoadedModel, *, rounds: int) -> Growth:
    tokens = prompt(model, 10)
    ids = torch.tensor([tokens.ids], device=model.device)
    component = Component.head(model.architecture.n_layers // 2, 0)

    def perturbed(copies: int) -> Callable[[], object]:
        edits = [
            Edit(row, component, tuple(range(len(tokens))), scale=row / copies)
            for row in range(1, copies + 1)
        ]
        return torch.inference_mode()(lambda: forward(model, Rows(ids, copies), edits))

    found = {
        copies: median_seconds(
            {"plain": plain_forward(model, tokens), "perturbed rows": perturbed(copies)},
            rounds=rounds,
            warm_up=1,
        )
        for copies in _ROWS
    }
    return Growth("With the rows of a batch", "rows", ("perturbed rows",), found)
