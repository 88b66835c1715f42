"""Tables and manifests."""

import math
from datetime import UTC, datetime
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.components import Component
from neural_mri.contract.models import Numerics
from neural_mri.contract.results import (
    SCHEMAS,
    Manifest,
    Provenance,
    TableRef,
    build,
    component_columns,
    from_ipc,
    positions_column,
    provenance_of,
    stamp,
    to_ipc,
)
from neural_mri.contract.scans import ScanKind
from tests.contract.strategies import components

FLOATS = st.floats(width=32)


def value_of(field: pa.DataType) -> st.SearchStrategy[Any]:
    """What a column of that type can hold."""
    if pa.types.is_integer(field):
        bits = field.bit_width
        signed = pa.types.is_signed_integer(field)
        return (
            st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if signed
            else st.integers(0, 2**bits - 1)
        )
    if pa.types.is_floating(field):
        return FLOATS
    if pa.types.is_boolean(field):
        return st.booleans()
    if pa.types.is_list(field):
        return st.lists(value_of(field.value_type), max_size=3)
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def tables(draw: st.DrawFn, name: str) -> pa.Table:
    rows = draw(st.integers(0, 4))
    columns = {
        field.name: pa.array(
            draw(st.lists(value_of(field.type), min_size=rows, max_size=rows)), field.type
        )
        for field in SCHEMAS[name].fields
    }
    width = draw(st.integers(1, 5))
    flat = draw(st.lists(FLOATS, min_size=rows * width, max_size=rows * width))
    value = draw(st.sampled_from([None, positions_column(pa.array(flat, pa.float32()), width)]))
    return stamp(build(name, columns, value), provenance(name))


def provenance(name: str, **changes: Any) -> Provenance:
    fields: dict[str, Any] = {
        "table": name,
        "version": str(SCHEMAS[name].version),
        "unit": "L2 norm",
        "method": "norm of hook_z W_O",
        "positions": (0, 2),
        "model": "tiny",
        "revision": "a" * 64,
    }
    return Provenance(**{**fields, **changes})


def bits(table: pa.Table) -> bytes:
    """Every value of a table, NaN payloads and signs of zero included."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    body: bytes = sink.getvalue().to_pybytes()
    return body


@pytest.mark.parametrize("name", SCHEMAS)
@given(data=st.data())
def test_a_table_reads_back_bit_for_bit(name: str, data: st.DataObject) -> None:
    table = data.draw(tables(name))
    read = from_ipc(to_ipc(table))
    assert read.schema.equals(table.schema, check_metadata=True)
    assert bits(read) == bits(table)
    assert provenance_of(read) == provenance(name)


@pytest.mark.parametrize("name", SCHEMAS)
def test_columns_that_pictures_are_painted_from_are_float32_and_not_null(name: str) -> None:
    for field in SCHEMAS[name].fields:
        assert not field.nullable
        assert field.type not in (pa.float16(), pa.float64(), pa.int64(), pa.uint64())


def test_not_measured_is_nan_and_stays_it() -> None:
    field, column = positions_column(pa.array([math.nan, 1.0], pa.float32()), 2)
    table = pa.table([column], schema=pa.schema([field]))
    (row,) = from_ipc(to_ipc(table)).column("value").to_pylist()
    assert math.isnan(row[0])
    assert row[1] == 1.0


@given(st.lists(components(), max_size=6))
def test_component_columns_name_what_they_were_made_from(places: list[Component]) -> None:
    # int16 holds the layers and heads of any model; larger numbers are no model's.
    places = [place for place in places if max(place.layer or 0, place.index or 0) < 2**15]
    columns = component_columns(places)
    assert [Component.parse(text) for text in columns["component"].to_pylist()] == places
    assert [None if layer < 0 else layer for layer in columns["layer"].to_pylist()] == [
        place.layer for place in places
    ]


def test_a_newer_major_version_is_refused_instead_of_guessed() -> None:
    major = SCHEMAS["tokens"].version.major
    table = pa.table({"position": pa.array([0], pa.int32())})
    same = stamp(table, provenance("tokens", version=f"{major}.99"))
    assert provenance_of(same).version == f"{major}.99"
    with pytest.raises(ValueError, match="upgrade"):
        provenance_of(stamp(table, provenance("tokens", version=f"{major + 1}.0")))
    with pytest.raises(ValueError, match="no such table"):
        provenance_of(stamp(table, provenance("tokens", table="entrails")))
    with pytest.raises(ValueError, match="not a scan's"):
        provenance_of(table)


@given(st.data())
def test_damaged_bytes_are_never_read_as_another_table(data: st.DataObject) -> None:
    """Cut anywhere, a file is refused: its footer names what it holds."""
    body = to_ipc(data.draw(tables("predictions")))
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(pa.ArrowInvalid):
        from_ipc(body[:cut])


def test_a_manifest_reads_back_and_finds_its_tables() -> None:
    manifest = Manifest(
        scan_key="c" * 64,
        kind=ScanKind.FMRI,
        model="tiny",
        revision="a" * 64,
        numerics=Numerics(),
        scanner_version="1",
        request={"scan_mode": "fMRI", "prompt": "a"},
        prompt_tokens=("a",),
        tables=(
            TableRef(
                name="vectors.3",
                table="vectors",
                chunk="d" * 64,
                bytes=640,
                rows=2,
                unit="activation",
            ),
        ),
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        forward_seconds=0.25,
        compute_seconds=0.5,
        memory_bytes=10,
    )
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest
    assert manifest.table("vectors.3") is manifest.tables[0]
    assert manifest.table("vectors") is None
