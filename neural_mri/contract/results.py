"""What a scan leaves behind: Arrow tables, and a manifest that names them.

One table a quantity. Columns that pictures are painted from are float32 and not null; NaN says "not
measured". Every table's schema metadata says what it is, in which unit, of which weights, by which
method; a reader refuses a newer major version of a schema instead of guessing.

Values over tokens stand as one fixed-size list a component (`value: fixed_size_list<float32>[n]`): in the
browser each row is a typed array on the response's own bytes.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
import pyarrow as pa

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Numerics
from neural_mri.contract.scans import ScanKind
from neural_mri.contract.tables import SCHEMAS, SchemaVersion

__all__ = (
    "ARROW_FILE",
    "ARROW_STREAM",
    "SCHEMAS",
    "Manifest",
    "Provenance",
    "SchemaVersion",
    "TableRef",
    "component_columns",
    "from_ipc",
    "has_foil",
    "positions_column",
    "provenance_of",
    "signed",
    "stamp",
    "to_ipc",
)

ARROW_FILE = "application/vnd.apache.arrow.file"
ARROW_STREAM = "application/vnd.apache.arrow.stream"

_METADATA_KEY = b"neural_mri"


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a table's numbers come from; travels in the table's own schema metadata."""

    table: str
    version: str
    unit: str
    """What a value is counted in: `L2 norm`, `nats`, `logits`, `parameters`, `probability`."""
    method: str
    """How it was measured, in a phrase that names the hook or the formula."""
    positions: tuple[int, ...] | None = None
    """Token positions of the value columns, where they are per token."""
    parameters: dict[str, Any] = {}
    model: str = ""
    revision: str = ""
    scan_key: str = ""
    scanner_version: str = ""


class TableRef(msgspec.Struct, frozen=True, kw_only=True):
    """A stored table: its bytes are named by their own hash."""

    name: str
    """Unique in the result: `activations`, or `vectors.3` where there is one a layer."""
    table: str
    chunk: str
    """SHA-256 of the bytes; the ETag."""
    bytes: int
    rows: int
    unit: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Names a result's tables. Written last: a result with a manifest is whole."""

    version: int = 2
    """From 2 on it is stored with a seal (`backing.stored`)."""
    scan_key: str
    kind: ScanKind
    model: str
    revision: str
    numerics: Numerics
    scanner_version: str
    request: dict[str, Any]
    prompt_tokens: tuple[str, ...] = ()
    tables: tuple[TableRef, ...]
    created_at: datetime
    forward_seconds: float
    """Inside the model; of a forward that several scans shared, this one's share."""
    compute_seconds: float
    """Inside the scanner, the forward pass included; likewise."""
    memory_bytes: int
    """Memory the worker held on the model's device when the scan ended."""

    def table(self, name: str) -> TableRef | None:
        """The table of that name, if the result has it."""
        return next((ref for ref in self.tables if ref.name == name), None)


def component_columns(components: Sequence[Component]) -> dict[str, pa.Array]:
    """The `component`, `kind`, `layer`, `head` columns of a table with one row a component."""
    return {
        "component": pa.array([str(c) for c in components], pa.string()),
        "kind": pa.array([c.kind.value for c in components], pa.string()),
        "layer": pa.array([-1 if c.layer is None else c.layer for c in components], pa.int16()),
        "head": pa.array([c.index if c.kind is Kind.HEAD else -1 for c in components], pa.int16()),
    }


def positions_column(flat: pa.Array, width: int) -> tuple[pa.Field, pa.Array]:
    """The `value` column: `width` float32 a row, from a flat float32 array in row order."""
    item = pa.field("item", pa.float32(), nullable=False)
    column = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(item, width))
    return pa.field("value", column.type, nullable=False), column


def build(
    name: str,
    columns: Mapping[str, pa.Array],
    value: tuple[pa.Field, pa.Array] | None = None,
) -> pa.Table:
    """A table of the schema called `name`. Raises `KeyError` when a column is missing."""
    schema = SCHEMAS[name]
    fields = list(schema.fields)
    arrays = [columns[field.name] for field in fields]
    if value is not None:
        fields.append(value[0])
        arrays.append(value[1])
    return pa.table(arrays, schema=pa.schema(fields))


def stamp(table: pa.Table, provenance: Provenance) -> pa.Table:
    """The table with its provenance in the schema metadata."""
    metadata = {**(table.schema.metadata or {}), _METADATA_KEY: msgspec.json.encode(provenance)}
    return table.replace_schema_metadata(metadata)


def signed(tables: Mapping[str, pa.Table], manifest: Manifest) -> dict[str, pa.Table]:
    """The tables, each saying whose weights and which scan it is of."""
    return {
        name: stamp(
            table,
            msgspec.structs.replace(
                provenance_of(table),
                model=manifest.model,
                revision=manifest.revision,
                scan_key=manifest.scan_key,
                scanner_version=manifest.scanner_version,
            ),
        )
        for name, table in tables.items()
    }


def has_foil(metric: pa.Table) -> bool:
    """Whether what a table says of a metric is the difference from a foil; else it is the answer's log-probability.

    By the unit, not by `foil_id`: a redacted link shows no ids. Raises as `provenance_of` does.
    """
    return provenance_of(metric).unit == "logits"


def provenance_of(table: pa.Table) -> Provenance:
    """What a table says of itself.

    Raises `ValueError` when it says nothing, or when its schema is of a newer major version.
    """
    body = (table.schema.metadata or {}).get(_METADATA_KEY)
    if body is None:
        raise ValueError("this Arrow table has no neural_mri metadata: it is not a scan's")
    provenance = msgspec.json.decode(body, type=Provenance)
    known = SCHEMAS.get(provenance.table)
    if known is None or int(provenance.version.split(".")[0]) > known.version.major:
        raise ValueError(
            f"table {provenance.table} is of schema version {provenance.version}, this reader knows "
            f"{known.version if known else 'no such table'}: upgrade neural_mri"
        )
    return provenance


# Named, so that pyarrow does not ask the environment for each table: tables are named by the hash of their bytes.
_IPC = pa.ipc.IpcWriteOptions()


def to_ipc(table: pa.Table) -> bytes:
    """Arrow IPC file, uncompressed: browsers decode no compressed bodies, and ranges stay useful."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=_IPC) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_ipc(body: bytes | pa.Buffer) -> pa.Table:
    """A stored table. Raises `pyarrow.ArrowInvalid` on damaged bytes."""
    with pa.ipc.open_file(pa.py_buffer(body)) as reader:
        table = reader.read_all()
    table.validate(full=True)
    return table
