"""fMRI: what each component writes to the residual stream at each token, in one plain forward.

Hooks of our own on the plain model's modules (`layer_reading`) have each layer summarised on its device as
the model runs, and keep numbers instead of tensors (`layer_summaries`). Attention is causal, so a token's
column is what a run of the prompt up to that token would give: stepping through tokens needs no second
forward.
"""

import time

import torch

from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scans import ActivationScan, Aggregation, resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner import activation_tables as tables
from worker.scanner.calibration import Calibration
from worker.scanner.frames import send_frames
from worker.scanner.layer_reading import Reading
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import unit
from worker.scanner.prompts import ScanOutput, token_ids

__all__ = ("LARGEST_VECTORS_BYTES", "scan_activations")

LARGEST_VECTORS_BYTES = 1 << 30
"""Most that the vectors of one `raw` scan may take."""


@torch.inference_mode()
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
    ids = token_ids(model, tokens)
    components = request.selected(model.architecture)
    positions = resolve_positions(request.token_positions, len(tokens))
    if request.aggregation is Aggregation.RAW:
        _refuse_too_many_vectors(len(components) * len(positions), model.architecture.d_model)
    reading = Reading(model, request, components, positions, listener)
    started = time.perf_counter()
    with reading.listening():
        logits = model.plain(
            input_ids=ids, use_cache=False, logits_to_keep=reading.logits_to_keep
        ).logits[0]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    forward_seconds = time.perf_counter() - started
    found = reading.summaries
    values, neurons = found.values(), found.neurons()
    send_frames(
        listener,
        components,
        values,
        positions=positions,
        tokens=tokens,
        unit=unit(request.aggregation),
    )
    sinks = found.sinks()
    made = {
        "tokens": tables.tokens_table(tokens, sinks),
        "activations": tables.activations_table(request, components, values, positions),
        "predictions": tables.predictions_table(model, request, logits, positions),
    }
    if calibration is not None and request.aggregation is Aggregation.L2_NORM:
        made["percentile"] = tables.percentile_table(
            calibration, components, values, positions, sinks
        )
    if neurons is not None:
        made["neurons"] = tables.neurons_table(neurons, positions)
    for name, vectors in found.vectors.items():
        made[f"vectors.{name}"] = tables.vectors_table(vectors, positions)
    return ScanOutput(made, forward_seconds)


def _refuse_too_many_vectors(n_vectors: int, d_model: int) -> None:
    n_bytes = 4 * n_vectors * d_model
    if n_bytes > LARGEST_VECTORS_BYTES:
        raise Unprocessable(
            f"aggregation raw would take {n_bytes} bytes here, of at most {LARGEST_VECTORS_BYTES}: ask "
            "for fewer layers or token_positions"
        )
