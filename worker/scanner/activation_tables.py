"""An fMRI scan's numbers as Arrow tables."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.results import build, component_columns, positions_column
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.tokens import Tokens
from worker.scanner.calibration import Calibration
from worker.scanner.layer_summaries import Neurons, Vectors
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import largest, unit
from worker.scanner.prompts import finished

__all__ = (
    "CACHED_BYTES",
    "Predictions",
    "activations_table",
    "columns_of",
    "neurons_table",
    "percentile_table",
    "predictions",
    "predictions_table",
    "tokens_table",
    "vectors_table",
)

_METHOD = (
    "one plain forward; of each vector that is written to the residual stream (head: z W_O[head]; where "
    "a norm follows the sublayer, after that norm, frozen), and of the residual stream itself"
)
CACHED_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Logits that are summed together: what stays in a cache, or keeps a GPU busy."""


def _column(values: Tensor, dtype: torch.dtype) -> pa.Array:
    return pa.array(values.reshape(-1).to("cpu", dtype).numpy())


@lru_cache(maxsize=8)
def columns_of(components: tuple[Component, ...]) -> dict[str, pa.Array]:
    """The columns of a selection that is asked for again and again."""
    return component_columns(components)


def _repeated(values: Sequence[int], *, each: int, times: int) -> Tensor:
    """`values`, each of them `each` times in a row, all of it `times` over."""
    return torch.tensor(values).repeat_interleave(each).repeat(times)


@lru_cache(maxsize=8)
def _ranks(positions: tuple[int, ...], n_ranks: int, *, times: int = 1) -> dict[str, pa.Array]:
    """The columns of a ranking at each position, `times` over."""
    n_rankings = len(positions) * times
    return {
        "position": _column(_repeated(positions, each=n_ranks, times=times), torch.int32),
        "rank": _column(_repeated(range(n_ranks), each=1, times=n_rankings), torch.int16),
    }


@lru_cache(maxsize=8)
def _mlps(layers: tuple[int, ...], *, each: int) -> dict[str, pa.Array]:
    """The columns that name MLPs, each `each` times in a row."""
    names = pa.array([str(Component(Kind.MLP, layer)) for layer in layers], pa.string())
    which = _column(_repeated(range(len(layers)), each=each, times=1), torch.int32)
    return {
        "component": names.take(which),
        "layer": _column(_repeated(layers, each=each, times=1), torch.int16),
    }


def tokens_table(tokens: Tokens, sinks: Bool[Tensor, " pos"]) -> pa.Table:
    """The prompt."""
    columns = {
        "position": pa.array(range(len(tokens)), pa.int32()),
        "token_id": pa.array(tokens.ids, pa.int32()),
        "text": pa.array(tokens.texts, pa.string()),
        "start": pa.array([span.start for span in tokens.spans], pa.int32()),
        "end": pa.array([span.end for span in tokens.spans], pa.int32()),
        "sink": pa.array(sinks.tolist(), pa.bool_()),
    }
    return finished(
        build("tokens", columns),
        "tokens",
        unit="tokens",
        method="sink: position 0, or a block's output longer than 10 x the median over the tokens "
        "after the first",
    )


def activations_table(
    request: ActivationScan,
    components: Sequence[Component],
    values: Float[Tensor, "component pos"],
    positions: tuple[int, ...],
) -> pa.Table:
    """A row a component, a value a reported token."""
    value = positions_column(_column(values, torch.float32), len(positions))
    return finished(
        build("activations", columns_of(tuple(components)), value),
        "activations",
        unit=unit(request.aggregation),
        method=f"{unit(request.aggregation)}: {_METHOD}",
        positions=positions,
        aggregation=request.aggregation,
    )


def percentile_table(
    calibration: Calibration,
    components: Sequence[Component],
    shares: Float[Tensor, "component pos"],
    positions: tuple[int, ...],
    sinks: Bool[Tensor, " all_pos"],
) -> pa.Table:
    """A row a component, a value a reported token: where the norm stands among ordinary ones.

    `shares` are the calibration's, of every position; a sink's norm says nothing.
    """
    told = torch.where(sinks[list(positions)], torch.nan, shares)
    value = positions_column(_column(told, torch.float32), len(positions))
    return finished(
        build("percentile", columns_of(tuple(components)), value),
        "percentile",
        unit="share of ordinary positions",
        method="rank of the L2 norm among the component's own at positions 1 and later of reference text, "
        "to the hundredth",
        positions=positions,
        calibration=calibration.source,
        calibration_seed=calibration.seed,
        calibration_tokens=calibration.n_tokens,
    )


def vectors_table(vectors: Vectors, positions: tuple[int, ...]) -> pa.Table:
    """A row a component and reported token, d_model values."""
    components, values = vectors
    by_row = [component for component in components for _ in positions]
    columns = component_columns(by_row)
    columns["position"] = _column(_repeated(positions, each=1, times=len(components)), torch.int32)
    value = positions_column(_column(values, torch.float32), values.shape[-1])
    return finished(
        build("vectors", columns, value),
        "vectors",
        unit="residual stream coordinate",
        method=_METHOD,
    )


def neurons_table(neurons: Neurons, positions: tuple[int, ...]) -> pa.Table:
    """The strongest neurons of each MLP and reported position, strongest first."""
    layers, indices, values = neurons
    columns = {
        **_mlps(layers, each=indices.shape[1] * indices.shape[2]),
        **_ranks(positions, indices.shape[2], times=len(layers)),
        "neuron": _column(indices, torch.int32),
        "value": _column(values, torch.float32),
    }
    return finished(
        build("neurons", columns),
        "neurons",
        unit="hidden activation",
        method="the input of W_out (where the MLP is gated: activation x up), by absolute value",
    )


class Predictions(NamedTuple):
    """The likeliest next tokens after some positions, likeliest first. On the CPU."""

    token_ids: Int[Tensor, "pos rank"]
    logits: Float[Tensor, "pos rank"]
    log_probabilities: Float[Tensor, "pos rank"]
    probabilities: Float[Tensor, "pos rank"]

    def of(self, own: slice) -> "Predictions":
        """Those after some of the positions."""
        return Predictions(*(each[own] for each in self))


def predictions(request: ActivationScan, logits: Float[Tensor, "pos d_vocab"]) -> Predictions:
    """What is likeliest at every position, whosesoever that is: a few operations, and one wait for a device."""
    top = largest(logits, min(request.top_predictions, logits.shape[-1]))
    rows_at_once = max(1, CACHED_BYTES[logits.device.type] // (4 * logits.shape[-1]))
    # The fused softmax goes over a row once less than `logsumexp`. Into one place: what glibc before 2.38
    # frees of aligned memory it does not give out again for as much, and all rows would lie there at once.
    softmax = logits.new_empty(
        min(rows_at_once, len(logits)), logits.shape[-1], dtype=torch.float32
    )
    likeliest = torch.empty_like(top.values, dtype=torch.float32)
    for rows, ids, found in zip(
        torch.split(logits, rows_at_once),
        torch.split(top.indices, rows_at_once),
        torch.split(likeliest, rows_at_once),
        strict=True,
    ):
        everything = softmax[: len(rows)]
        torch.log_softmax(rows, -1, torch.float32, out=everything)
        torch.gather(everything, -1, ids, out=found)
    log_probabilities = likeliest.cpu()
    return Predictions(
        top.indices.cpu(), top.values.float().cpu(), log_probabilities, log_probabilities.exp()
    )


def predictions_table(
    model: LoadedModel, found: Predictions, positions: tuple[int, ...]
) -> pa.Table:
    """The likeliest next tokens after each reported position, likeliest first."""
    texts = [model.text(token) for token in found.token_ids.flatten().tolist()]
    columns = {
        **_ranks(positions, found.token_ids.shape[1]),
        "token_id": _column(found.token_ids, torch.int32),
        "text": pa.array(texts, pa.string()),
        "logit": _column(found.logits, torch.float32),
        "log_probability": _column(found.log_probabilities, torch.float32),
        "probability": _column(found.probabilities, torch.float32),
    }
    return finished(
        build("predictions", columns),
        "predictions",
        unit="probability",
        method="softmax of the model's logits, in float32",
    )
