"""Addresses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.problems import InvalidAddress
from tests.contract.strategies import components


@given(components())
def test_an_address_reads_back_as_it_was_written(component: Component) -> None:
    assert Component.parse(str(component)) == component


@given(components(), components())
def test_two_places_never_share_an_address_or_a_label(one: Component, other: Component) -> None:
    assert (str(one) == str(other)) == (one == other)
    assert (one.label == other.label) == (one == other)


@pytest.mark.parametrize(
    ("short", "canonical"),
    [
        ("blocks.3.attn.h7", "blocks.3.attn.head_7"),
        ("blocks.3.mlp.n1247", "blocks.3.mlp.neuron_1247"),
    ],
)
def test_the_short_form_is_read_and_printed_back_in_full(short: str, canonical: str) -> None:
    assert str(Component.parse(short)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Embed",
        "blocks",
        "blocks.3",
        "blocks.-1.attn",
        "blocks.03.attn",
        "blocks.3.attn.head_07",
        "blocks.3.attn ",
        "blocks.3.attn\n",
        "blocks.3.mlp.head_2",
        "blocks.3.attn.neuron_2",
        "blocks.٣.attn",  # Arabic-Indic three: a digit to `\\d` alone
        "blocks.9999999.attn",
        "transformer.h.3.attn",
    ],
)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidAddress) as refusal:
        Component.parse(text)
    assert repr(text) in refusal.value.detail
    assert refusal.value.members["component"] == text


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        component = Component.parse(text)
    except InvalidAddress:
        return
    assert Component.parse(str(component)) == component


def test_only_residuals_are_residual() -> None:
    residual = {kind for kind in Kind if kind.is_residual}
    assert residual == {Kind.RESID_PRE, Kind.RESID_MID, Kind.RESID_POST}
