"""Attention patterns of some layers, through TransformerLens's hooks."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from worker.scanner.shared_forward import Company

__all__ = ("scan_attention", "scan_attention_together")


def scan_attention(
    model: LoadedModel, request: AttentionScan, tokens: Tokens, listener: Listener
) -> ScanOutput:
    """A table `attention.L` for each chosen layer L: a row a head, its pattern query-major.

    The forward stops after the last chosen layer. Raises `UnknownComponent` for a layer that the model
    does not have, and `Cancelled` when the listener stops it.
    """
    return scan_attention_together(model, [request], [tokens], [listener])[0]


@torch.inference_mode()
def scan_attention_together(
    model: LoadedModel,
    requests: Sequence[AttentionScan],
    prompts: Sequence[Tokens],
    listeners: Sequence[Listener],
) -> list[ScanOutput]:
    """Several prompts of one length as rows of one forward, each at the layers that it is asked about.

    What each scan would give, to the last digits but one: matrices of other shapes are summed in another
    order. The forward stops after the last layer that anybody has chosen, and goes on while anybody waits
    for it. Raises as `scan_attention` does.
    """
    if len(requests) > 1 and any(request.canonical for request in requests):
        raise ValueError("a canonical scan has its forward to itself")
    ids = torch.cat([token_ids(model, tokens) for tokens in prompts])
    rows = [
        _Row(listener, sorted(set(request.layers)))
        for request, listener in zip(requests, listeners, strict=True)
    ]
    company = Company(listeners)
    stop_at, n_layers = 1 + max(row.layers[-1] for row in rows), model.architecture.n_layers
    if stop_at > n_layers:
        raise UnknownComponent(
            f"layer {stop_at - 1} does not exist: the model has {n_layers} layers, 0 to {n_layers - 1}"
        )
    made: list[dict[str, pa.Table]] = [{} for _ in rows]

    def reader(layer: int) -> Callable[..., None]:
        def read(patterns: Float[Tensor, "batch head query key"], hook: Any) -> None:  # noqa: ARG001
            # TransformerLens passes the hook point by name.
            for row, tables, pattern in zip(rows, made, patterns, strict=True):
                if layer in row.layers:
                    tables[f"attention.{layer}"] = _table(layer, pattern.float().cpu())
                    row.listener.progress("forward", layer + 1, row.layers[-1] + 1)
            company.checkpoint()

        return read

    layers = sorted({layer for row in rows for layer in row.layers})
    started = time.perf_counter()
    model.bridge.run_with_hooks(
        ids,
        fwd_hooks=[(sites.attention_pattern(layer), reader(layer)) for layer in layers],
        stop_at_layer=stop_at,
    )
    seconds = (time.perf_counter() - started) / len(rows)
    return [ScanOutput(tables, seconds) for tables in made]


class _Row(NamedTuple):
    listener: Listener
    layers: list[int]
    """In order, each once."""


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
