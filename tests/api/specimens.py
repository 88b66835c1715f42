"""A tiny model's shape and tokenizer, and tables of made-up numbers in the right shapes."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
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
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    Scan,
    StructuralScan,
    TracingScan,
    WeightScan,
    resolve_positions,
)

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


def tiny_tokenizer(texts: Sequence[str] = (PROMPT,), *, n_tokens: int = 300) -> Tokenizer:
    """A byte-level BPE with a BOS, as Llama-3 has it, that knows the words of some texts."""
    tokenizer = Tokenizer(BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=["<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer


def tables_of(scan: Scan, n_tokens: int) -> Mapping[str, pa.Table]:
    """Tables of the right shapes."""
    match scan:
        case StructuralScan():
            return {"topology": topology()}
        case WeightScan():
            return weight_tables(scan)
        case ActivationScan():
            return activation_tables(scan, n_tokens)
        case AttentionScan():
            return {f"attention.{layer}": patterns(layer, n_tokens) for layer in scan.layers}
        case CircuitScan():
            return circuit_tables(scan)
        case AnomalyScan():
            return anomaly_tables(n_tokens)
        case PerturbationScan():
            return perturbation_tables(n_tokens)
        case PatchingScan() | TracingScan():
            return map_tables(scan, n_tokens)
        case CalibrationScan():
            return calibration_tables(scan)


def filled(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    width: int | None = None,
    positions: tuple[int, ...] | None = None,
    **parameters: Any,
) -> pa.Table:
    """A table of a schema: what the rows leave open is 0.5, 0, false or nothing."""
    blank = {pa.float32(): 0.5, pa.bool_(): False, pa.string(): ""}
    columns = {
        field.name: pa.array(
            [row.get(field.name, blank.get(field.type, 0)) for row in rows], field.type
        )
        for field in SCHEMAS[name].fields
    }
    value = None
    if width is not None:
        value = positions_column(pa.array([0.5] * (width * len(rows)), pa.float32()), width)
    return _stamped(name, columns, value, positions, parameters)


def places(*components: Component) -> list[dict[str, Any]]:
    """The columns that every table of components has, row by row."""
    return [
        {name: column[row].as_py() for name, column in component_columns(components).items()}
        for row in range(len(components))
    ]


NODES = places(*TINY.nodes())
HEADS = [node for node in NODES if node["kind"] == Kind.HEAD]
PREDICTED = {"token_id": 3, "text": " Paris", "logit": 9.0, "probability": 0.75}


def weight_tables(scan: WeightScan) -> Mapping[str, pa.Table]:
    said: dict[str, Any] = {
        "outlier_sigma": scan.outlier_sigma,
        "quantization": None,
        "baseline": scan.baseline,
    }
    circuits = [{**head, "circuit": circuit} for head in HEADS for circuit in ("QK", "OV")]
    tables = {
        "tensors": filled("tensors", [{"name": "w", "shape": [8, 8]}], **said),
        "weights": filled("weights", NODES, **said),
        "circuits": filled("circuits", circuits, width=2, **said),
    }
    if scan.baseline is not None:
        tables["difference"] = filled("difference", NODES, **said)
    return tables


def circuit_tables(scan: CircuitScan) -> Mapping[str, pa.Table]:
    said: dict[str, Any] = {"ablation": scan.effective_ablation, "first_position": 1}
    edge = {"source": "embed", "target": "blocks.0.mlp"}
    return {
        "effects": filled("effects", NODES, **said),
        "metric": filled("metric", [{"foil_id": -1, "answer": " Paris"}]),
        "edges": filled("edges", [edge], share=0.5),
    }


def anomaly_tables(n_tokens: int) -> Mapping[str, pa.Table]:
    positions = tuple(range(n_tokens))
    embed, mlp = places(Component(Kind.EMBED), Component(Kind.MLP, 0))
    lens = [{**embed, "quantity": name} for name in ("kl", "kl_z", "anomalous")]
    nodes = [{**mlp, "quantity": name} for name in ("kl_change", "z", "anomalous")]
    at = [{"position": position} for position in positions]
    own = [{**row, "role": "own", "text": "a"} for row in at]
    return {
        "lens": filled("lens", lens, width=n_tokens, positions=positions, calibration="sampled"),
        "nodes": filled("nodes", nodes, width=n_tokens, positions=positions, bound=3.0),
        "uncertainty": filled("uncertainty", at, bound=3.0),
        "support": filled("support", [*own, {"position": n_tokens - 1, "role": "answer"}]),
        "depth": filled("depth", at),
        "predictions": filled("predictions", [{"position": n_tokens - 1, **PREDICTED}]),
    }


def perturbation_tables(n_tokens: int) -> Mapping[str, pa.Table]:
    at = [{"position": position} for position in range(n_tokens)]
    predicted = [{**row, **PREDICTED} for row in at]
    tables = {
        "comparison": filled("comparison", [{"position": n_tokens - 1, "foil_id": -1}], draws=1),
        "shift": filled("shift", at),
        "predictions": filled("predictions", predicted),
        "predictions_after": filled("predictions", predicted),
        "tokens": filled("tokens", at),
    }
    for name in ("activations", "activations_after", "change"):
        tables[name] = filled("activations", NODES, width=n_tokens)
    return tables


def map_tables(scan: PatchingScan | TracingScan, n_tokens: int) -> Mapping[str, pa.Table]:
    mlps = places(Component(Kind.MLP, 0), Component(Kind.MLP, 1))
    contrast = filled("contrast", [{"position": n_tokens - 1, "foil_id": -1, "answer": "a"}])
    if isinstance(scan, PatchingScan):
        return {"recovery": filled("recovery", mlps, width=n_tokens), "contrast": contrast}
    rows = [{**mlp, "quantity": name} for name in ("indirect_effect", "sd") for mlp in mlps]
    trace = filled("trace", rows, width=n_tokens, subject=[1], noise_sd=0.1, draws=scan.draws)
    return {"trace": trace, "contrast": contrast}


def calibration_tables(scan: CalibrationScan) -> Mapping[str, pa.Table]:
    facts: dict[str, Any] = {
        "source": "sampled",
        "seed": scan.seed,
        "n_tokens": scan.n_tokens,
        "n_positions": 9,
    }
    channel = [{"lens": lens, "channel": "kl"} for lens in scan.lenses]
    return {"calibration_ordinary": filled("calibration_ordinary", channel, width=4, **facts)}


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
    name: str,
    columns: dict[str, pa.Array],
    value: Any = None,
    positions: Any = None,
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> pa.Table:
    provenance = Provenance(
        table=name,
        version=str(SCHEMAS[name].version),
        unit="L2 norm",
        method="made up",
        positions=positions,
        parameters=dict(parameters),
    )
    return stamp(build(name, columns, value), provenance)
