"""What patching and causal tracing measure, as Arrow tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.components import Component
from neural_mri.contract.results import build, component_columns, positions_column
from neural_mri.contract.tokens import Tokens
from worker.scanner.activation_tables import tokens_table
from worker.scanner.layer_summaries import sinks
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import norm
from worker.scanner.metrics import Metric, log_probability
from worker.scanner.prompts import finished
from worker.scanner.runs import Run

__all__ = ("Spread", "contrast_table", "map_table", "read_tokens_table")


class Spread(NamedTuple):
    """Mean and sample standard deviation over draws; a single draw has no spread."""

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, draws: Float[Tensor, "draw *rest"]) -> Self:
        """Over the first axis."""
        sd = draws.std(0) if len(draws) > 1 else torch.full_like(draws[0], torch.nan)
        return cls(draws.mean(0), sd)


def _floats(values: Tensor) -> pa.Array:
    """A float32 column."""
    return pa.array(values.reshape(-1).float().cpu().numpy(), pa.float32())


def contrast_table(
    model: LoadedModel, metric: Metric, logits: Float[Tensor, "run d_vocab"], position: int
) -> pa.Table:
    """The metric and the answer's probability in the clean run, which is the first, and the others."""
    values = metric(logits)
    probabilities = log_probability(logits, metric.answer_id).exp()
    corrupted, probability = Spread.of(values[1:]), Spread.of(probabilities[1:])
    foil = metric.foil_id
    columns = {
        "position": pa.array([position], pa.int32()),
        "answer_id": pa.array([metric.answer_id], pa.int32()),
        "answer": pa.array([model.text(metric.answer_id)], pa.string()),
        "foil_id": pa.array([-1 if foil is None else foil], pa.int32()),
        "foil": pa.array(["" if foil is None else model.text(foil)], pa.string()),
        "clean": _floats(values[0]),
        "corrupted": _floats(corrupted.mean),
        "corrupted_sd": _floats(corrupted.sd),
        "probability_clean": _floats(probabilities[0]),
        "probability_corrupted": _floats(probability.mean),
        "probability_corrupted_sd": _floats(probability.sd),
    }
    return finished(
        build("contrast", columns),
        "contrast",
        unit=metric.unit,
        method=f"{metric.formula}, of the next token after the position",
        draws=len(logits) - 1,
    )


def map_table(
    schema: str,
    components: Sequence[Component],
    values: Float[Tensor, "component pos"],
    *,
    unit: str,
    method: str,
    quantity: Sequence[str] | None = None,
    **parameters: Any,
) -> pa.Table:
    """A row a component, a value a position, from the first position on."""
    columns = component_columns(components)
    if quantity is not None:
        columns["quantity"] = pa.array(quantity, pa.string())
    n_positions = values.shape[1]
    return finished(
        build(schema, columns, positions_column(_floats(values), n_positions)),
        schema,
        unit=unit,
        method=method,
        positions=tuple(range(n_positions)),
        **parameters,
    )


def read_tokens_table(tokens: Tokens, runs: Run, row: int) -> pa.Table:
    """A prompt's tokens, its sinks told from its run. Tokens after those that were read are none."""
    leaving = torch.stack([residual[row] for residual in (*runs.resid_pre[1:], runs.final)])
    read = sinks(norm(leaving).cpu())
    unread = torch.zeros(len(tokens) - len(read), dtype=torch.bool)
    return tokens_table(tokens, torch.cat([read, unread]))
