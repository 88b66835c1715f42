"""FLAIR: how sure the model is, where its prediction appears, and whether more than habit supports it.

One plain forward leaves the residual stream at every place; the logit lens reads it there. Three channels
are kept apart, because they mean different things: uncertainty, which is the model's own; the lens's
divergence and depth, which say where an answer appears and are neutral; support, which is low where the
prediction is what the model would have made without recalling anything. All in absolute nats; what is
unusual is judged against the model's calibration, never against the rest of the prompt.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neural_mri.contract.anomalies import AnomalyScan, Lens, Sublayers
from neural_mri.contract.problems import Conflict, Unprocessable, UnsupportedModel
from neural_mri.contract.scans import ActivationScan, resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner import anomaly_tables as tables
from worker.scanner.activation_tables import predictions, predictions_table, tokens_table
from worker.scanner.anomaly_tables import Findings
from worker.scanner.calibration import Calibration
from worker.scanner.channels import (
    LensSet,
    Measured,
    channels,
    derived,
    measure,
    measure_each,
)
from worker.scanner.listening import Listener, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.prompts import ScanOutput, token_ids
from worker.scanner.residuals import ResidualReading, Residuals
from worker.scanner.shared_forward import (
    AskedOf,
    Company,
    Outcome,
    outcome_of,
    read_forward,
    settled,
)

__all__ = (
    "LARGEST_RESIDUALS_BYTES",
    "AnomalyRows",
    "scan_anomalies",
    "scan_anomalies_together",
)

LARGEST_RESIDUALS_BYTES = 2 << 30
"""Most that the residuals of one scan may take."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""How far the lens of the last residual may be from the model's logits, as a share of the largest."""

_compared: WeakSet[LoadedModel] = WeakSet()
"""Models whose lens was found to be theirs: afterwards a scan leaves the unembedding to the lens."""


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
    asked = AskedOf(tokens, listener, answer_id, foil_id)
    [outcome] = scan_anomalies_together(model, request, [asked], calibration=calibration)
    return settled(outcome)


@torch.inference_mode()
def scan_anomalies_together(
    model: LoadedModel,
    request: AnomalyScan,
    asked: Sequence[AskedOf],
    *,
    calibration: Calibration | None,
) -> list[Outcome]:
    """The same scan of several prompts of one length, as rows of one forward: what became of each.

    What each would give, to the last digits but one: matrices of other shapes are summed in another order.
    The forward goes on while anybody waits for it; afterwards each prompt is measured for itself, and may
    stop or be refused alone. Raises as `scan_anomalies` does where that concerns them all.
    """
    ids = torch.cat([token_ids(model, one.tokens) for one in asked])
    rows = AnomalyRows(model, request, asked, calibration, range(len(asked)), len(asked))
    read = read_forward(model, ids, [rows], Company([one.listener for one in asked]))
    return rows.outcomes(read.logits[0], read.seconds / len(asked))


class AnomalyRows:
    """The rows of a forward that one question is asked of."""

    def __init__(
        self,
        model: LoadedModel,
        request: AnomalyScan,
        asked: Sequence[AskedOf],
        calibration: Calibration | None,
        rows: Sequence[int],
        n_rows: int,
    ) -> None:
        """The prompts are these of the batch's `n_rows` rows.

        Raises the `Problem` of a request that asks for what the model, the prompt or the calibration does
        not have.
        """
        if n_rows > 1 and request.canonical:
            raise ValueError("a canonical scan has its forward to itself")
        self._model, self._request, self._asked = model, request, asked
        self._calibration = calibration
        self._lenses = _lenses(request, calibration)
        self._rows, self._n_tokens = rows, len(asked[0].tokens)
        self._target = resolve_positions((request.target_token_idx,), self._n_tokens)[0]
        places = (self._target,) if request.token_positions == "target" else request.token_positions
        self._positions = tuple(sorted({*resolve_positions(places, self._n_tokens), self._target}))
        self._measured_at = tuple(position for position in self._positions if position > 0)
        self._inner_at = _inner(request, self._measured_at, self._target)
        self._inside = [self._measured_at[index] for index in self._inner_at]
        _refuse_too_many(model, len(asked) * len(self._measured_at))
        self.logits_at: list[int] = []
        """The target, where the lens is not known to give the model's own prediction there."""
        if self._target == 0 or model not in _compared:
            self.logits_at = self._in_batch([self._target])
        # Who shares the forward hears of its layers there.
        self._reading = ResidualReading(
            model,
            _indices(self._in_batch(self._measured_at)),
            _indices(self._in_batch(self._inside)),
            Silent(),
        )

    def listening(self) -> AbstractContextManager[None]:
        """Read the model's next forward."""
        return self._reading.listening()

    def outcomes(self, logits: Float[Tensor, "place d_vocab"], seconds: float) -> list[Outcome]:
        """What became of each prompt; `seconds` of the forward were each one's.

        Prompts of which one position is measured are measured together.
        """
        asked = [self._tokens_asked(at, logits[at : at + 1]) for at in range(len(self._asked))]
        measured: Sequence[Measured | None] = [None] * len(asked)
        if len(asked) > 1 and self._measured_at == (self._target,):
            measured = self._measured_each(asked)
        return [
            outcome_of(partial(self._output, at, known, logits[at : at + 1], asked[at], seconds))
            for at, known in enumerate(measured)
        ]

    def _tokens_asked(
        self, at: int, logits: Float[Tensor, "target d_vocab"]
    ) -> tuple[int | None, ...]:
        """The answer, None where it is still to be seen, and the foil if there is one."""
        _, _, answer, foil = self._asked[at]
        if len(logits) and answer is None:
            answer = int(logits[0].argmax())
        return (answer,) if foil is None else (answer, foil)

    def _measured_each(self, asked: Sequence[tuple[int | None, ...]]) -> list[Measured]:
        company = Company([one.listener for one in self._asked])

        def after_chunk(done: int) -> None:
            company.progress("lens", done, len(asked))
            company.pause()

        return measure_each(
            self._model,
            self._reading.residuals,
            self._lenses,
            appearance=self._request.appearance,
            asked=asked,
            after_chunk=after_chunk,
        )

    def _measured(self, at: int, asked: tuple[int | None, ...]) -> Measured:
        """One prompt, position by position."""
        listener, target, measured_at = self._asked[at].listener, self._target, self._measured_at

        def after_chunk(done: int) -> None:
            listener.progress("lens", done, len(measured_at))
            listener.pause()

        return measure(
            self._model,
            self._residuals(at),
            self._lenses,
            _indices(self._inner_at),
            appearance=self._request.appearance,
            asked=asked,
            target=measured_at.index(target) if target > 0 else None,
            after_chunk=after_chunk,
        )

    def _in_batch(self, positions: Sequence[int]) -> list[int]:
        """Positions of each prompt, counted through the batch."""
        return [row * self._n_tokens + position for row in self._rows for position in positions]

    def _residuals(self, at: int) -> Residuals:
        """One prompt's."""
        outer, inner = self._reading.residuals
        width, inner_width = len(self._measured_at), len(self._inside)
        return Residuals(
            outer[:, at * width : (at + 1) * width],
            inner[:, at * inner_width : (at + 1) * inner_width],
        )

    def _output(
        self,
        at: int,
        known: Measured | None,
        logits: Float[Tensor, "target d_vocab"],
        asked: tuple[int | None, ...],
        seconds: float,
    ) -> ScanOutput:
        """One prompt's tables, of what is `known` of it or is measured now."""
        model, request, calibration = self._model, self._request, self._calibration
        tokens, target = self._asked[at].tokens, self._target
        measured = self._measured(at, asked) if known is None else known
        if len(logits) and target > 0:
            _refuse_unlike(logits, measured.logits)
            _compared.add(model)
        found = channels(
            measured, kl_weight=request.kl_weight, entropy_weight=request.entropy_weight
        )
        ordinary = None if calibration is None else calibration.ordinary.get(request.lens)
        findings = Findings(
            model=model,
            request=request,
            calibration=calibration,
            positions=self._positions,
            inner_positions=tuple(self._inside),
            target=target,
            asked=measured.asked,
            measured=measured,
            channels=found | (derived(found, ordinary) if ordinary else {}),
            known=ordinary or {},
        )
        first = self._rows[at] * self._n_tokens
        sinks = self._reading.sinks(slice(first, first + self._n_tokens))
        made = {
            "tokens": tokens_table(tokens, sinks),
            "predictions": predictions_table(
                model,
                predictions(ActivationScan(prompt="-"), measured.logits if target > 0 else logits),
                (target,),
            ),
        }
        return ScanOutput(made | tables.all_tables(findings), seconds)


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
