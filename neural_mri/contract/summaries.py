"""A result in short: what a shell, a notebook or a report reads without an Arrow reader.

Names and nesting of the seed specification's section 4.3. The numbers are the tables' own float32 values,
exactly; where a table says NaN, not measured, JSON says null. Tensors are never inlined: they are named
by URL.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import msgspec
import pyarrow as pa

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.results import Manifest, provenance_of
from neural_mri.contract.scans import ScanKind

__all__ = (
    "ActivationSummary",
    "AttentionSummary",
    "Metadata",
    "Summary",
    "TopologySummary",
    "summarise",
    "tables_needed",
)


Values: TypeAlias = tuple[float | None, ...]
"""One value a reported token; null where it was not measured."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that is fetched on demand."""

    shape: tuple[int, ...]
    data_url: str


class TopNeuron(msgspec.Struct, frozen=True, kw_only=True):
    """A strong neuron of an MLP, at the position where it is strongest."""

    idx: int
    activation: float
    position: int
    label: str | None = None


class ComponentSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What every component's summary has: nothing beside its type."""


class Embedding(ComponentSummary, frozen=True, kw_only=True, tag="embedding"):
    """The token embedding: one value a reported token."""

    shape: tuple[int, int]
    """Of the tensor behind it: reported tokens, d_model."""
    activations_summary: Values


class Attention(ComponentSummary, frozen=True, kw_only=True, tag="attention"):
    """An attention layer: values of the layer, and of each of its heads."""

    num_heads: int
    activations_summary: Values
    per_head_activation: tuple[Values, ...]
    """For each head in turn, its values."""
    attention_patterns: Tensor


class Head(ComponentSummary, frozen=True, kw_only=True, tag="head"):
    """A head that was asked for without its layer."""

    activations_summary: Values


class Mlp(ComponentSummary, frozen=True, kw_only=True, tag="mlp"):
    """An MLP: one value a reported token, and its strongest neurons over them."""

    activation_summary: Values
    top_neurons: tuple[TopNeuron, ...] = ()


class Residual(ComponentSummary, frozen=True, kw_only=True, tag="residual"):
    """The residual stream at one place."""

    activations_summary: Values


class Unembedding(ComponentSummary, frozen=True, kw_only=True, tag="unembedding"):
    """The unembedding."""

    activations_summary: Values


Activations: TypeAlias = Embedding | Attention | Head | Mlp | Residual | Unembedding


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """A likely next token after `position`."""

    position: int
    rank: int
    token: str
    token_id: int
    logit: float
    log_probability: float
    """In nats."""
    prob: float


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """How the numbers came about."""

    compute_time_ms: float
    """Inside the scanner, the forward pass included."""
    forward_time_ms: float
    """Inside the model."""
    gpu_memory_mb: float | None
    """Memory held on the GPU when the scan ended, in 10^6 bytes; null where there was no GPU."""
    memory_bytes: int
    """Memory held on the model's device, whatever it is."""
    unit: str
    method: str
    token_positions: tuple[int, ...] | None = None
    """Positions in the prompt of the values over tokens."""
    revision: str
    scan_key: str
    scanner_version: str
    dtype: str
    device: str


class SummaryBase(msgspec.Struct, frozen=True, kw_only=True, tag_field="scan_mode"):
    """What every summary has."""

    model: str
    prompt_tokens: tuple[str, ...] = ()
    metadata: Metadata


class Structure(msgspec.Struct, frozen=True, kw_only=True):
    """A component of the model and its parameters."""

    type: Kind
    layer: int | None
    head: int | None
    kv_head: int | None
    """The key-value head that a query head reads."""
    parameters: int
    shared_parameters: int
    """Read by it and counted elsewhere."""


class TopologySummary(SummaryBase, frozen=True, kw_only=True, tag="T1"):
    """T1: the model's structure."""

    architecture: Architecture
    total_parameters: int
    """The sum over `data`: each storage counted once."""
    data: dict[str, Structure]


class ActivationSummary(SummaryBase, frozen=True, kw_only=True, tag="fMRI"):
    """fMRI: what each component writes to the residual stream, token by token."""

    data: dict[str, Activations]
    predictions: tuple[Prediction, ...]
    """Likeliest next tokens after each reported position, likeliest first."""


class AttentionLayer(msgspec.Struct, frozen=True, kw_only=True, tag="attention"):
    """Where one layer's patterns are."""

    num_heads: int
    attention_patterns: Tensor


class AttentionSummary(SummaryBase, frozen=True, kw_only=True, tag="attention"):
    """Attention patterns, by URL."""

    data: dict[str, AttentionLayer]


Summary: TypeAlias = TopologySummary | ActivationSummary | AttentionSummary


def tables_needed(manifest: Manifest) -> tuple[str, ...]:
    """Names of the tables that a summary reads: the small ones."""
    match manifest.kind:
        case ScanKind.T1:
            wanted = {"topology"}
        case ScanKind.FMRI:
            wanted = {"activations", "neurons", "predictions"}
        case ScanKind.ATTENTION:
            return tuple(ref.name for ref in islice(manifest.tables, 1))
    return tuple(ref.name for ref in manifest.tables if ref.name in wanted)


def summarise(
    manifest: Manifest, tables: Mapping[str, pa.Table], architecture: Architecture, *, job_url: str
) -> Summary:
    """The summary of a result, from the tables that `tables_needed` names.

    Args:
        manifest: The result's manifest.
        tables: Its tables by name.
        architecture: Of the model that was scanned.
        job_url: Address of the job, without a trailing slash: the tensors' URLs begin with it.
    """
    match manifest.kind:
        case ScanKind.T1:
            return _topology(manifest, tables["topology"], architecture)
        case ScanKind.FMRI:
            return _activations(manifest, tables, architecture, job_url)
        case ScanKind.ATTENTION:
            return _attention(manifest, next(iter(tables.values())), architecture, job_url)


def _topology(manifest: Manifest, table: pa.Table, architecture: Architecture) -> TopologySummary:
    data = {
        row["component"]: Structure(
            type=Kind(row["kind"]),
            layer=_absent(row["layer"]),
            head=_absent(row["head"]),
            kv_head=_absent(row["kv_head"]),
            parameters=row["parameters"],
            shared_parameters=row["shared_parameters"],
        )
        for row in table.to_pylist()
    }
    return TopologySummary(
        model=manifest.model,
        metadata=_metadata(manifest, table),
        architecture=architecture,
        total_parameters=sum(part.parameters for part in data.values()),
        data=data,
    )


def _activations(
    manifest: Manifest, tables: Mapping[str, pa.Table], architecture: Architecture, job_url: str
) -> ActivationSummary:
    table = tables["activations"]
    neurons, predictions = tables.get("neurons"), tables.get("predictions")
    return ActivationSummary(
        model=manifest.model,
        prompt_tokens=manifest.prompt_tokens,
        metadata=_metadata(manifest, table),
        data=_components(
            values=_values(table),
            neurons=_strongest(neurons, int(manifest.request.get("top_neurons", 0))),
            architecture=architecture,
            n_tokens=len(manifest.prompt_tokens),
            job_url=job_url,
        ),
        predictions=() if predictions is None else _predictions(predictions),
    )


def _components(
    *,
    values: Mapping[Component, Values],
    neurons: Mapping[str, tuple[TopNeuron, ...]],
    architecture: Architecture,
    n_tokens: int,
    job_url: str,
) -> dict[str, Activations]:
    heads: defaultdict[int | None, list[Values]] = defaultdict(list)
    for component, value in values.items():
        if component.kind is Kind.HEAD:
            heads[component.layer].append(value)
    data: dict[str, Activations] = {}
    for component, value in values.items():
        match component.kind:
            case Kind.EMBED:
                summary: Activations = Embedding(
                    shape=(len(value), architecture.d_model), activations_summary=value
                )
            case Kind.ATTN:
                summary = Attention(
                    num_heads=architecture.n_heads,
                    activations_summary=value,
                    per_head_activation=tuple(heads[component.layer]),
                    attention_patterns=_patterns(component, architecture, n_tokens, job_url),
                )
            case Kind.HEAD if Component(Kind.ATTN, component.layer) in values:
                continue
            case Kind.MLP:
                summary = Mlp(activation_summary=value, top_neurons=neurons.get(str(component), ()))
            case Kind.HEAD:
                summary = Head(activations_summary=value)
            case Kind.UNEMBED:
                summary = Unembedding(activations_summary=value)
            case _:
                summary = Residual(activations_summary=value)
        data[str(component)] = summary
    return data


def _attention(
    manifest: Manifest, table: pa.Table, architecture: Architecture, job_url: str
) -> AttentionSummary:
    layers = [Component(Kind.ATTN, layer) for layer in sorted(set(manifest.request["layers"]))]
    n_tokens = len(manifest.prompt_tokens)
    return AttentionSummary(
        model=manifest.model,
        prompt_tokens=manifest.prompt_tokens,
        metadata=_metadata(manifest, table),
        data={
            str(layer): AttentionLayer(
                num_heads=architecture.n_heads,
                attention_patterns=_patterns(layer, architecture, n_tokens, job_url),
            )
            for layer in layers
        },
    )


def _patterns(layer: Component, architecture: Architecture, n_tokens: int, job_url: str) -> Tensor:
    return Tensor(
        shape=(architecture.n_heads, n_tokens, n_tokens),
        data_url=f"{job_url}/attention/{layer.layer}",
    )


def _values(table: pa.Table) -> dict[Component, Values]:
    return {
        Component.parse(address): tuple(row) for address, row in _rows(table, "component", "value")
    }


def _strongest(table: pa.Table | None, limit: int) -> dict[str, tuple[TopNeuron, ...]]:
    """For each MLP its `limit` strongest neurons over all reported positions, each once."""
    if table is None:
        return {}
    found: defaultdict[str, dict[int, TopNeuron]] = defaultdict(dict)
    for component, neuron, value, position in _rows(
        table, "component", "neuron", "value", "position"
    ):
        known = found[component].get(neuron)
        if known is None or abs(value) > abs(known.activation):
            found[component][neuron] = TopNeuron(idx=neuron, activation=value, position=position)
    return {
        component: tuple(sorted(best.values(), key=lambda neuron: -abs(neuron.activation))[:limit])
        for component, best in found.items()
    }


def _predictions(table: pa.Table) -> tuple[Prediction, ...]:
    columns = ("position", "rank", "text", "token_id", "logit", "log_probability", "probability")
    return tuple(
        Prediction(
            position=position,
            rank=rank,
            token=text,
            token_id=token_id,
            logit=logit,
            log_probability=log_probability,
            prob=probability,
        )
        for position, rank, text, token_id, logit, log_probability, probability in _rows(
            table, *columns
        )
    )


def _rows(table: pa.Table, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table.column(name).to_pylist() for name in names), strict=True)


def _metadata(manifest: Manifest, table: pa.Table) -> Metadata:
    provenance = provenance_of(table)
    on_gpu = manifest.numerics.device != "cpu"
    return Metadata(
        compute_time_ms=manifest.compute_seconds * 1e3,
        forward_time_ms=manifest.forward_seconds * 1e3,
        gpu_memory_mb=manifest.memory_bytes / 1e6 if on_gpu else None,
        memory_bytes=manifest.memory_bytes,
        unit=provenance.unit,
        method=provenance.method,
        token_positions=provenance.positions,
        revision=manifest.revision,
        scan_key=manifest.scan_key,
        scanner_version=manifest.scanner_version,
        dtype=manifest.numerics.dtype,
        device=manifest.numerics.device,
    )


def _absent(number: Any) -> int | None:
    """Tables write -1 for a number that a component does not have."""
    return None if number < 0 else int(number)
