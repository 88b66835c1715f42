"""Small results with known numbers, made by the contract's own builders."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture, ModelInfo, NormPlacement, Numerics
from neural_mri.contract.results import (
    Manifest,
    Provenance,
    TableRef,
    build,
    component_columns,
    positions_column,
    provenance_of,
    stamp,
    to_ipc,
)
from neural_mri.contract.scans import (
    ActivationScan,
    AttentionScan,
    PromptScan,
    Scan,
    ScanKind,
    StructuralScan,
    kind_of,
    resolve_positions,
)

REVISION = "7e57" * 16
SCAN_KEY = "5ca9" * 16

ARCHITECTURE = Architecture(
    family="llama",
    n_layers=4,
    n_heads=3,
    n_kv_heads=1,
    d_model=12,
    d_head=4,
    d_mlp=32,
    d_vocab=100,
    n_ctx=64,
    activation="silu",
    gated_mlp=True,
    norm="rms",
    norm_placement=NormPlacement.PRE,
    parallel_blocks=False,
    tied_embeddings=True,
    positions="rotary",
)

MODEL = ModelInfo(
    name="tiny",
    source="folder:tiny",
    revision=REVISION,
    tokenizer_digest="70c0" * 16,
    architecture=ARCHITECTURE,
    n_parameters=123_456,
    weights_bytes=493_824,
    default=True,
    pinned=True,
)

TOKENS = ("The", " Eiffel", " Tower", " is", " in")


class Specimen(NamedTuple):
    """A stored result: its manifest, and the bytes of its tables by name."""

    manifest: Manifest
    chunks: Mapping[str, bytes]


def specimen(scan: Scan) -> Specimen:
    """The result of a scan of the tiny model."""
    match scan:
        case StructuralScan():
            return _stored(ScanKind.T1, scan, {"topology": topology()})
        case ActivationScan():
            positions = resolve_positions(scan.token_positions, len(TOKENS))
            selected = scan.selected(ARCHITECTURE)
            tables = {
                "activations": activations(selected, positions),
                "tokens": tokens(),
                "predictions": predictions(positions),
            }
            return _stored(ScanKind.FMRI, scan, tables)
        case AttentionScan():
            patterns = {f"attention.{layer}": attention(layer) for layer in scan.layers}
            return _stored(ScanKind.ATTENTION, scan, patterns)
        case _:
            from tests.client.findings import tables_of

            return _stored(kind_of(scan), scan, tables_of(scan))


def value_of(component: Component, position: int) -> float:
    """What the specimens hold: known, positive, larger in later layers, huge at the sink."""
    layer = component.layer or 0
    place = {Kind.HEAD: component.index or 0, Kind.MLP: 10}.get(component.kind, 5)
    return float(np.float32((1 + layer) * (1 + place) + position / 10 + 500 * (position == 0)))


def activations(selected: tuple[Component, ...], positions: tuple[int, ...]) -> pa.Table:
    flat = [value_of(component, position) for component in selected for position in positions]
    value = positions_column(pa.array(flat, pa.float32()), len(positions))
    table = build("activations", component_columns(selected), value)
    return stamp(table, _provenance("activations", "L2 norm", positions))


def tokens() -> pa.Table:
    starts = np.cumsum([0, *map(len, TOKENS)])
    columns = {
        "position": pa.array(range(len(TOKENS)), pa.int32()),
        "token_id": pa.array(range(10, 10 + len(TOKENS)), pa.int32()),
        "text": pa.array(TOKENS, pa.string()),
        "start": pa.array(starts[:-1], pa.int32()),
        "end": pa.array(starts[1:], pa.int32()),
        "sink": pa.array([position == 0 for position in range(len(TOKENS))], pa.bool_()),
    }
    return stamp(build("tokens", columns), _provenance("tokens", "tokens"))


def predictions(positions: tuple[int, ...]) -> pa.Table:
    likely = ((" Paris", 0.7), (" France", 0.2), ("\x1b[2J", 0.05))
    rows = [(p, rank, *guess) for p in positions for rank, guess in enumerate(likely, 1)]
    probability = np.array([row[3] for row in rows], dtype=np.float32)
    columns = {
        "position": pa.array([row[0] for row in rows], pa.int32()),
        "rank": pa.array([row[1] for row in rows], pa.int16()),
        "token_id": pa.array([50 + row[1] for row in rows], pa.int32()),
        "text": pa.array([row[2] for row in rows], pa.string()),
        "logit": pa.array(np.log(probability) + 9),
        "log_probability": pa.array(np.log(probability)),
        "probability": pa.array(probability),
    }
    return stamp(build("predictions", columns), _provenance("predictions", "probability"))


def topology() -> pa.Table:
    nodes = tuple(ARCHITECTURE.nodes())
    columns = {
        **component_columns(nodes),
        "kv_head": pa.array([0 if n.kind is Kind.HEAD else -1 for n in nodes], pa.int16()),
        "parameters": pa.array([1000 + 10 * at for at in range(len(nodes))], pa.uint32()),
        "shared_parameters": pa.array([0] * len(nodes), pa.uint32()),
    }
    return stamp(build("topology", columns), _provenance("topology", "parameters"))


def pattern(layer: int) -> npt.NDArray[np.float32]:
    """`[head query key]`: lower-triangular, rows summing to 1, different in every head."""
    n_tokens = len(TOKENS)
    weights = np.random.default_rng(layer).random((ARCHITECTURE.n_heads, n_tokens, n_tokens))
    weights = np.tril(weights)
    shares: npt.NDArray[np.float32] = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return shares


def attention(layer: int) -> pa.Table:
    heads = range(ARCHITECTURE.n_heads)
    columns = {
        "component": pa.array([str(Component.head(layer, head)) for head in heads], pa.string()),
        "layer": pa.array([layer] * len(heads), pa.int16()),
        "head": pa.array(heads, pa.int16()),
    }
    value = positions_column(pa.array(pattern(layer).reshape(-1)), len(TOKENS) ** 2)
    return stamp(build("attention", columns, value), _provenance("attention", "probability"))


def _provenance(table: str, unit: str, positions: tuple[int, ...] | None = None) -> Provenance:
    return Provenance(
        table=table,
        version="1.0",
        unit=unit,
        method="made up",
        positions=positions,
        model=MODEL.name,
        revision=REVISION,
        scan_key=SCAN_KEY,
        scanner_version="1",
    )


def _stored(kind: ScanKind, scan: Scan, tables: Mapping[str, pa.Table]) -> Specimen:
    chunks = {name: to_ipc(table) for name, table in tables.items()}
    request: dict[str, Any] = msgspec.to_builtins(scan)
    manifest = Manifest(
        scan_key=SCAN_KEY,
        kind=kind,
        model=MODEL.name,
        revision=REVISION,
        numerics=Numerics(),
        scanner_version="1",
        request=request,
        prompt_tokens=TOKENS if isinstance(scan, PromptScan) else (),
        tables=tuple(
            TableRef(
                name=name,
                table=provenance_of(table).table,
                chunk=hashlib.sha256(chunks[name]).hexdigest(),
                bytes=len(chunks[name]),
                rows=len(table),
                unit="L2 norm",
            )
            for name, table in tables.items()
        ),
        created_at=datetime(2026, 11, 23, tzinfo=UTC),
        forward_seconds=0.09,
        compute_seconds=0.1,
        memory_bytes=1000,
    )
    return Specimen(manifest, chunks)
