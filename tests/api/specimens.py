"""A tiny model's shape and tokenizer, and tables of made-up numbers in the right shapes."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture, NormPlacement
from neural_mri.contract.results import (
    SCHEMAS,
    Provenance,
    build,
    component_columns,
    positions_column,
    stamp,
)
from neural_mri.contract.scans import ActivationScan, AttentionScan, Scan, resolve_positions

__all__ = ("PROMPT", "TINY", "tables_of", "tiny_tokenizer")

TINY = Architecture(
    family="llama",
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_model=8,
    d_head=4,
    d_mlp=16,
    d_vocab=300,
    n_ctx=64,
    activation="silu",
    gated_mlp=True,
    norm="rms",
    norm_placement=NormPlacement.PRE,
    parallel_blocks=False,
    tied_embeddings=True,
    positions="rotary",
)

PROMPT = "The Eiffel Tower is in Paris"


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE with a BOS, as Llama-3 and SmolLM2 have it, of 300 tokens."""
    tokenizer = Tokenizer(BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer


def tables_of(scan: Scan, n_tokens: int) -> Mapping[str, pa.Table]:
    """Tables of the right shapes."""
    match scan:
        case ActivationScan():
            return activation_tables(scan, n_tokens)
        case AttentionScan():
            return {f"attention.{layer}": patterns(layer, n_tokens) for layer in scan.layers}
        case _:
            return {"topology": topology()}


def activation_tables(scan: ActivationScan, n_tokens: int) -> Mapping[str, pa.Table]:
    positions = resolve_positions(scan.token_positions, n_tokens)
    selected = scan.selected(TINY)
    flat = pa.array([float(n) / 8 for n in range(len(selected) * len(positions))], pa.float32())
    value = positions_column(flat, len(positions))
    layers = [c.layer for c in selected if c.kind is Kind.MLP]
    return {
        "activations": _stamped("activations", component_columns(selected), value, positions),
        "neurons": _stamped(
            "neurons",
            {
                "component": pa.array([f"blocks.{layer}.mlp" for layer in layers], pa.string()),
                "layer": pa.array(layers, pa.int16()),
                "position": pa.array([0] * len(layers), pa.int32()),
                "rank": pa.array([0] * len(layers), pa.int16()),
                "neuron": pa.array([7] * len(layers), pa.int32()),
                "value": pa.array([2.5] * len(layers), pa.float32()),
            },
        ),
        "predictions": _stamped(
            "predictions",
            {
                "position": pa.array([positions[-1]], pa.int32()),
                "rank": pa.array([0], pa.int16()),
                "token_id": pa.array([3], pa.int32()),
                "text": pa.array([" Paris"]),
                "logit": pa.array([9.0], pa.float32()),
                "log_probability": pa.array([-0.25], pa.float32()),
                "probability": pa.array([0.75], pa.float32()),
            },
        ),
    }


def patterns(layer: int, n_tokens: int) -> pa.Table:
    heads = range(TINY.n_heads)
    flat = pa.array([1 / n_tokens] * (n_tokens**2 * TINY.n_heads), pa.float32())
    return _stamped(
        "attention",
        {
            "component": pa.array([str(Component.head(layer, head)) for head in heads]),
            "layer": pa.array([layer] * TINY.n_heads, pa.int16()),
            "head": pa.array(list(heads), pa.int16()),
        },
        positions_column(flat, n_tokens**2),
    )


def topology() -> pa.Table:
    nodes = tuple(TINY.nodes())
    return _stamped(
        "topology",
        {
            **component_columns(nodes),
            "kv_head": pa.array([-1] * len(nodes), pa.int16()),
            "parameters": pa.array([10] * len(nodes), pa.uint32()),
            "shared_parameters": pa.array([0] * len(nodes), pa.uint32()),
        },
    )


def _stamped(
    name: str, columns: dict[str, pa.Array], value: Any = None, positions: Any = None
) -> pa.Table:
    provenance = Provenance(
        table=name,
        version=str(SCHEMAS[name].version),
        unit="L2 norm",
        method="made up",
        positions=positions,
    )
    return stamp(build(name, columns, value), provenance)
