"""What goes into a scan of a prompt, and what comes out of it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Int
from torch import Tensor

from neural_mri.contract.problems import PromptTooLong, Unprocessable
from neural_mri.contract.results import SCHEMAS, Provenance, stamp
from neural_mri.contract.scan_keys import SCANNER_VERSION
from neural_mri.contract.tokens import Tokens
from worker.scanner.loading import LoadedModel

__all__ = ("ScanOutput", "finished", "read_until", "token_ids")


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


def read_until(model: LoadedModel, position: int, n_tokens: int) -> int:
    """How many of a prompt's tokens are read to ask for the one after a position: what follows is not seen.

    Raises `Unprocessable` where the model turns queries and keys by how long the whole prompt is, and a prompt that
    ends there would be turned otherwise: `longrope` beyond the context that the model was first trained for, `dynamic`
    (NTK) wherever that is exceeded (Hugging Face's `modeling_rope_utils`).
    """
    n_read = position + 1
    for rope_type, longest in _turned_by_length(model):
        if (
            n_read < n_tokens
            and n_tokens > longest
            and (rope_type == "dynamic" or n_read <= longest)
        ):
            raise Unprocessable(
                f"the token after position {position} of {n_tokens} is asked for, and beyond {longest} tokens this "
                f"model's positions depend on how many there are ({rope_type} rotary embeddings): ask about the last "
                "position, or send the prompt up to there",
                n_tokens=n_tokens,
            )
    return n_read


def _turned_by_length(model: LoadedModel) -> Iterator[tuple[str, int]]:
    """Kinds of rotary embeddings that look at the prompt's length, and from which on."""
    config = model.plain.config
    found: Any = getattr(config, "rope_parameters", None) or {}
    # Of a model whose layers differ in this, a mapping for each kind of layer.
    for each in [found, *(part for part in found.values() if isinstance(part, Mapping))]:
        rope_type = each.get("rope_type", "default")
        if rope_type in ("longrope", "dynamic"):
            known = each.get("original_max_position_embeddings") or config.max_position_embeddings
            yield rope_type, int(known)


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
