"""Requests."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import InvalidPositions, UnknownComponent, Unprocessable
from neural_mri.contract.scans import (
    ActivationScan,
    Scan,
    decode_scan,
    encode_scan,
    kind_of,
    reporting_order,
    resolve_positions,
)
from tests.contract.strategies import architectures, scans


@given(scans())
def test_a_request_reads_back_as_it_was_written(scan: Scan) -> None:
    stored = encode_scan(scan)
    assert decode_scan(stored) == scan
    assert encode_scan(decode_scan(stored)) == stored


@given(scans())
def test_a_stored_request_says_what_it_is_and_every_default(scan: Scan) -> None:
    document = msgspec.json.decode(encode_scan(scan))
    assert document.pop("scan_mode") == kind_of(scan)
    assert set(document) == {field.name for field in msgspec.structs.fields(scan)}


@given(scans(), st.text(min_size=1).filter(lambda name: name != "scan_mode"))
def test_an_unknown_field_is_refused(scan: Scan, name: str) -> None:
    document = msgspec.json.decode(encode_scan(scan))
    if name in document:
        return
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({**document, name: 1}, type(scan))


@pytest.mark.parametrize("prompt", ["", "a\0b", "\ud800", "x" * 200_001])
def test_a_prompt_that_no_tokenizer_should_see_is_refused(prompt: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"prompt": prompt}, ActivationScan)


@given(architecture=architectures(), include_residual=st.booleans())
def test_all_means_every_component_with_or_without_the_residual_stream(
    architecture: Architecture, *, include_residual: bool
) -> None:
    scan = ActivationScan(prompt="a", include_residual=include_residual)
    selected = scan.selected(architecture)
    assert set(architecture.nodes()) <= set(selected)
    assert any(component.kind.is_residual for component in selected) == include_residual


@given(architectures(), st.data())
def test_a_selection_comes_in_reading_order_each_once_and_brings_its_heads(
    architecture: Architecture, data: st.DataObject
) -> None:
    order = reporting_order(architecture)
    wanted = data.draw(st.lists(st.sampled_from(order), min_size=1, max_size=5))
    selected = ActivationScan(prompt="a", layers=tuple(map(str, wanted))).selected(architecture)
    assert list(selected) == [component for component in order if component in selected]
    assert set(wanted) <= set(selected)
    brought = {
        Component.head(component.layer, head)
        for component in wanted
        if component.kind is Kind.ATTN and component.layer is not None
        for head in range(architecture.n_heads)
    }
    assert set(selected) == set(wanted) | brought


@given(architectures())
def test_a_selection_beyond_the_model_is_refused(architecture: Architecture) -> None:
    beyond = ActivationScan(prompt="a", layers=(f"blocks.{architecture.n_layers}.mlp",))
    with pytest.raises(UnknownComponent):
        beyond.selected(architecture)
    with pytest.raises(Unprocessable, match="top_neurons"):
        ActivationScan(prompt="a", layers=("blocks.0.mlp.neuron_0",)).selected(architecture)


@given(st.integers(1, 50), st.data())
def test_positions_count_from_either_end_and_come_in_order(
    n_tokens: int, data: st.DataObject
) -> None:
    wanted = data.draw(st.lists(st.integers(-n_tokens, n_tokens - 1), min_size=1, max_size=9))
    resolved = resolve_positions(tuple(wanted), n_tokens)
    assert resolved == tuple(sorted({range(n_tokens)[position] for position in wanted}))
    assert resolve_positions("all", n_tokens) == tuple(range(n_tokens))


@given(st.integers(1, 50), st.data())
def test_a_position_outside_the_prompt_is_refused_by_number(
    n_tokens: int, data: st.DataObject
) -> None:
    outside = data.draw(st.integers(n_tokens, 10_000) | st.integers(-10_000, -n_tokens - 1))
    with pytest.raises(InvalidPositions) as refusal:
        resolve_positions((0, outside), n_tokens)
    assert refusal.value.members == {"position": outside, "n_tokens": n_tokens}
