"""fMRI: what each component writes to the residual stream at each token, in one plain forward.

Hooks of our own on the plain model's modules (`layer_reading`) have each layer summarised on its device as
the model runs, and keep numbers instead of tensors (`layer_summaries`). Attention is causal, so a token's
column is what a run of the prompt up to that token would give: stepping through tokens needs no second
forward.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.components import Component
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scans import ActivationScan, Aggregation, resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner import activation_tables as tables
from worker.scanner.calibration import Calibration
from worker.scanner.frames import send_frames
from worker.scanner.layer_reading import Reading
from worker.scanner.layer_summaries import Neurons, Summaries
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import unit
from worker.scanner.prompts import ScanOutput, token_ids

__all__ = ("LARGEST_VECTORS_BYTES", "scan_activations", "scan_activations_together")

LARGEST_VECTORS_BYTES = 1 << 30
"""Most that the vectors of one `raw` scan may take."""


def scan_activations(
    model: LoadedModel,
    request: ActivationScan,
    tokens: Tokens,
    listener: Listener,
    *,
    calibration: Calibration | None = None,
) -> ScanOutput:
    """The tables `tokens`, `activations`, `neurons`, `predictions`, and for `raw` `vectors.L`.

    With a calibration and `l2_norm`, which is what that was measured by, `percentile` too.

    Says how far it has come after each layer, and sends every token's frame once all layers are known.

    Raises:
        Problem: The request asks for what the model or the prompt does not have.
        Cancelled: The listener stopped it. The model is as it was, hooks and all.
    """
    return scan_activations_together(model, request, [tokens], [listener], calibration=calibration)[
        0
    ]


@torch.inference_mode()
def scan_activations_together(
    model: LoadedModel,
    request: ActivationScan,
    prompts: Sequence[Tokens],
    listeners: Sequence[Listener],
    *,
    calibration: Calibration | None = None,
) -> list[ScanOutput]:
    """The same scan of several prompts of one length, as rows of one forward: what each would give.

    To the last digits but one, that is: matrices of other shapes are summed in another order. Several
    prompts share a forward only where every position is reported, and no vectors are. It goes on while any
    of the listeners wants it to. Raises as `scan_activations` does.
    """
    ids = torch.cat([token_ids(model, tokens) for tokens in prompts])
    components = request.selected(model.architecture)
    positions = resolve_positions(request.token_positions, ids.shape[1])
    if request.aggregation is Aggregation.RAW:
        _refuse_too_many_vectors(len(components) * len(positions), model.architecture.d_model)
    if len(prompts) > 1 and not request.can_share_a_forward:
        raise ValueError("prompts share a forward only where all positions are reported")
    reading = Reading(model, request, components, positions * len(prompts), *listeners)
    started = time.perf_counter()
    with reading.listening():
        logits = model.plain(
            input_ids=ids, use_cache=False, logits_to_keep=reading.logits_to_keep
        ).logits
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    read = _Read(reading.summaries, logits, time.perf_counter() - started)
    return [
        _output(model, request, components, positions, calibration, read, row, tokens, listener)
        for row, (tokens, listener) in enumerate(zip(prompts, listeners, strict=True))
    ]


class _Read(NamedTuple):
    """What one forward has shown of a batch of prompts."""

    found: Summaries
    logits: Float[Tensor, "prompt pos d_vocab"]
    seconds: float


def _output(
    model: LoadedModel,
    request: ActivationScan,
    components: tuple[Component, ...],
    positions: tuple[int, ...],
    calibration: Calibration | None,
    read: _Read,
    row: int,
    tokens: Tokens,
    listener: Listener,
) -> ScanOutput:
    """One prompt's tables, once its frames are told."""
    found, n_prompts = read.found, len(read.logits)
    own = slice(row * len(positions), (row + 1) * len(positions))
    values, neurons = found.values()[:, own], found.neurons()
    send_frames(
        listener,
        components,
        values,
        positions=positions,
        tokens=tokens,
        unit=unit(request.aggregation),
    )
    sinks = found.sinks(slice(row * len(tokens), (row + 1) * len(tokens)))
    made = {
        "tokens": tables.tokens_table(tokens, sinks),
        "activations": tables.activations_table(request, components, values, positions),
        "predictions": tables.predictions_table(model, request, read.logits[row], positions),
    }
    if calibration is not None and request.aggregation is Aggregation.L2_NORM:
        made["percentile"] = tables.percentile_table(
            calibration, components, values, positions, sinks
        )
    if neurons is not None:
        mine = Neurons(neurons.layers, neurons.indices[:, own], neurons.values[:, own])
        made["neurons"] = tables.neurons_table(mine, positions)
    for name, vectors in found.vectors.items():
        made[f"vectors.{name}"] = tables.vectors_table(vectors, positions)
    return ScanOutput(made, read.seconds / n_prompts)


def _refuse_too_many_vectors(n_vectors: int, d_model: int) -> None:
    n_bytes = 4 * n_vectors * d_model
    if n_bytes > LARGEST_VECTORS_BYTES:
        raise Unprocessable(
            f"aggregation raw would take {n_bytes} bytes here, of at most {LARGEST_VECTORS_BYTES}: ask "
            "for fewer layers or token_positions"
        )
