"""Archives: the same content is the same bytes, and no changed byte goes unnoticed."""

import hashlib
import io
import zipfile
from datetime import UTC, datetime

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.archives import (
    InvalidArchive,
    canonical,
    chunk_entry,
    open_archive,
    result_digest,
    result_entry,
    write_archive,
)
from neural_mri.contract.models import Numerics
from neural_mri.contract.results import (
    SCHEMAS,
    Manifest,
    Provenance,
    TableRef,
    build,
    positions_column,
    stamp,
    to_ipc,
)
from neural_mri.contract.scans import ScanKind
from neural_mri.contract.sessions import SavedScan, SessionDocument


def table(value: float) -> bytes:
    columns = {
        "component": pa.array(["embed"]),
        "kind": pa.array(["embed"]),
        "layer": pa.array([-1], pa.int16()),
        "head": pa.array([-1], pa.int16()),
    }
    made = build("activations", columns, positions_column(pa.array([value], pa.float32()), 1))
    version = str(SCHEMAS["activations"].version)
    provenance = Provenance(table="activations", version=version, unit="L2 norm", method="by hand")
    return to_ipc(stamp(made, provenance))


def manifest(*bodies: bytes) -> bytes:
    refs = tuple(
        TableRef(
            name=f"activations.{index}",
            table="activations",
            chunk=hashlib.sha256(body).hexdigest(),
            bytes=len(body),
            rows=1,
            unit="L2 norm",
        )
        for index, body in enumerate(bodies)
    )
    made = Manifest(
        scan_key="0" * 64,
        kind=ScanKind.FMRI,
        model="tiny",
        revision="1" * 64,
        numerics=Numerics(),
        scanner_version="1",
        request={"prompt": "a"},
        tables=refs,
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        forward_seconds=0.5,
        compute_seconds=0.5,
        memory_bytes=1,
    )
    return msgspec.json.encode(made)


def document(*results: bytes) -> bytes:
    scans = tuple(
        SavedScan(
            result=result_digest(result),
            scan_key="0" * 64,
            kind=ScanKind.FMRI,
            model="tiny",
            revision="1" * 64,
            request={"prompt": "a"},
        )
        for result in results
    )
    return canonical(SessionDocument(scans=scans))


FIRST, SECOND = table(1.5), table(2.5)
RESULT = manifest(FIRST, SECOND)


def whole(*, reverse: bool = False) -> bytes:
    entries = [
        result_entry(RESULT),
        *(
            chunk_entry(hashlib.sha256(body).hexdigest(), len(body), lambda body=body: body)  # type: ignore[misc]
            for body in (FIRST, SECOND)
        ),
    ]
    ordered = entries[::-1] if reverse else entries
    return b"".join(write_archive(ordered, name="Eiffel", document=document(RESULT)))


def read(body: bytes) -> tuple[str, bytes, list[bytes]]:
    archive = open_archive(io.BytesIO(body), largest=10**7)
    chunks = [archive.chunk(chunk) for chunk in archive.chunks()]
    return archive.name, archive.document(), chunks


def test_what_was_written_reads_back_and_equal_content_is_equal_bytes() -> None:
    assert whole() == whole(reverse=True)
    name, said, chunks = read(whole())
    assert (name, said) == ("Eiffel", document(RESULT))
    assert sorted(chunks) == sorted((FIRST, SECOND))
    with zipfile.ZipFile(io.BytesIO(whole())) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


WHOLE = whole()


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_changed_byte_changes_nothing_or_is_refused(place: int, change: int) -> None:
    body = bytearray(WHOLE)
    body[place] ^= change
    try:
        found = read(bytes(body))
    except InvalidArchive:
        return
    assert found == read(WHOLE), "what zip keeps twice, or for show, may differ"


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_ends_early_is_refused(end: int) -> None:
    with pytest.raises(InvalidArchive):
        read(WHOLE[:end])


@given(st.binary(max_size=2000))
def test_what_is_no_archive_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidArchive):
        read(body)


def test_bytes_that_are_not_those_an_entry_names_are_not_written() -> None:
    entry = chunk_entry("0" * 64, 3, lambda: b"abc")
    with pytest.raises(ValueError, match="not those that it names"):
        list(write_archive([entry]))


def test_a_file_over_the_bound_is_refused_by_the_entry_that_breaks_it() -> None:
    with pytest.raises(InvalidArchive, match="in all") as refused:
        open_archive(io.BytesIO(WHOLE), largest=len(FIRST))
    assert refused.value.members["entry"]


def test_a_table_that_no_result_names_or_that_lies_of_itself_is_refused() -> None:
    def sent(*bodies: bytes, result: bytes) -> bytes:
        entries = [
            chunk_entry(hashlib.sha256(body).hexdigest(), len(body), lambda body=body: body)  # type: ignore[misc]
            for body in bodies
        ]
        return b"".join(write_archive([result_entry(result), *entries], document=document(result)))

    with pytest.raises(InvalidArchive, match="no result's table"):
        read(sent(FIRST, SECOND, result=manifest(FIRST)))
    with pytest.raises(InvalidArchive, match="and missing"):
        read(sent(FIRST, result=RESULT))
    with pytest.raises(InvalidArchive, match="cannot be read"):
        read(sent(b"no table", result=manifest(b"no table")))
    lying = manifest(FIRST).replace(b'"table":"activations"', b'"table":"percentile"')
    with pytest.raises(InvalidArchive, match="says it holds 'activations'"):
        read(sent(FIRST, result=lying))
