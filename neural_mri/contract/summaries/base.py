"""What every summary says, and how summaries read tables."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from neural_mri.contract.models import Architecture
from neural_mri.contract.results import Manifest, provenance_of

__all__ = (
    "Measured",
    "Metadata",
    "NamedToken",
    "Stored",
    "SummaryBase",
    "TableLink",
    "Tensor",
    "Values",
    "absent",
    "numbers",
    "only",
    "records",
    "rows",
    "values_over_tokens",
)

Measured: TypeAlias = float | None
"""A float32 of a table, exactly. Where the table says NaN, not measured, JSON says null."""
Values: TypeAlias = tuple[Measured, ...]
"""One value a reported token; null where it was not measured."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that is fetched on demand."""

    shape: tuple[int, ...]
    data_url: str


class TableLink(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the result, and where to fetch it."""

    table: str
    """Its schema."""
    unit: str
    rows: int
    bytes: int
    data_url: str
    """Answers in Arrow."""


class NamedToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token of the vocabulary."""

    token: str
    token_id: int


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
    tables: dict[str, TableLink]
    """Everything that was measured, by name."""


class Stored(NamedTuple):
    """A result, as much of it as its summary reads."""

    manifest: Manifest
    tables: Mapping[str, pa.Table]
    architecture: Architecture
    """Of the model that was scanned."""
    job_url: str
    """Address of the job, without a trailing slash: URLs of tables and tensors begin with it."""

    def shared(self, main: pa.Table) -> dict[str, Any]:
        """The fields of `SummaryBase`; unit and method are those of the `main` table."""
        manifest = self.manifest
        return {
            "model": manifest.model,
            "prompt_tokens": manifest.prompt_tokens,
            "metadata": _metadata(manifest, main),
            "tables": {
                ref.name: TableLink(
                    table=ref.table,
                    unit=ref.unit,
                    rows=ref.rows,
                    bytes=ref.bytes,
                    data_url=f"{self.job_url}/result/{ref.name}",
                )
                for ref in manifest.tables
            },
        }


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


def rows(table: pa.Table, *names: str) -> Iterator[tuple[Any, ...]]:
    """Those columns, row by row."""
    return zip(*(table.column(name).to_pylist() for name in names), strict=True)


def numbers(table: pa.Table, name: str) -> list[Any]:
    """A column of numbers, none of them absent: ten times as fast as one by one, of thousands of rows."""
    found: list[Any] = table.column(name).to_numpy().tolist()
    return found


def values_over_tokens(table: pa.Table) -> Iterator[Values]:
    """The `value` column of a table with a row a component, row by row."""
    column = table.column("value").combine_chunks()
    flat: list[float] = column.flatten().to_numpy().tolist()
    width: int = column.type.list_size
    return (tuple(flat[at : at + width]) for at in range(0, len(flat), width))


def records(table: pa.Table) -> list[dict[str, Any]]:
    """The rows, a column's value by its name."""
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def only(table: pa.Table, column: str, value: Any) -> pa.Table:
    """The rows whose column has that value."""
    return table.filter(pc.equal(table.column(column), value))


def absent(number: Any) -> int | None:
    """Tables write -1 for a number that a component does not have."""
    return None if number < 0 else int(number)
