"""fMRI, and the bridge's forward, against the plain one."""

from collections.abc import Iterator

import torch

from bench.timing import Row, median_seconds
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.tokens import Span, Tokens
from worker.scanner.activations import scan_activations
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel

__all__ = ("rows",)

_GOALS = {10: 1.10, 64: None}
"""Tokens -> highest ratio of a whole fMRI scan; the bar is set for a short prompt, the hardest case."""


def rows(model: LoadedModel, *, rounds: int) -> Iterator[Row]:
    """A scan of everything, tables and frames included, for a short and a longer prompt."""
    asked = ActivationScan(prompt="x")
    generator = torch.Generator().manual_seed(0)
    for n_tokens, goal in _GOALS.items():
        ids = torch.randint(5, model.architecture.d_vocab, (1, n_tokens), generator=generator)
        tokens = Tokens(
            ids=tuple(ids[0].tolist()),
            texts=("x",) * n_tokens,
            spans=(Span(0, 0),) * n_tokens,
        )

        @torch.inference_mode()
        def plain(ids: torch.Tensor = ids) -> object:
            return model.plain(input_ids=ids, use_cache=False).logits

        @torch.inference_mode()
        def bridge(ids: torch.Tensor = ids) -> object:
            return model.bridge(ids)

        def scan(tokens: Tokens = tokens) -> object:
            return scan_activations(model, asked, tokens, Silent())

        seconds = median_seconds({"plain": plain, "scan": scan, "bridge": bridge}, rounds=rounds)
        yield Row("plain forward", n_tokens, seconds["plain"], seconds["plain"])
        yield Row("fMRI scan", n_tokens, seconds["scan"], seconds["plain"], goal)
        yield Row("bridge forward", n_tokens, seconds["bridge"], seconds["plain"])
