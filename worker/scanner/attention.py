"""Attention patterns of some layers, through TransformerLens's hooks."""

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.components import Component
from neural_mri.contract.problems import UnknownComponent
from neural_mri.contract.results import build, positions_column
from neural_mri.contract.scans import AttentionScan
from neural_mri.contract.tokens import Tokens
from worker.scanner import sites
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.prompts import ScanOutput, finished, token_ids

__all__ = ("scan_attention",)


@torch.inference_mode()
def scan_attention(
    model: LoadedModel, request: AttentionScan, tokens: Tokens, listener: Listener
) -> ScanOutput:
    """A table `attention.L` for each chosen layer L: a row a head, its pattern query-major.

    The forward stops after the last chosen layer. Raises `UnknownComponent` for a layer that the model
    does not have, and `Cancelled` when the listener stops it.
    """
    ids = token_ids(model, tokens)
    layers = sorted(set(request.layers))
    n_layers = model.architecture.n_layers
    if layers[-1] >= n_layers:
        raise UnknownComponent(
            f"layer {layers[-1]} does not exist: the model has {n_layers} layers, 0 to {n_layers - 1}"
        )
    made: dict[str, pa.Table] = {}

    def reader(layer: int) -> Callable[..., None]:
        def read(pattern: Float[Tensor, "batch head query key"], hook: Any) -> None:  # noqa: ARG001
            # TransformerLens passes the hook point by name.
            made[f"attention.{layer}"] = _table(layer, pattern[0].float().cpu())
            listener.progress("forward", layer + 1, layers[-1] + 1)
            listener.checkpoint()

        return read

    started = time.perf_counter()
    model.bridge.run_with_hooks(
        ids,
        fwd_hooks=[(sites.attention_pattern(layer), reader(layer)) for layer in layers],
        stop_at_layer=layers[-1] + 1,
    )
    return ScanOutput(made, time.perf_counter() - started)


def _table(layer: int, pattern: Float[Tensor, "head query key"]) -> pa.Table:
    n_heads, n_tokens, _ = pattern.shape
    heads = [Component.head(layer, head) for head in range(n_heads)]
    columns = {
        "component": pa.array([str(head) for head in heads], pa.string()),
        "layer": pa.array([layer] * n_heads, pa.int16()),
        "head": pa.array(range(n_heads), pa.int16()),
    }
    value = positions_column(pa.array(pattern.reshape(-1).numpy()), n_tokens * n_tokens)
    return finished(
        build("attention", columns, value),
        "attention",
        unit="probability",
        method=f"{sites.attention_pattern(layer)}: softmax of the attention scores",
        positions=tuple(range(n_tokens)),
        n_tokens=n_tokens,
    )
