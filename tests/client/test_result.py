"""A result's numbers are those that were stored, under their right names, or an error."""

import hashlib
import subprocess
import sys

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from neural_mri.client import Client, Damaged, Result
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.results import TableRef, from_ipc, provenance_of
from neural_mri.contract.scans import ActivationScan, AttentionScan, Scan, ScanKind, StructuralScan
from tests.client.specimens import ARCHITECTURE, TOKENS, activations, pattern, value_of
from tests.client.wire import Wire

N_TOKENS = len(TOKENS)


@pytest.fixture
def scanned(client: Client) -> Result:
    return client.scan_activation("The Eiffel Tower is in")


def test_a_table_is_fetched_once_and_is_what_was_stored(wire: Wire, scanned: Result) -> None:
    stored = wire.jobs[scanned.job_id].stored
    assert stored is not None
    assert scanned.table().equals(from_ipc(stored.chunks["activations"]), check_metadata=True)
    assert scanned.table("activations") is scanned.table()
    assert scanned.arrow() == stored.chunks["activations"]
    assert wire.paths().count(f"/api/jobs/{scanned.job_id}/result/activations") == 1


def test_bytes_that_are_not_the_manifests_are_refused(wire: Wire, scanned: Result) -> None:
    stored = wire.jobs[scanned.job_id].stored
    assert stored is not None
    body = bytearray(stored.chunks["activations"])
    body[len(body) // 2] ^= 1
    wire.jobs[scanned.job_id].stored = stored._replace(chunks={"activations": bytes(body)})
    with pytest.raises(Damaged, match="its manifest names"):
        scanned.table()


def test_a_cut_off_table_is_refused(wire: Wire, scanned: Result) -> None:
    stored = wire.jobs[scanned.job_id].stored
    assert stored is not None
    short = stored.chunks["activations"][:-100]
    wire.jobs[scanned.job_id].stored = stored._replace(chunks={"activations": short})
    with pytest.raises(Damaged, match="SHA-256"):
        scanned.arrow()


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (pa.table({"value": [1.0]}), "has no neural_mri metadata"),
        ("predictions", "holds predictions"),
        (None, "cannot be read"),
    ],
    ids=["no provenance", "another table", "no Arrow at all"],
)
def test_a_table_that_says_it_is_something_else_is_refused(
    wire: Wire, client: Client, other: pa.Table | str | None, complaint: str
) -> None:
    job = wire.submit(ActivationScan(prompt="a"))
    assert job.stored is not None
    if isinstance(other, str):
        body = job.stored.chunks[other]
    elif other is None:
        body = b"not Arrow"
    else:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, other.schema) as writer:
            writer.write_table(other)
        body = bytes(sink.getvalue())
    refs: list[TableRef] = [
        msgspec.structs.replace(ref, chunk=hashlib.sha256(body).hexdigest())
        if ref.name == "activations"
        else ref
        for ref in job.stored.manifest.tables
    ]
    manifest = msgspec.structs.replace(job.stored.manifest, tables=tuple(refs))
    job.stored = job.stored._replace(manifest=manifest, chunks={"activations": body})
    with pytest.raises(Damaged, match=complaint):
        client.result(client.wait(job.view)).table()


def test_a_table_the_result_does_not_have_is_named(scanned: Result) -> None:
    with pytest.raises(ValueError, match=r"'vectors'.*activations, tokens, predictions"):
        scanned.table("vectors")


def test_the_long_form_has_a_row_for_every_component_and_token(scanned: Result) -> None:
    long = scanned.to_long()
    assert long.column_names == [
        "component", "kind", "layer", "head", "position", "token", "value",
    ]  # fmt: skip
    assert len(long) == len(scanned.table()) * N_TOKENS
    for row in long.to_pylist()[::7]:
        component = Component.parse(row["component"])
        assert row["kind"] == component.kind.value
        assert row["layer"] == (-1 if component.layer is None else component.layer)
        assert row["token"] == TOKENS[row["position"]]
        assert row["value"] == value_of(component, row["position"])
    assert provenance_of(long).unit == "L2 norm"


def test_the_long_form_keeps_the_positions_that_were_asked_for(client: Client) -> None:
    long = client.scan_activation("a", layers=["blocks.1.mlp"], token_positions=[-1, 1]).to_long()
    assert long.select(["position", "token", "value"]).to_pylist() == [
        {"position": at, "token": TOKENS[at], "value": value_of(Component(Kind.MLP, 1), at)}
        for at in (1, 4)
    ]


def test_the_data_frame_is_the_long_form(scanned: Result) -> None:
    frame = scanned.to_pandas()
    assert list(frame.columns) == scanned.to_long().column_names
    hottest = frame[(frame.kind == "head") & (frame.position == 4)].sort_values("value").iloc[-1]
    assert hottest.component == "blocks.3.attn.head_2"


def test_the_polars_frame_is_the_long_form(client: Client) -> None:
    polars = pytest.importorskip("polars")
    results = [
        client.scan_activation("a"),
        client.scan_structural(),
        client.scan_weights(),
        client.scan_circuits("a"),
        client.scan_attention("a", layers=[0]),
    ]
    for result in results:
        frame, long = result.to_polars(), result.to_long()
        assert isinstance(frame, polars.DataFrame)
        assert frame.columns == long.column_names
        assert repr(frame.to_dicts()) == repr(long.to_pylist())  # NaN among them
    hottest = (
        results[0].to_polars().filter(kind="head", position=4).sort("value").row(-1, named=True)
    )
    assert hottest["component"] == "blocks.3.attn.head_2"


@pytest.mark.parametrize(
    ("library", "method", "extra"),
    [
        ("pandas", "to_pandas", "plot"),
        ("polars", "to_polars", "polars"),
        ("matplotlib", "plot", "plot"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    library: str, method: str, extra: str
) -> None:
    program = f"""
import sys
class Absent:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] == "{library}":
            raise ModuleNotFoundError(name, name="{library}")
sys.meta_path.insert(0, Absent)
from uuid import UUID
from neural_mri.client import MissingExtra, Result
from neural_mri.client.exchange import Exchange
from neural_mri.contract.scans import ActivationScan
from tests.client.specimens import specimen
exchange = Exchange("http://127.0.0.1:9", timeout_seconds=1, patience_seconds=1, headers=dict())
result = Result(exchange, UUID(int=7), specimen(ActivationScan(prompt="a")).manifest)
try:
    result.{method}()
except MissingExtra as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert library in said
    assert f"pip install 'neural-mri[{extra}]'" in said


def test_activations_are_an_array_with_names(scanned: Result) -> None:
    scan = scanned.activations()
    assert scan.values.shape == (len(scan.components), N_TOKENS)
    assert scan.tokens == TOKENS
    assert scan.sinks.tolist() == [True, False, False, False, False]
    row = scan.components.index(Component.head(2, 1))
    assert scan.values[row, 3] == value_of(Component.head(2, 1), 3)


def test_the_hottest_components_come_in_order_of_their_values(scanned: Result) -> None:
    scan = scanned.activations()
    assert [r.component for r in scan.hottest(Kind.MLP, 2)] == [
        Component(Kind.MLP, 3),
        Component(Kind.MLP, 2),
    ]
    heads = scan.hottest(Kind.HEAD, 100, position=2)
    assert len(heads) == ARCHITECTURE.n_layers * ARCHITECTURE.n_heads
    assert [r.value for r in heads] == sorted((r.value for r in heads), reverse=True)


def test_the_grid_has_a_row_a_head_and_one_for_the_mlp(scanned: Result) -> None:
    grid = scanned.activations().grid(position=1)
    assert grid.rows == ("H0", "H1", "H2", "MLP")
    assert grid.layers == (0, 1, 2, 3)
    assert grid.values[2, 3] == value_of(Component.head(3, 2), 1)
    assert grid.values[3, 0] == value_of(Component(Kind.MLP, 0), 1)


def test_what_was_not_measured_is_nan_in_the_grid(client: Client) -> None:
    chosen = ["blocks.1.attn.head_2", "blocks.3.mlp"]
    grid = client.scan_activation("a", layers=chosen).activations().grid()
    assert grid.layers == (1, 3)
    assert np.isfinite(grid.values).tolist() == [
        [False, False], [False, False], [True, False], [False, True],
    ]  # fmt: skip


def test_a_position_that_was_not_reported_is_refused(client: Client) -> None:
    scan = client.scan_activation("a", token_positions=[1, 3]).activations()
    assert (scan.column(3), scan.column(-1), scan.column(-2)) == (1, 1, 0)
    with pytest.raises(ValueError, match="position 2 was not reported"):
        scan.column(2)


def test_the_sink_does_not_move_the_colour_limits(scanned: Result) -> None:
    scan = scanned.activations()
    assert float(scan.values.max()) > 500
    assert scan.scale().high < 50


def test_a_prompt_of_nothing_but_a_sink_still_has_limits(client: Client) -> None:
    scan = client.scan_activation("a", token_positions=[0]).activations()
    assert scan.scale().high > 500


def test_predictions_come_likeliest_first(scanned: Result) -> None:
    assert [p.text for p in scanned.predictions()] == [" Paris", " France", "\x1b[2J"]
    assert scanned.predictions(0)[0].probability == pytest.approx(0.7)


def test_predictions_are_asked_for_by_the_positions_that_were_reported(client: Client) -> None:
    result = client.scan_activation("a", token_positions=[1, 3])
    assert result.predictions(-1) == result.predictions() == result.predictions(3)
    assert result.predictions(-2) == result.predictions(1)
    for position in (2, -3):
        with pytest.raises(ValueError, match=f"position {position} was not reported: .*1, 3"):
            result.predictions(position)


def test_the_summary_is_the_services_own(scanned: Result) -> None:
    assert scanned.summary() == {"model": "tiny", "prompt_tokens": list(TOKENS)}


def test_attention_is_scanned_when_asked_for(wire: Wire, scanned: Result) -> None:
    np.testing.assert_array_equal(scanned.attention(2), pattern(2))
    np.testing.assert_array_equal(scanned.attention(2, head=1), pattern(2)[1])
    with pytest.raises(ValueError, match="head 3 does not exist"):
        scanned.attention(2, head=3)
    assert len(wire.jobs) == 4


def test_attention_that_was_scanned_is_read_from_the_result(wire: Wire, client: Client) -> None:
    result = client.scan_attention("a", layers=[0, 3])
    assert result.attention_layers == (0, 3)
    np.testing.assert_array_equal(result.attention(3), pattern(3))
    assert not any("attention/3" in path for path in wire.paths())


def test_attention_in_long_form_has_a_row_for_every_pair_a_causal_model_reads(
    client: Client,
) -> None:
    long = client.scan_attention("a", layers=[1, 2]).to_long()
    assert len(long) == 2 * ARCHITECTURE.n_heads * N_TOKENS * (N_TOKENS + 1) // 2
    for row in long.to_pylist():
        assert row["key"] <= row["query"]
        assert row["key_token"] == TOKENS[row["key"]]
        assert row["value"] == pattern(row["layer"])[row["head"], row["query"], row["key"]]


def test_a_structural_scan_is_in_long_form_already(client: Client) -> None:
    result = client.scan_structural()
    assert result.kind is ScanKind.T1
    assert result.to_long() is result.table("topology")


def test_the_notebook_shows_a_result_without_running_anything_from_it(scanned: Result) -> None:
    page = scanned._repr_html_()
    assert "fMRI · tiny" in page
    assert "L3 H2" in page
    assert "␣Paris" in page
    assert "<script" not in page
    assert "\x1b" not in page


def test_text_in_a_notebook_is_escaped(client: Client) -> None:
    result = client.scan_attention("a", layers=[0])
    result.manifest = msgspec.structs.replace(
        result.manifest, prompt_tokens=("<img src=x onerror=alert(1)>",), model="<b>"
    )
    assert "<img" not in result._repr_html_()
    assert "<b>&lt;b&gt;" not in result._repr_html_().replace("<b>attention · ", "")


def test_a_notebook_shows_a_sentence_when_the_tables_cannot_be_had(
    wire: Wire, scanned: Result
) -> None:
    stored = wire.jobs[scanned.job_id].stored
    assert stored is not None
    wire.jobs[scanned.job_id].stored = stored._replace(chunks={"activations": b"?"})
    assert "its manifest names" in scanned._repr_html_()


def test_a_notebook_shows_a_sentence_after_the_client_is_closed(wire: Wire) -> None:
    with Client(wire.url) as client:
        results = [client.scan_activation("a"), client.scan_structural()]
    for result in results:
        page = result._repr_html_()
        assert result.title in page
        assert "the tables cannot be had: " in page
        assert "closed" in page


@pytest.mark.parametrize(
    "scan",
    [StructuralScan(), AttentionScan(prompt="a", layers=(1,)), ActivationScan(prompt="a")],
)
def test_every_scan_can_be_shown_in_a_notebook(client: Client, scan: Scan) -> None:
    result = client.run(scan)
    assert result._repr_html_().startswith("<div")
    assert repr(result).startswith(f"<Result of {result.kind.value} on tiny")


def test_positions_are_those_of_the_provenance(client: Client) -> None:
    table = activations((Component(Kind.MLP, 0),), (1, 4))
    assert provenance_of(table).positions == (1, 4)
    assert client.scan_activation("a", token_positions=[4, 1]).activations().positions == (1, 4)
