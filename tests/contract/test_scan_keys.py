"""Equal keys mean equal numbers, and other numbers mean another key."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.models import Numerics
from neural_mri.contract.scan_keys import scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AttentionScan,
    Scan,
    StructuralScan,
)
from tests.contract.strategies import activation_scans, numerics, prompts, scans

IDS = st.lists(st.integers(0, 99_999), min_size=1, max_size=6).map(tuple)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)

GIVEN: dict[str, Any] = {
    "token_ids": (5, 6, 7),
    "revision": "a" * 64,
    "tokenizer_digest": "b" * 64,
    "numerics": Numerics(),
    "scanner_version": "1",
}


def test_the_key_of_a_plain_scan_never_moves() -> None:
    """Stored results would no longer be found: change it only with SCANNER_VERSION."""
    assert scan_key(ActivationScan(prompt="The Eiffel Tower"), **GIVEN) == (
        "1c2bec421f8970bab9b840711738a94010f18315c21a1eced50b2bb11c122370"
    )


@given(scans(), IDS, DIGESTS, DIGESTS, numerics())
def test_a_key_is_64_digits_and_does_not_depend_on_the_process(
    scan: Scan, ids: tuple[int, ...], revision: str, tokenizer: str, kind: Numerics
) -> None:
    def key() -> str:
        return scan_key(
            scan, token_ids=ids, revision=revision, tokenizer_digest=tokenizer, numerics=kind
        )

    assert key() == key()
    assert len(key()) == 64
    assert set(key()) <= set("0123456789abcdef")


@given(activation_scans(), st.none() | st.just("another"), prompts)
def test_the_models_name_and_the_prompts_text_do_not_move_the_key(
    scan: ActivationScan, model: str | None, prompt: str
) -> None:
    renamed = msgspec.structs.replace(scan, model=model, prompt=prompt)
    assert scan_key(renamed, **GIVEN) == scan_key(scan, **GIVEN)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", (5, 6, 8)),
        ("token_ids", (5, 6)),
        ("token_ids", (6, 5, 7)),
        ("token_ids", None),
        ("revision", "c" * 64),
        ("tokenizer_digest", "c" * 64),
        ("numerics", Numerics(dtype="bfloat16")),
        ("numerics", Numerics(device="cuda")),
        ("numerics", Numerics(attention="eager")),
        ("scanner_version", "2"),
    ],
)
def test_whatever_moves_a_number_moves_the_key(name: str, value: object) -> None:
    scan = ActivationScan(prompt="a")
    assert scan_key(scan, **{**GIVEN, name: value}) != scan_key(scan, **GIVEN)


OTHER_PARAMETERS: dict[type[Scan], dict[str, Any]] = {
    StructuralScan: {},
    ActivationScan: {
        "layers": ("blocks.0.mlp",),
        "aggregation": Aggregation.MAX,
        "include_residual": False,
        "token_positions": (0,),
        "top_neurons": 3,
        "top_predictions": 3,
    },
    AttentionScan: {"layers": (1,)},
}
"""For each field that moves numbers, a value beside its default."""


@pytest.mark.parametrize(
    ("scan", "name", "value"),
    [
        (
            StructuralScan()
            if kind is StructuralScan
            else AttentionScan(prompt="a", layers=(0,))
            if kind is AttentionScan
            else ActivationScan(prompt="a"),
            name,
            value,
        )
        for kind, fields in OTHER_PARAMETERS.items()
        for name, value in fields.items()
    ],
)
def test_every_parameter_moves_the_key(scan: Scan, name: str, value: object) -> None:
    changed = msgspec.structs.replace(scan, **{name: value})
    assert scan_key(changed, **GIVEN) != scan_key(scan, **GIVEN)


@pytest.mark.parametrize("kind", OTHER_PARAMETERS)
def test_no_field_of_a_request_is_forgotten_above(kind: type[Scan]) -> None:
    fields = {field.name for field in msgspec.structs.fields(kind)}
    assert fields - {"model", "prompt"} == set(OTHER_PARAMETERS[kind])


def test_kinds_never_share_a_key() -> None:
    activation, attention = ActivationScan(prompt="a"), AttentionScan(prompt="a", layers=(0,))
    assert len({scan_key(scan, **GIVEN) for scan in (activation, attention, StructuralScan())}) == 3
