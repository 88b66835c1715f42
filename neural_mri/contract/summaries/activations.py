"""fMRI in short, with the fields and nesting of the seed specification's section 4.3."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import msgspec
import pyarrow as pa

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.summaries.attention import patterns
from neural_mri.contract.summaries.base import (
    Stored,
    SummaryBase,
    Tensor,
    Values,
    numbers,
    values_over_tokens,
)
from neural_mri.contract.summaries.predictions import Prediction, predictions

__all__ = ("TABLES", "ActivationSummary", "activation_summary")

TABLES = ("activations", "neurons", "predictions")


class TopNeuron(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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


class ActivationSummary(SummaryBase, frozen=True, kw_only=True, tag="fMRI"):
    """fMRI: what each component writes to the residual stream, token by token."""

    data: dict[str, Activations]
    predictions: tuple[Prediction, ...]
    """Likeliest next tokens after each reported position, likeliest first."""


def activation_summary(stored: Stored) -> ActivationSummary:
    """From `activations`, and what there is of `neurons` and `predictions`."""
    table = stored.tables["activations"]
    neurons, likeliest = stored.tables.get("neurons"), stored.tables.get("predictions")
    limit = int(stored.manifest.request.get("top_neurons", 0))
    return ActivationSummary(
        **stored.shared(table),
        data=_components(stored, _rows(table), _strongest(neurons, limit)),
        predictions=() if likeliest is None else predictions(likeliest),
    )


class _Row(NamedTuple):
    """A component's values, under its address."""

    address: str
    component: Component
    values: Values


_parsed = lru_cache(maxsize=4096)(Component.parse)
"""Every scan of a model has the same components."""


def _rows(table: pa.Table) -> list[_Row]:
    addresses: list[str] = table.column("component").to_pylist()
    return [
        _Row(address, _parsed(address), values)
        for address, values in zip(addresses, values_over_tokens(table), strict=True)
    ]


def _components(
    stored: Stored, rows: Sequence[_Row], neurons: Mapping[str, tuple[TopNeuron, ...]]
) -> dict[str, Activations]:
    heads: defaultdict[int | None, list[Values]] = defaultdict(list)
    for _, component, value in rows:
        if component.kind is Kind.HEAD:
            heads[component.layer].append(value)
    whole = {component.layer for _, component, _ in rows if component.kind is Kind.ATTN}
    data: dict[str, Activations] = {}
    for address, component, value in rows:
        match component.kind:
            case Kind.EMBED:
                summary: Activations = Embedding(
                    shape=(len(value), stored.architecture.d_model), activations_summary=value
                )
            case Kind.ATTN:
                summary = Attention(
                    num_heads=stored.architecture.n_heads,
                    activations_summary=value,
                    per_head_activation=tuple(heads[component.layer]),
                    attention_patterns=patterns(stored, component.layer),
                )
            case Kind.HEAD if component.layer in whole:
                continue
            case Kind.MLP:
                summary = Mlp(activation_summary=value, top_neurons=neurons.get(address, ()))
            case Kind.HEAD:
                summary = Head(activations_summary=value)
            case Kind.UNEMBED:
                summary = Unembedding(activations_summary=value)
            case _:
                summary = Residual(activations_summary=value)
        data[address] = summary
    return data


def _strongest(table: pa.Table | None, limit: int) -> dict[str, tuple[TopNeuron, ...]]:
    """For each MLP its `limit` strongest neurons over all reported positions, each once."""
    if table is None:
        return {}
    mlps = table.column("component").combine_chunks().dictionary_encode()
    neurons, values = numbers(table, "neuron"), numbers(table, "value")
    positions = numbers(table, "position")
    sizes = list(map(abs, values))
    strongest: list[dict[int, int]] = [{} for _ in mlps.dictionary]
    """Of each MLP the row where each of its neurons is strongest."""
    for row, (mlp, neuron) in enumerate(
        zip(mlps.indices.to_numpy().tolist(), neurons, strict=True)
    ):
        known = strongest[mlp].setdefault(neuron, row)
        if sizes[row] > sizes[known]:
            strongest[mlp][neuron] = row
    return {
        component: tuple(
            TopNeuron(idx=neurons[row], activation=values[row], position=positions[row])
            for row in sorted(rows.values(), key=sizes.__getitem__, reverse=True)[:limit]
        )
        for component, rows in zip(mlps.dictionary.to_pylist(), strongest, strict=True)
    }
