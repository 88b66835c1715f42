"""fMRI and attention against the plain forward, and what the bridge's own forward costs."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.timing import Row, median_seconds, plain_forward, prompt
from neural_mri.contract.scans import ActivationScan, AttentionScan
from neural_mri.contract.tokens import Tokens
from worker.scanner.activations import scan_activations
from worker.scanner.attention import scan_attention
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel

__all__ = ("rows",)

_GOALS = {10: 1.10, 64: None}
"""Tokens -> highest ratio of a whole fMRI scan; the bar is set for a short prompt, the hardest case."""


def rows(model: LoadedModel, *, rounds: int) -> Iterator[Row]:
    """Scans of everything, tables and frames included, for a short and a longer prompt."""
    fmri = ActivationScan(prompt="x")
    attention = AttentionScan(prompt="x", layers=tuple(range(model.architecture.n_layers)))
    for n_tokens, goal in _GOALS.items():
        tokens = prompt(model, n_tokens)
        seconds = median_seconds(
            {
                "plain": plain_forward(model, tokens),
                "fmri": partial(scan_activations, model, fmri, tokens, Silent()),
                "attention": partial(scan_attention, model, attention, tokens, Silent()),
                "bridge": partial(_bridge_forward, model, tokens),
            },
            rounds=rounds,
        )
        plain = seconds["plain"]
        yield Row("plain forward", n_tokens, plain, plain)
        yield Row("fMRI", n_tokens, seconds["fmri"], plain, goal)
        yield Row("attention, all layers", n_tokens, seconds["attention"], plain)
        yield Row("bridge's forward", n_tokens, seconds["bridge"], plain)


@torch.inference_mode()
def _bridge_forward(model: LoadedModel, tokens: Tokens) -> object:
    return model.bridge(torch.tensor([tokens.ids], device=model.device))
