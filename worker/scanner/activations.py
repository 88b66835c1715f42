"""fMRI: what each component writes to the residual stream at each token, in one plain forward.

Hooks of our own on the plain model's modules (`layer_reading`) have each layer summarised on its device as
the model runs, and keep numbers instead of tensors (`layer_summaries`). Attention is causal, so a token's
column is what a run of the prompt up to that token would give: stepping through tokens needs no second
forward.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scans import ActivationScan, Aggregation, resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner import activation_tables as tables
from worker.scanner.calibration import Calibration
from worker.scanner.frames import send_frames
from worker.scanner.layer_reading import Reading
from worker.scanner.layer_summaries import Neurons
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import unit
from worker.scanner.prompts import ScanOutput, token_ids
from worker.scanner.shared_forward import Company, RowsOf, read_forward

__all__ = (
    "LARGEST_VECTORS_BYTES",
    "ActivationRows",
    "scan_activations",
    "scan_activations_together",
)

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
    asked = ActivationRows(
        model, request, prompts, listeners, calibration, range(len(prompts)), len(prompts)
    )
    read = read_forward(model, ids, [asked], Company(listeners))
    return asked.outcomes(read.logits[0], read.seconds / len(prompts))


class ActivationRows:
    """The rows of a forward that one question is asked of."""

    def __init__(
        self,
        model: LoadedModel,
        request: ActivationScan,
        prompts: Sequence[Tokens],
        listeners: Sequence[Listener],
        calibration: Calibration | None,
        rows: Sequence[int],
        n_rows: int,
    ) -> None:
        """The prompts, a listener each, are these of the batch's `n_rows` rows.

        Raises the `Problem` of a request that asks for what the model or the prompt does not have.
        """
        self._model, self._request, self._calibration = model, request, calibration
        self._prompts, self._listeners = prompts, listeners
        n_tokens = len(prompts[0])
        self._components = request.selected(model.architecture)
        self._positions = resolve_positions(request.token_positions, n_tokens)
        if request.aggregation is Aggregation.RAW:
            _refuse_too_many_vectors(
                len(self._components) * len(self._positions), model.architecture.d_model
            )
        if n_rows > 1 and request.shared_forward is None:
            raise ValueError("prompts share a forward only where all positions are reported")
        self.logits_at = [row * n_tokens + at for row in rows for at in self._positions]
        """Every reported position."""
        self._reading = Reading(
            model,
            request,
            self._components,
            self._positions * len(prompts),
            *listeners,
            rows=RowsOf(rows, n_rows),
        )

    def listening(self) -> AbstractContextManager[None]:
        """Read the model's next forward."""
        return self._reading.listening()

    def outcomes(self, logits: Float[Tensor, "place d_vocab"], seconds: float) -> list[ScanOutput]:
        """Each prompt's tables, once its frames are told; `seconds` of the forward were each one's."""
        request, found = self._request, self._reading.summaries
        values, neurons = found.values(), found.neurons()
        shares = None
        if self._calibration is not None and request.aggregation is Aggregation.L2_NORM:
            shares = self._calibration.percentile(values, self._components)
        predictions = tables.predictions(request, logits)
        sinks_of_each = found.sinks(each=len(self._prompts))
        n_positions = len(self._positions)
        made_of_each = []
        for at, (tokens, listener) in enumerate(zip(self._prompts, self._listeners, strict=True)):
            own = slice(at * n_positions, (at + 1) * n_positions)
            send_frames(
                listener,
                self._components,
                values[:, own],
                positions=self._positions,
                tokens=tokens,
                unit=unit(request.aggregation),
            )
            sinks = sinks_of_each[at]
            made = self._tables(tokens, values[:, own], sinks, predictions.of(own))
            if self._calibration is not None and shares is not None:
                made["percentile"] = tables.percentile_table(
                    self._calibration, self._components, shares[:, own], self._positions, sinks
                )
            if neurons is not None:
                mine = Neurons(neurons.layers, neurons.indices[:, own], neurons.values[:, own])
                made["neurons"] = tables.neurons_table(mine, self._positions)
            for name, vectors in found.vectors.items():
                made[f"vectors.{name}"] = tables.vectors_table(vectors, self._positions)
            made_of_each.append(ScanOutput(made, seconds))
        return made_of_each

    def _tables(
        self,
        tokens: Tokens,
        values: Float[Tensor, "component pos"],
        sinks: Bool[Tensor, " all_pos"],
        predictions: tables.Predictions,
    ) -> dict[str, pa.Table]:
        request, components, positions = self._request, self._components, self._positions
        return {
            "tokens": tables.tokens_table(tokens, sinks),
            "activations": tables.activations_table(request, components, values, positions),
            "predictions": tables.predictions_table(self._model, predictions, positions),
        }


def _refuse_too_many_vectors(n_vectors: int, d_model: int) -> None:
    n_bytes = 4 * n_vectors * d_model
    if n_bytes > LARGEST_VECTORS_BYTES:
        raise Unprocessable(
            f"aggregation raw would take {n_bytes} bytes here, of at most {LARGEST_VECTORS_BYTES}: ask "
            "for fewer layers or token_positions"
        )
