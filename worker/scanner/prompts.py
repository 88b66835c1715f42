"""What goes into a scan of a prompt, and what comes out of it."""

from typing import NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Int
from torch import Tensor

from neural_mri.contract.problems import PromptTooLong, Unprocessable
from neural_mri.contract.results import SCHEMAS, Provenance, stamp
from neural_mri.contract.scan_keys import SCANNER_VERSION
from neural_mri.contract.tokens import Tokens
from worker.scanner.loading import LoadedModel

__all__ = ("ScanOutput", "finished", "token_ids")


class ScanOutput(NamedTuple):
    """A scan's tables by name, stamped with everything but whose model and which key they are of."""

    tables: dict[str, pa.Table]
    forward_seconds: float
    """Inside the model, what is read along the way included."""


def token_ids(model: LoadedModel, tokens: Tokens) -> Int[Tensor, "batch pos"]:
    """A batch of the one prompt, on the model's device.

    Raises `PromptTooLong` beyond the model's context and `Unprocessable` for an id that it does not have:
    on a GPU that would not be an error of one scan, but the end of the process.
    """
    shape = model.architecture
    if not 0 < len(tokens) <= shape.n_ctx:
        raise PromptTooLong(
            f"the prompt has {len(tokens)} tokens: expected 1 to {shape.n_ctx}",
            n_tokens=len(tokens),
            n_ctx=shape.n_ctx,
        )
    if not all(0 <= token_id < shape.d_vocab for token_id in tokens.ids):
        raise Unprocessable(
            f"the prompt has token ids from {min(tokens.ids)} to {max(tokens.ids)}: expected 0 to "
            f"{shape.d_vocab - 1}"
        )
    return torch.tensor([tokens.ids], device=model.device)


def finished(
    table: pa.Table,
    schema: str,
    *,
    unit: str,
    method: str,
    positions: tuple[int, ...] | None = None,
    **parameters: object,
) -> pa.Table:
    """The table, saying what it is."""
    return stamp(
        table,
        Provenance(
            table=schema,
            version=str(SCHEMAS[schema].version),
            unit=unit,
            method=method,
            positions=positions,
            parameters=parameters,
            scanner_version=SCANNER_VERSION,
        ),
    )
