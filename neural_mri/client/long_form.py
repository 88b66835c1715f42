"""Tables as data frames like them: one row a value.

fMRI          component, kind, layer, head, position, token, value
attention     component, layer, head, query, query_token, key, key_token, value (keys after the query left out)
FLAIR         component, kind, layer, head, quantity, position, token, value
perturbation  component, kind, layer, head, position, token, value: the length of the change; of a scan without
              activations, position, token, kl, kl_sd, entropy_before, entropy_after
patching      as fMRI: recovery
tracing       as FLAIR
calibration   lens, channel, row, mean, sd, quantile, value
T1, T2, DTI   the table itself: it has one row a component already
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.client.activation_map import value_matrix
from neural_mri.contract.results import provenance_of

__all__ = ("activations_long", "attention_long", "ordinary_long", "with_tokens")


def activations_long(activations: pa.Table, prompt_tokens: Sequence[str]) -> pa.Table:
    """One row a value, after the table's own columns `position, token, value`: tokens fastest."""
    values = value_matrix(activations)
    positions = np.array(provenance_of(activations).positions or (), dtype=np.int32)
    n_rows, n_positions = values.shape
    each = np.repeat(np.arange(n_rows), n_positions)
    long = activations.drop_columns(["value"]).take(pa.array(each))
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


def ordinary_long(ordinary: pa.Table) -> pa.Table:
    """One row a lens, channel, row and quantile: the k-th of n ordinary values is the k / (n + 1) quantile."""
    values = value_matrix(ordinary)
    n_rows, n_values = values.shape
    each = np.repeat(np.arange(n_rows), n_values)
    quantiles = np.tile(np.arange(1, n_values + 1) / (n_values + 1), n_rows)
    return (
        ordinary.drop_columns(["value"])
        .take(pa.array(each))
        .append_column("quantile", pa.array(quantiles))
        .append_column("value", pa.array(values.reshape(-1)))
    )


def with_tokens(table: pa.Table, prompt_tokens: Sequence[str]) -> pa.Table:
    """The table with a column `token` after its first, `position`."""
    texts = _texts(prompt_tokens, table["position"].to_numpy())
    return table.add_column(1, "token", texts)


def _texts(prompt_tokens: Sequence[str], positions: npt.NDArray[np.integer]) -> pa.Array:
    return pa.array(prompt_tokens, pa.string()).take(pa.array(positions))
