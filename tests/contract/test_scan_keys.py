"""Equal keys mean equal numbers, and other numbers mean another key."""

import unicodedata
from collections.abc import Mapping
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.anomalies import Lens, Sublayers
from neural_mri.contract.circuits import Ablation, CircuitMethod, Granularity
from neural_mri.contract.models import Numerics
from neural_mri.contract.perturbations import (
    Amplify,
    Direction,
    Inject,
    InjectMode,
    Invert,
    MeanAblation,
    Noise,
    Patch,
    PatchSite,
    Perturbation,
    TraceKind,
    ZeroAblation,
)
from neural_mri.contract.scan_keys import calibration_key, scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    PromptScan,
    Scan,
    StructuralScan,
    TargetedScan,
    TracingScan,
    WeightScan,
    kind_of,
)
from neural_mri.contract.tokens import Operands, Span, Tokens
from tests.contract.strategies import SCANS, numerics, prompts, scans

IDS = st.lists(st.integers(0, 99_999), min_size=1, max_size=6).map(tuple)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)

GIVEN: dict[str, Any] = {
    "token_ids": (5, 6, 7),
    "revision": "a" * 64,
    "tokenizer_digest": "b" * 64,
    "numerics": Numerics(),
    "scanner_version": "1",
}


def key(scan: Scan, **changes: Any) -> str:
    return scan_key(scan, **{**GIVEN, **changes})


def tokens(*ids: int) -> Tokens:
    return Tokens(ids=ids, texts=("x",) * len(ids), spans=(Span(0, 0),) * len(ids))


def test_the_key_of_a_plain_scan_never_moves() -> None:
    """Stored results would no longer be found: change it only with SCANNER_VERSION."""
    assert key(ActivationScan(prompt="The Eiffel Tower")) == (
        "15f8320dac909cb1481a56046730b8c1019f068b28738ad5d271ca6d90f9a066"
    )
    assert key(CircuitScan(prompt="The Eiffel Tower")) == (
        "6fe6e7289fb275790b99b201cf122e0b28c8cd65c2dd2b475c48a69b6c07073b"
    ), "before it could be canonical"


@given(scans(), IDS, DIGESTS, DIGESTS, numerics())
def test_a_key_is_64_digits_and_does_not_depend_on_the_process(
    scan: Scan, ids: tuple[int, ...], revision: str, tokenizer: str, kind: Numerics
) -> None:
    given = {
        "token_ids": ids,
        "revision": revision,
        "tokenizer_digest": tokenizer,
        "numerics": kind,
    }
    assert key(scan, **given) == key(scan, **given)
    assert len(key(scan, **given)) == 64
    assert set(key(scan, **given)) <= set("0123456789abcdef")


@given(scans(), st.none() | st.just("another"))
def test_the_models_name_does_not_move_the_key(scan: Scan, model: str | None) -> None:
    assert key(msgspec.structs.replace(scan, model=model)) == key(scan)


@pytest.mark.parametrize("kind", [kind for kind in get_args(Scan) if issubclass(kind, PromptScan)])
@given(data=st.data(), prompt=prompts)
def test_tokens_stand_for_the_prompts_text_unless_a_subject_is_found_in_it(
    kind: type[PromptScan], data: st.DataObject, prompt: str
) -> None:
    scan: Any = data.draw(next(drawn for name, drawn in SCANS.items() if name == _tag(kind)))
    other = msgspec.structs.replace(scan, prompt=prompt)
    told = [unicodedata.is_normalized("NFC", text) for text in (prompt, scan.prompt)]
    same = prompt == scan.prompt or (kind is not TracingScan and all(told))
    assert (key(other) == key(scan)) == same


def test_what_a_tokenizer_may_have_composed_is_no_other_texts_scan() -> None:
    # Both have the tokens of "café" where the tokenizer composes (NFC), at other places.
    composed, apart = "caf\u00e9 au lait", "cafe\u0301 au lait"
    assert key(ActivationScan(prompt=composed)) != key(ActivationScan(prompt=apart))
    scans = [PatchingScan(prompt="a", corrupt_prompt=text) for text in (composed, apart)]
    read = Operands(prompts=dict.fromkeys((composed, apart), tokens(5, 6)))
    assert key(scans[0], operands=read) != key(scans[1], operands=read)


def _tag(kind: type[Any]) -> str:
    return str(kind.__struct_config__.tag)


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
    assert key(scan, **{name: value}) != key(scan)


PLAIN: tuple[Scan, ...] = (
    StructuralScan(),
    WeightScan(),
    ActivationScan(prompt="a"),
    AttentionScan(prompt="a", layers=(0,)),
    CircuitScan(prompt="a"),
    AnomalyScan(prompt="a"),
    PerturbationScan(prompt="a"),
    PatchingScan(prompt="a", corrupt_prompt="b"),
    TracingScan(prompt="a", subject="a"),
    CalibrationScan(),
)
"""One of each kind."""

TARGETED: Mapping[str, Any] = {"target_token_idx": 0, "answer": 3, "foil": 4}
OTHER_CALIBRATION = "d" * 64

OTHER_PARAMETERS: dict[type[Scan], dict[str, Any]] = {
    StructuralScan: {},
    WeightScan: {
        "layers": ("blocks.0.mlp",),
        "baseline": "base",
        "histogram_bins": 32,
        "outlier_sigma": 3.0,
    },
    ActivationScan: {
        "layers": ("blocks.0.mlp",),
        "aggregation": Aggregation.MAX,
        "include_residual": False,
        "token_positions": (0,),
        "top_neurons": 3,
        "top_predictions": 3,
        "canonical": True,
        "calibration": OTHER_CALIBRATION,
    },
    AttentionScan: {"layers": (1,), "canonical": True},
    CircuitScan: {
        **TARGETED,
        "corrupt_prompt": "b",
        "method": CircuitMethod.ABLATION,
        "ablation": Ablation.ZERO,
        "granularity": Granularity.BLOCKS,
        "include_first_token": True,
        "exact": 3,
        "edges": 3,
        "steps": 3,
        "calibration": OTHER_CALIBRATION,
        "canonical": True,
    },
    AnomalyScan: {
        **TARGETED,
        "lens": Lens.RIDGE,
        "token_positions": "target",
        "appearance": False,
        "sublayers": Sublayers.ALL,
        "kl_weight": 1.0,
        "entropy_weight": 1.0,
        "false_alarm_rate": 0.1,
        "canonical": True,
        "calibration": OTHER_CALIBRATION,
    },
    PerturbationScan: {
        **TARGETED,
        "perturbations": (ZeroAblation(component="blocks.0.mlp"),),
        "top_predictions": 3,
        "perturbed_scan": False,
        "canonical": True,
        "calibration": OTHER_CALIBRATION,
    },
    PatchingScan: {
        **TARGETED,
        "corrupt_prompt": "c",
        "direction": Direction.NOISING,
        "sites": (PatchSite.HEAD,),
    },
    TracingScan: {
        **TARGETED,
        "subject": "b",
        "sigma": 1.0,
        "draws": 1,
        "seed": 1,
        "window": 1,
        "kinds": (TraceKind.STATE,),
    },
    CalibrationScan: {
        "texts": ("b",),
        "n_tokens": 4096,
        "n_ordinary": 64,
        "seed": 1,
        "lenses": (Lens.RAW,),
    },
}
"""For each field that moves numbers, a value beside its default."""


@pytest.mark.parametrize(
    ("scan", "name"), [(scan, name) for scan in PLAIN for name in OTHER_PARAMETERS[type(scan)]]
)
def test_every_parameter_moves_the_key(scan: Scan, name: str) -> None:
    changed = msgspec.structs.replace(scan, **{name: OTHER_PARAMETERS[type(scan)][name]})
    baseline = "c" * 64 if name == "baseline" else None
    assert key(changed, baseline_revision=baseline) != key(scan)


@pytest.mark.parametrize("kind", get_args(Scan))
def test_no_field_of_a_request_is_forgotten_above(kind: type[Scan]) -> None:
    fields = {field.name for field in msgspec.structs.fields(kind)}
    assert fields - {"model", "prompt"} == set(OTHER_PARAMETERS[kind])


OTHER_OPERANDS: dict[type[Perturbation], dict[str, Any]] = {
    ZeroAblation: {},
    Amplify: {"factor": 3.0},
    Invert: {},
    Noise: {"sigma": 2.0, "seed": 1, "draws": 1},
    MeanAblation: {},
    Inject: {"values": (2.0,), "mode": InjectMode.REPLACE},
    Patch: {"source_prompt": "c"},
}
NEEDED: dict[type[Perturbation], dict[str, Any]] = {
    Inject: {"values": (1.0,)},
    Patch: {"source_prompt": "b"},
}


@pytest.mark.parametrize("kind", get_args(Perturbation))
def test_every_field_of_a_perturbation_moves_the_key(kind: type[Perturbation]) -> None:
    others = {"component": "blocks.1.mlp", "token_positions": (0,), **OTHER_OPERANDS[kind]}
    assert {field.name for field in msgspec.structs.fields(kind)} == set(others)
    plain = kind(component="blocks.0.mlp", **NEEDED.get(kind, {}))
    keys = {key(PerturbationScan(prompt="a", perturbations=(plain,)))}
    for name, value in others.items():
        changed = msgspec.structs.replace(plain, **{name: value})
        keys.add(key(PerturbationScan(prompt="a", perturbations=(changed,))))
    assert len(keys) == 1 + len(others)


def test_what_is_done_and_in_which_order_moves_the_key() -> None:
    zero, invert = ZeroAblation(component="embed"), Invert(component="embed")
    done = ((), (zero,), (invert,), (zero, invert), (invert, zero), (zero, zero))
    assert len({key(PerturbationScan(prompt="a", perturbations=each)) for each in done}) == 6


def test_kinds_never_share_a_key() -> None:
    assert len({key(scan) for scan in PLAIN}) == len(PLAIN) == len(get_args(Scan))


@pytest.mark.parametrize(
    "scan", [scan for scan in PLAIN if isinstance(scan, TargetedScan)], ids=kind_of
)
def test_an_answer_is_known_by_its_token_however_it_was_written(scan: TargetedScan) -> None:
    def asked(answer: str | int, token_id: int) -> str:
        changed: Any = msgspec.structs.replace(scan, answer=answer, foil=9)
        return key(changed, operands=Operands(token_ids={"answer": token_id, "foil": 9}))

    assert asked(" Paris", 7) == asked(7, 7) == asked("Paris", 7)
    assert asked(" Paris", 7) != asked(" Paris", 8)


@pytest.mark.parametrize(
    ("scan", "field"),
    [
        (CircuitScan(prompt="a", corrupt_prompt="b"), "corrupt_prompt"),
        (PatchingScan(prompt="a", corrupt_prompt="b"), "corrupt_prompt"),
        (
            PerturbationScan(
                prompt="a", perturbations=(Patch(component="embed", source_prompt="b"),)
            ),
            "source_prompt",
        ),
        (CalibrationScan(texts=("b",)), "texts"),
    ],
    ids=["circuits", "patching", "patch", "calibration"],
)
def test_another_prompt_is_known_by_its_tokens(scan: Any, field: str) -> None:
    def read(text: str, *ids: int) -> str:
        changed = scan
        if field == "source_prompt":
            (patch,) = scan.perturbations
            done = (msgspec.structs.replace(patch, source_prompt=text),)
            changed = msgspec.structs.replace(scan, perturbations=done)
        else:
            value = (text,) if field == "texts" else text
            changed = msgspec.structs.replace(scan, **{field: value})
        return key(changed, operands=Operands(prompts={text: tokens(*ids)}))

    assert read("b", 5, 6) == read("B", 5, 6)
    assert read("b", 5, 6) != read("b", 5, 7)
    assert read("b", 5, 6) != read("b", 5)
    assert read("e\u0301", 5, 6) != read("\u00e9", 5, 6) == read("b", 5, 6)


def test_a_baseline_is_known_by_its_weights_not_by_its_name() -> None:
    def compared(name: str, revision: str) -> str:
        return key(WeightScan(baseline=name), baseline_revision=revision)

    assert compared("one", "c" * 64) == compared("other", "c" * 64)
    assert compared("one", "c" * 64) != compared("one", "d" * 64)
    assert compared("one", "c" * 64) != key(WeightScan())


@given(DIGESTS, DIGESTS, numerics())
def test_a_models_own_calibration_is_the_plain_one(
    revision: str, tokenizer: str, kind: Numerics
) -> None:
    own: dict[str, Any] = {
        "revision": revision,
        "tokenizer_digest": tokenizer,
        "numerics": kind,
    }
    assert calibration_key(**own) == scan_key(CalibrationScan(), token_ids=None, **own)
    named = scan_key(CalibrationScan(model="named"), token_ids=None, **own)
    assert calibration_key(**own) == named
