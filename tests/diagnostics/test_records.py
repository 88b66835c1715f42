"""Records: what was measured, under a key that says of what."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from neural_mri.client import local
from neural_mri.client.diagnosing import recorded
from neural_mri.contract.baselines import record_key
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import Gone
from neural_mri.contract.scans import Scan
from neural_mri.contract.suites import Measure, Suite
from neural_mri.diagnostics import Record, Records, Scanned, diagnose
from neural_mri.diagnostics.records import Quantity, default_folder
from tests.diagnostics.making import InProcess


def differences(one: Record, other: Record) -> list[str]:
    """In which of its fields, or blocks' fields, a record is not the other."""
    fields = ("subject", "suite", "suite_version", "suite_digest", "set_aside", "scan_keys")
    found = [name for name in (*fields, "seconds") if getattr(one, name) != getattr(other, name)]
    for blocks, others in ((one.blocks, other.blocks), (one.noise, other.noise)):
        if list(blocks) != list(others):
            return [*found, "quantities"]
        for quantity, block in blocks.items():
            same = np.array_equal(block.values, others[quantity].values, equal_nan=True)
            if not same or block[:2] != others[quantity][:2]:
                found.append(quantity.name)
    return found


def without_digest(body: bytes) -> bytes:
    """A record as earlier versions wrote it."""
    with pa.ipc.open_file(body) as reader:
        table = reader.read_all()
    kept = {name: told for name, told in table.schema.metadata.items() if b"sha256" not in name}
    assert len(kept) == len(table.schema.metadata) - 1
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema.with_metadata(kept)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def test_a_record_is_read_as_it_was_written(baseline: Record) -> None:
    body = baseline.to_bytes()
    assert differences(baseline, Record.from_bytes(body)) == []
    assert differences(baseline, Record.from_bytes(without_digest(body))) == []


def test_every_measure_is_there_for_every_prompt(suite: Suite, baseline: Record) -> None:
    assert {quantity.measure for quantity in baseline.blocks} == set(Measure)
    norms = baseline.blocks[Quantity(Measure.NORMS, "l2_norm")]
    assert len(norms.prompts) == suite.n_items
    assert norms.components[:2] == ("embed", "blocks.0.attn.head_0")
    assert norms.components[-1] == "unembed"
    assert np.isfinite(norms.values).all()
    again = baseline.noise[Quantity(Measure.NORMS, "l2_norm")]
    assert len(again.prompts) == suite.noise_prompts
    # What follows a prompt does not change what is computed at it, but for rounding.
    assert again.values == pytest.approx(norms.rows(again.prompts), rel=1e-5)


def test_the_key_changes_with_everything_that_changes_a_number_and_not_with_the_name(
    baseline: Record,
) -> None:
    subject = baseline.subject
    key = record_key(subject, baseline.suite_digest, with_noise=True)
    assert key == baseline.key
    renamed = msgspec.structs.replace(subject, model="another")
    assert record_key(renamed, baseline.suite_digest, with_noise=True) == key
    for field, value in (
        ("revision", "0" * 64),
        ("tokenizer_digest", "0" * 64),
        ("numerics", Numerics(dtype="bfloat16")),
        ("scanner_version", "0"),
    ):
        other = msgspec.structs.replace(subject, **{field: value})
        assert record_key(other, baseline.suite_digest, with_noise=True) != key
    assert record_key(subject, "0" * 64, with_noise=True) != key
    assert record_key(subject, baseline.suite_digest, with_noise=False) != key


def test_records_are_kept_whole_and_damaged_ones_are_refused(
    baseline: Record, tmp_path: Path
) -> None:
    records = Records(tmp_path / "new" / "folder")
    assert records.get(baseline.key) is None
    key = records.put(baseline)
    assert key == baseline.key
    found = records.get(key)
    assert found is not None
    assert found.key == key
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"{key}.arrow"]
    records.path("f" * 64).write_bytes(records.path(key).read_bytes())
    with pytest.raises(Gone, match="another record"):
        records.get("f" * 64)
    records.path(key).write_bytes(records.path(key).read_bytes()[:-100])
    with pytest.raises(Gone, match="damaged"):
        records.get(key)


def test_one_bit_changed_anywhere_is_refused_or_changes_nothing(
    baseline: Record, tmp_path: Path
) -> None:
    records = Records(tmp_path)
    key = records.put(baseline)
    whole = records.path(key).read_bytes()
    places = range(0, len(whole), 50)
    refused: list[str] = []
    for place in places:
        body = bytearray(whole)
        body[place] ^= 1 << place % 8
        records.path(key).write_bytes(body)
        try:
            found = records.get(key)
        except Gone as gone:
            refused.append(gone.detail)
        else:
            assert found is not None
            assert differences(baseline, found) == [], place
    assert len(refused) > len(places) / 2, "most of its bytes are numbers"
    assert all(str(records.path(key)) in detail for detail in refused)


def test_a_damaged_record_is_noted_and_measured_anew(
    suite: Suite, baseline: Record, tiny_folder: Path, tmp_path: Path
) -> None:
    records = Records(tmp_path / "records")
    place = records.path(records.put(baseline))
    place.write_bytes(place.read_bytes()[:-100])
    scans = InProcess(tiny_folder, tmp_path / "store")
    said: list[str] = []
    found, seconds = recorded(suite, scans, records, with_noise=True, on_note=said.append)
    assert seconds > 0
    assert differences(found, baseline) == ["seconds"]
    [sentence] = said
    assert sentence.startswith(f"{place} is damaged")
    assert recorded(suite, scans, records, with_noise=True)[1] == 0.0
    place.write_bytes(b"")
    with pytest.warns(UserWarning, match="counts as not measured"):
        recorded(suite, scans, records, with_noise=False)


def test_of_a_candidate_that_becomes_a_baseline_only_the_noise_is_measured(
    suite: Suite, baseline: Record, tiny_folder: Path, tmp_path: Path
) -> None:
    records = Records(tmp_path / "records")
    asked: list[Scan] = []

    class Counted(InProcess):
        def scan(self, scans: Sequence[Scan]) -> Iterator[Scanned]:
            asked.extend(scans)
            return super().scan(scans)

    scans = Counted(tiny_folder, tmp_path / "store")
    first, _ = recorded(suite, scans, records, with_noise=False)
    n_first = len(asked)
    found, _ = recorded(suite, scans, records, with_noise=True)
    # Calibrated again; each of the prompts read with what follows, and its attributions taken twice.
    assert len(asked) - n_first == 1 + (3 + 2) * suite.noise_prompts
    assert found.key == baseline.key
    assert (found.scan_keys, set(found.noise)) == (baseline.scan_keys, set(baseline.noise))
    for quantity, block in first.blocks.items():
        assert np.array_equal(found.blocks[quantity].values, block.values, equal_nan=True)
    assert diagnose(suite, baseline, found).passed
    assert recorded(suite, scans, records, with_noise=False)[1] == 0.0


def test_where_records_are_kept_is_the_callers_to_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NMRI_BASELINES", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("NMRI_BASELINES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "neural-mri" / "baselines"


def test_a_checkpoint_that_was_seen_before_is_known_by_its_contents(
    baseline: Record, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_tree", lambda: pytest.fail("a process was started"))
    records = Records(tmp_path)
    contents = local._contents(tiny_folder)
    assert contents is not None
    records.remember(contents, baseline.subject)
    with local.LocalScans(str(tiny_folder), records=records) as scans:
        assert scans.subject == baseline.subject
    moved = tmp_path / "a name with spaces"
    shutil.copytree(tiny_folder, moved)
    with local.LocalScans(str(moved), records=records) as scans:
        assert scans.subject.revision == baseline.subject.revision
        assert scans.subject.model == "a-name-with-spaces"
    kept = next(tmp_path.glob("*.subject.json"))
    whole = kept.read_bytes()
    for damaged in (whole.replace(b'"n_layers":', b'"n_layers":1'), b'{"model":"\xff"}', b"{}"):
        assert damaged != whole
        kept.write_bytes(damaged)
        assert records.subject(contents) is None
    kept.write_bytes(msgspec.json.encode(baseline.subject))  # as earlier versions wrote it
    assert records.subject(contents) == baseline.subject
    (moved / "config.json").write_text("{}")
    assert local._contents(moved) != contents
    assert local._contents(tmp_path / "smollm2-135m-instruct") is None
