"""Tables as data frames like them: one row a value.

fMRI        component, kind, layer, head, position, token, value
attention   component, layer, head, query, query_token, key, key_token, value (keys after the query left out)
T1          the table itself: it has one row a component already
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.client.activation_map import value_matrix
from neural_mri.contract.results import provenance_of

__all__ = ("activations_long", "attention_long")


def activations_long(activations: pa.Table, prompt_tokens: Sequence[str]) -> pa.Table:
    """`component, kind, layer, head, position, token, value`: tokens fastest."""
    values = value_matrix(activations)
    positions = np.array(provenance_of(activations).positions or (), dtype=np.int32)
    n_rows, n_positions = values.shape
    each = np.repeat(np.arange(n_rows), n_positions)
    long = activations.select(["component", "kind", "layer", "head"]).take(pa.array(each))
    at = np.tile(positions, n_rows)
    return (
        long.append_column("position", pa.array(at))
        .append_column("token", _texts(prompt_tokens, at))
        .append_column("value", pa.array(values.reshape(-1)))
        .replace_schema_metadata(activations.schema.metadata)
    )


def attention_long(pattern: pa.Table, prompt_tokens: Sequence[str]) -> pa.Table:
    """One row a head, query and key, for keys up to the query: a causal model reads no others."""
    values = value_matrix(pattern)
    n_rows, n_pairs = values.shape
    n_tokens = round(n_pairs**0.5)
    queries, keys = np.tril_indices(n_tokens)
    each = np.repeat(np.arange(n_rows), len(queries))
    long = pattern.select(["component", "layer", "head"]).take(pa.array(each))
    query, key = np.tile(queries, n_rows), np.tile(keys, n_rows)
    pairs = values.reshape(n_rows, n_tokens, n_tokens)
    return (
        long.append_column("query", pa.array(query.astype(np.int32)))
        .append_column("query_token", _texts(prompt_tokens, query))
        .append_column("key", pa.array(key.astype(np.int32)))
        .append_column("key_token", _texts(prompt_tokens, key))
        .append_column("value", pa.array(pairs[:, queries, keys].reshape(-1)))
        .replace_schema_metadata(pattern.schema.metadata)
    )


def _texts(prompt_tokens: Sequence[str], positions: npt.NDArray[np.integer]) -> pa.Array:
    return pa.array(prompt_tokens, pa.string()).take(pa.array(positions))
