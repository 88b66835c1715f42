"""From final residuals of many rows to what is asked of each row's prediction.

Some of the rows are runs whose logits are known. They must arrive at them: where they do not, the rows
were not computed as the model computes, and none of them is to be believed.
"""

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worker.scanner.blocks import ACTIVATION_BYTES
from worker.scanner.halving import portion
from worker.scanner.loading import LoadedModel

__all__ = ("Known", "Measure", "measured", "predictions_at_once")


class Measure(Protocol):
    """What is asked of predictions: a `Metric`, or a probability."""

    def __call__(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
        """A number for each, from its logits."""


_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far a row may be from the run that it repeats, as a share of the largest logit: kernels differ in
the last digits between a whole prompt and its end."""


class Known(NamedTuple):
    """What the first rows must come to."""

    logits: Float[Tensor, "run d_vocab"]
    """Of runs of the model itself."""
    runs: Int[Tensor, " known"]
    """The run that each of the first rows repeats."""


def measured(
    model: LoadedModel, final: Float[Tensor, "row d_model"], known: Known, measure: Measure
) -> Float[Tensor, " row"] | None:
    """The measure of every row; None where a row is not the run that it repeats."""
    values: list[Tensor] = []
    step = predictions_at_once(model)
    for at in range(0, len(final), step):
        logits = _logits(model, final[at : at + step])
        runs = known.runs[at : at + step]
        if len(runs) and not _are(logits[: len(runs)], known.logits[runs]):
            return None
        values.append(measure(logits))
    return torch.cat(values)


def predictions_at_once(model: LoadedModel) -> int:
    """Rows of logits that are measured together."""
    together = portion(8 * ACTIVATION_BYTES[model.device.type])
    return max(1, together // (4 * model.architecture.d_vocab))


def _logits(
    model: LoadedModel, final: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_vocab"]:
    modules, cap = model.modules, model.architecture.final_softcap
    logits: Tensor = modules.unembed(modules.final_norm(final))
    if model.logit_scale != 1.0:
        logits = logits * model.logit_scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _are(logits: Float[Tensor, "row d_vocab"], expected: Float[Tensor, "row d_vocab"]) -> bool:
    worst = (logits.float() - expected.float()).abs().amax(-1)
    scale = expected.float().abs().amax(-1).clamp(min=1.0)
    return bool((worst <= _TOLERANCE[expected.dtype] * scale).all())
