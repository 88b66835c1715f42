"""Perturbation, patching and causal tracing against the plain forward."""

from collections.abc import Callable, Iterator

from bench.timing import Row, median_seconds, plain_forward, prompt
from neural_mri.contract.perturbations import (
    PatchingScan,
    PerturbationScan,
    TracingScan,
    ZeroAblation,
)
from neural_mri.contract.tokens import Tokens
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.patching import scan_patching
from worker.scanner.perturbation import scan_perturbation
from worker.scanner.tracing import scan_tracing

__all__ = ("perturbing", "rows")

_TOKENS = 10
_MOST_ROUNDS_OF_A_GRID = 2


def perturbing(
    model: LoadedModel, tokens: Tokens, layer: int, *, perturbed_scan: bool
) -> Callable[[], object]:
    """One head ablated: the clean and the perturbed run as two rows, and their comparison."""
    request = PerturbationScan(
        prompt="x",
        perturbations=(ZeroAblation(component=f"blocks.{layer}.attn.head_0"),),
        perturbed_scan=perturbed_scan,
    )
    return lambda: scan_perturbation(model, request, tokens, Silent(), sources={})


def rows(model: LoadedModel, *, rounds: int) -> Iterator[Row]:
    """A perturbation halfway up, at either end, and the two grids."""
    tokens, n_layers = prompt(model, _TOKENS), model.architecture.n_layers
    middle = n_layers // 2
    plain = plain_forward(model, tokens)
    seconds = median_seconds(
        {
            "plain": plain,
            "two": plain_forward(model, tokens, n_rows=2),
            "compared": perturbing(model, tokens, middle, perturbed_scan=False),
            "scanned": perturbing(model, tokens, middle, perturbed_scan=True),
            "first": perturbing(model, tokens, 0, perturbed_scan=False),
            "last": perturbing(model, tokens, n_layers - 1, perturbed_scan=False),
        },
        rounds=rounds,
    )
    f = seconds["plain"]
    yield Row("plain forward of two rows", _TOKENS, seconds["two"], f)
    what = "perturb and compare"
    yield Row(f"{what}, layer {middle}", _TOKENS, seconds["compared"], f, 1.3)
    yield Row(f"{what}, layer {middle}, both runs scanned", _TOKENS, seconds["scanned"], f, 1.3)
    yield Row(f"{what}, layer 0", _TOKENS, seconds["first"], f)
    yield Row(f"{what}, layer {n_layers - 1}", _TOKENS, seconds["last"], f)
    yield from _grids(model, tokens, rounds=min(rounds, _MOST_ROUNDS_OF_A_GRID))


def _grids(model: LoadedModel, tokens: Tokens, *, rounds: int) -> Iterator[Row]:
    other = prompt(model, _TOKENS, seed=1)
    patching = PatchingScan(prompt="x", corrupt_prompt="y")
    # The subject stands first, so that every later position hears of it: the dearest case.
    tracing = TracingScan(prompt="01".ljust(_TOKENS, "x"), subject="01", draws=1)
    seconds = median_seconds(
        {
            "plain": plain_forward(model, tokens),
            "patching": lambda: scan_patching(model, patching, tokens, other, Silent()),
            "tracing": lambda: scan_tracing(model, tracing, tokens, Silent()),
        },
        rounds=rounds,
        warm_up=1,
    )
    n_runs = model.architecture.n_layers * _TOKENS * 3
    # Run one by one, each would be a forward.
    yield Row(
        f"patching, {n_runs} runs", _TOKENS, seconds["patching"], seconds["plain"], n_runs / 2
    )
    yield Row(f"tracing, {n_runs} runs", _TOKENS, seconds["tracing"], seconds["plain"], n_runs / 2)
