"""Shapes of models."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture, ModelRequest
from neural_mri.contract.problems import UnknownComponent
from neural_mri.contract.scans import reporting_order
from tests.contract.strategies import architectures


@given(architectures())
def test_a_shape_reads_back_as_it_was_written(architecture: Architecture) -> None:
    body = msgspec.json.encode(architecture)
    assert msgspec.json.decode(body, type=Architecture) == architecture


@given(architectures())
def test_every_node_and_every_reported_component_exists(architecture: Architecture) -> None:
    for component in (*architecture.nodes(), *reporting_order(architecture)):
        assert architecture.check(component) is component


@given(architectures())
def test_nodes_are_a_part_of_what_is_reported_and_none_comes_twice(
    architecture: Architecture,
) -> None:
    nodes, reported = list(architecture.nodes()), reporting_order(architecture)
    assert len(set(nodes)) == len(nodes) == 2 + architecture.n_layers * (architecture.n_heads + 1)
    assert len(set(reported)) == len(reported)
    assert set(nodes) <= set(reported)


@given(architectures())
def test_query_heads_share_key_value_heads_evenly(architecture: Architecture) -> None:
    groups = [architecture.kv_head(head) for head in range(architecture.n_heads)]
    assert groups == sorted(groups)
    assert set(groups) == set(range(architecture.n_kv_heads))
    assert len({groups.count(group) for group in groups}) == 1


@given(architectures(), st.data())
def test_what_lies_beyond_the_model_is_refused_with_its_address(
    architecture: Architecture, data: st.DataObject
) -> None:
    beyond = data.draw(
        st.sampled_from(
            [
                Component(Kind.MLP, architecture.n_layers),
                Component.head(0, architecture.n_heads),
                Component.neuron(architecture.n_layers - 1, architecture.d_mlp),
            ]
        )
    )
    with pytest.raises(UnknownComponent) as refusal:
        architecture.check(beyond)
    assert refusal.value.members == {"component": str(beyond)}
    assert "0 to" in refusal.value.detail


@given(architectures())
def test_parallel_blocks_have_no_middle_residual(architecture: Architecture) -> None:
    middle = Component(Kind.RESID_MID, 0)
    if architecture.parallel_blocks:
        with pytest.raises(UnknownComponent, match="in parallel"):
            architecture.check(middle)
    else:
        assert architecture.check(middle) is middle


@pytest.mark.parametrize("name", ["", "../secrets", "a b", "-rf", "x" * 201])
def test_a_model_is_never_named_by_what_could_be_a_path_or_an_option(name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"model": name}, ModelRequest)
