"""FLAIR: how sure the model is, where its prediction appears, and whether more than habit supports it.

One plain forward leaves the residual stream at every place; the logit lens reads it there. Three channels
are kept apart, because they mean different things: uncertainty, which is the model's own; the lens's
divergence and depth, which say where an answer appears and are neutral; support, which is low where the
prediction is what the model would have made without recalling anything. All in absolute nats; what is
unusual is judged against the model's calibration, never against the rest of the prompt.
"""

import time
from collections.abc import Sequence
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neural_mri.contract.anomalies import AnomalyScan, Lens, Sublayers
from neural_mri.contract.problems import Conflict, Unprocessable, UnsupportedModel
from neural_mri.contract.scans import ActivationScan, resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner import anomaly_tables as tables
from worker.scanner.activation_tables import predictions_table, tokens_table
from worker.scanner.anomaly_tables import Findings
from worker.scanner.calibration import Calibration
from worker.scanner.channels import LensSet, channels, derived, measure
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.prompts import ScanOutput, token_ids
from worker.scanner.residuals import ResidualReading

__all__ = ("LARGEST_RESIDUALS_BYTES", "scan_anomalies")

LARGEST_RESIDUALS_BYTES = 2 << 30
"""Most that the residuals of one scan may take."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""How far the lens of the last residual may be from the model's logits, as a share of the largest."""

_compared: WeakSet[LoadedModel] = WeakSet()
"""Models whose lens was found to be theirs: afterwards a scan leaves the unembedding to the lens."""


@torch.inference_mode()
def scan_anomalies(
    model: LoadedModel,
    request: AnomalyScan,
    tokens: Tokens,
    listener: Listener,
    *,
    calibration: Calibration | None,
    answer_id: int | None = None,
    foil_id: int | None = None,
) -> ScanOutput:
    """The tables `tokens`, `predictions`, `lens`, `lens_tokens`, `uncertainty`, `support`, `depth`, `nodes`.

    Without `appearance`, `lens` and `lens_tokens` have the last place alone, `depth` is not measured and
    there are no `nodes`.

    Tells each layer of the forward, then how many positions the lens has been held to.

    Args:
        model: The model.
        request: Which lens, where.
        tokens: The prompt.
        listener: Hears the stages `forward` and `lens`, and may stop the scan.
        calibration: What is ordinary, and the lenses' maps. Without one only the raw lens can be used,
            and whatever is judged against ordinary text is NaN.
        answer_id: The next token asked about; the model's likeliest where None.
        foil_id: A token to set beside it.

    Raises:
        Problem: The request asks for what the model, the prompt or the calibration does not have.
        Cancelled: The listener stopped it. The model is as it was.
    """
    lenses = _lenses(request, calibration)
    ids = token_ids(model, tokens)
    target = resolve_positions((request.target_token_idx,), len(tokens))[0]
    asked_for = (target,) if request.token_positions == "target" else request.token_positions
    positions = tuple(sorted({*resolve_positions(asked_for, len(tokens)), target}))
    measured_at = tuple(position for position in positions if position > 0)
    inner_at = _inner(request, measured_at, target)
    _refuse_too_many(model, len(measured_at))
    inside = [measured_at[index] for index in inner_at]
    reading = ResidualReading(model, _indices(measured_at), _indices(inside), listener)

    started = time.perf_counter()
    logits = None
    with reading.listening():
        if target == 0 or model not in _compared:
            logits = model.plain(
                input_ids=ids,
                use_cache=False,
                logits_to_keep=torch.tensor([target], device=model.device),
            ).logits[0]
        else:
            model.plain.base_model(input_ids=ids, use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    forward_seconds = time.perf_counter() - started

    answer = answer_id
    if logits is not None and answer is None:
        answer = int(logits[0].argmax())

    def after_chunk(done: int) -> None:
        listener.progress("lens", done, len(measured_at))
        listener.pause()

    measured = measure(
        model,
        reading.residuals,
        lenses,
        _indices(inner_at),
        appearance=request.appearance,
        asked=(answer,) if foil_id is None else (answer, foil_id),
        target=measured_at.index(target) if target > 0 else None,
        after_chunk=after_chunk,
    )
    if logits is not None and target > 0:
        _refuse_unlike(logits, measured.logits)
        _compared.add(model)
    found = channels(measured, kl_weight=request.kl_weight, entropy_weight=request.entropy_weight)
    known = None if calibration is None else calibration.ordinary.get(request.lens)
    findings = Findings(
        model=model,
        request=request,
        calibration=calibration,
        positions=positions,
        inner_positions=tuple(inside),
        target=target,
        asked=measured.asked,
        measured=measured,
        channels=found | (derived(found, known) if known else {}),
        known=known or {},
    )
    made = {
        "tokens": tokens_table(tokens, reading.sinks()),
        "predictions": predictions_table(
            model,
            ActivationScan(prompt=request.prompt),
            measured.logits if target > 0 or logits is None else logits,
            (target,),
        ),
    }
    return ScanOutput(made | tables.all_tables(findings), forward_seconds)


def _lenses(request: AnomalyScan, calibration: Calibration | None) -> LensSet:
    if calibration is not None:
        return calibration.lenses(request.lens)
    if request.lens is Lens.RAW:
        return LensSet(None, None, None)
    raise Conflict(
        f"lens {request.lens.value!r} needs a calibration of the model, and there is none: calibrate it, "
        "or use lens 'raw'"
    )


def _inner(request: AnomalyScan, measured_at: tuple[int, ...], target: int) -> list[int]:
    """Which of the measured positions are read inside the blocks too."""
    if not request.appearance:
        return []
    match request.sublayers:
        case Sublayers.NONE:
            return []
        case Sublayers.TARGET:
            return [index for index, position in enumerate(measured_at) if position == target]
        case Sublayers.ALL:
            return list(range(len(measured_at)))


def _indices(positions: Sequence[int]) -> Int[Tensor, " pos"]:
    """As integers even where there are none."""
    return torch.tensor(positions, dtype=torch.int64)


def _refuse_too_many(model: LoadedModel, n_positions: int) -> None:
    shape = model.architecture
    # Read, mapped by the lens, and gathered for it: three times what there is between and inside blocks.
    n_bytes = 4 * n_positions * 3 * 2 * shape.n_layers * shape.d_model
    if n_bytes > LARGEST_RESIDUALS_BYTES:
        raise Unprocessable(
            f"the residuals of {n_positions} positions take {n_bytes} bytes here, of at most "
            f"{LARGEST_RESIDUALS_BYTES}: ask for fewer token_positions"
        )


def _refuse_unlike(
    logits: Float[Tensor, "one d_vocab"], by_lens: Float[Tensor, "one d_vocab"]
) -> None:
    """The lens of the last residual must be the model's prediction, or none of it means anything."""
    expected, found = logits.float(), by_lens.float()
    off = (found - expected).abs().max()
    if not off <= _TOLERANCE[logits.dtype] * expected.abs().max().clamp_min(1):
        raise UnsupportedModel(
            f"the last residual through the lens is {float(off):.3g} off the model's logits: they are "
            "made of more than the final norm, the unembedding and a soft-cap"
        )
