"""Causal tracing (Meng et al. 2022): where a fact about a subject is recalled.

The subject's embeddings are drowned in noise, so that the model no longer knows what it is asked about. Then
clean values are put back, one place and position at a time: where that brings the answer back, the fact
passes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.perturbations import TraceKind, TracingScan
from neural_mri.contract.scans import resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner.circuit_questions import Question
from worker.scanner.final_residuals import Measure
from worker.scanner.listening import Listener, Timed
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric, log_probability
from worker.scanner.patched_runs import PatchedRun, Runs, changes
from worker.scanner.patching_tables import Spread, contrast_table, map_table, read_tokens_table
from worker.scanner.prompts import ScanOutput, read_until, token_ids
from worker.scanner.runs import embedded, record

__all__ = ("scan_tracing",)

_CLEAN = 0
"""The run that nothing is done to; those of the draws follow."""


@torch.inference_mode()
def scan_tracing(
    model: LoadedModel,
    request: TracingScan,
    tokens: Tokens,
    listener: Listener,
    *,
    answer_id: int | None = None,
    foil_id: int | None = None,
) -> ScanOutput:
    """The tables `trace`, `contrast` and `tokens`.

    The prompt is read up to the position whose next token is asked about: what follows is not seen.

    Args:
        model: The model.
        request: What is asked.
        tokens: The prompt.
        listener: Hears how far the scan is, and may stop it.
        answer_id: The next token asked about; the clean run's likeliest where None.
        foil_id: The token it is compared with.

    Raises:
        Problem: The request asks for what the model or the prompt does not have.
        Cancelled: The listener stopped it. The model is as it was, hooks and all.
    """
    shape = model.architecture
    request.check(shape)
    position = resolve_positions((request.target_token_idx,), len(tokens))[0]
    subject = request.subject_positions(tokens)
    ids = token_ids(model, tokens)[:, : read_until(model, position, len(tokens))]
    question = Question.of(model, answer_id, foil_id)

    def on_layer(layer: int) -> None:
        listener.progress("forward", layer + 1, shape.n_layers)
        listener.checkpoint()

    timed = Timed(listener)
    noise_sd = request.sigma * _entries_sd(model, ids)
    recorded = record(
        model,
        ids.expand(1 + request.draws, -1),
        embeddings=_noised(model, request, ids, subject, noise_sd),
        on_layer=on_layer,
    )
    metric = question.metric(recorded.logits[_CLEAN])
    asked = _asked(metric)
    places = tuple(_places(request, shape.n_layers))
    patches = [
        PatchedRun(base, place.restored, at, place.layers)
        for base in range(1, 1 + request.draws)
        for place in places
        for at in range(position + 1)
    ]
    found = changes(model, Runs(recorded, _CLEAN), patches, asked.measure, timed, stage="tracing")
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    forward_seconds = timed.own_seconds

    effect = Spread.of(found.values.view(request.draws, len(places), position + 1))
    made = {
        "trace": map_table(
            "trace",
            [place.shown for place in places] * 2,
            torch.cat([effect.mean, effect.sd]),
            quantity=["indirect_effect"] * len(places) + ["sd"] * len(places),
            unit=asked.unit,
            method=f"{asked.formula}: clean value restored, minus corrupted; mean over draws",
            position=position,
            subject=subject,
            sigma=request.sigma,
            noise_sd=noise_sd,
            draws=request.draws,
            seed=request.seed,
            window=request.window,
            runs=found.method,
        ),
        "contrast": contrast_table(model, metric, recorded.logits, position),
        "tokens": read_tokens_table(tokens, recorded, _CLEAN),
    }
    return ScanOutput(made, forward_seconds)


def _entries_sd(model: LoadedModel, ids: Int[Tensor, "1 pos"]) -> float:
    """Standard deviation of the embedding matrix's entries, in the size in which the model reads them.

    Gemma's embedding multiplies what it looks up: by how much shows in the tokens at hand.
    """
    weight = model.modules.embed.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"the embedding of {type(model.plain).__name__} has no matrix")
    largest = torch.linalg.vector_norm(weight, dtype=torch.float32).square() / weight.numel()
    sd = (largest - weight.mean(dtype=torch.float32).square()).sqrt()
    read, looked_up = embedded(model, ids).float().norm(), weight[ids].float().norm()
    return float(sd * read / looked_up)


def _noised(
    model: LoadedModel,
    request: TracingScan,
    ids: Int[Tensor, "1 pos"],
    subject: tuple[int, ...],
    noise_sd: float,
) -> Float[Tensor, "run pos d_model"]:
    """Token embeddings: the prompt's own, then a row a draw with noise on the subject's."""
    embeddings = embedded(model, ids).repeat(1 + request.draws, 1, 1)
    for draw in range(request.draws):
        # A draw is the same however many there are.
        generator = torch.Generator().manual_seed(request.seed * 1_000_003 + draw)
        noise = noise_sd * torch.randn(len(subject), embeddings.shape[-1], generator=generator)
        embeddings[1 + draw, list(subject)] += noise.to(embeddings)
    return embeddings


class _Asked(NamedTuple):
    """What effects are counted in."""

    measure: Measure
    unit: str
    formula: str


def _asked(metric: Metric) -> _Asked:
    """The answer's probability, as Meng et al. have it; with a foil, the logit difference."""
    if metric.foil_id is not None:
        return _Asked(metric, metric.unit, metric.formula)

    def probability(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
        return log_probability(logits, metric.answer_id).exp()

    return _Asked(probability, "probability", "probability of the answer")


class _Place(NamedTuple):
    """A row of the map."""

    shown: Component
    restored: Component
    """The first of the layers that are restored."""
    layers: int


_KINDS = {
    TraceKind.ATTENTION: Kind.ATTN,
    TraceKind.MLP: Kind.MLP,
    TraceKind.STATE: Kind.RESID_POST,
}
"""In the order in which a block comes to them."""


def _places(request: TracingScan, n_layers: int) -> Iterator[_Place]:
    for layer in range(n_layers):
        for name, kind in _KINDS.items():
            if name in request.kinds:
                shown = Component(kind, layer)
                layers = request.layers(layer, n_layers)
                if name is TraceKind.STATE:
                    layers = range(layer, layer + 1)
                yield _Place(shown, Component(kind, layers.start), len(layers))
