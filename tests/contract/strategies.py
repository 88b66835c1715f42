"""What hypothesis draws: addresses, shapes of models, requests, tokens."""

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from hypothesis import strategies as st

from neural_mri.contract.anomalies import Lens, Sublayers
from neural_mri.contract.circuits import Ablation, CircuitMethod, Granularity
from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.models import Architecture, NormPlacement, Numerics
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
    ScanKind,
    StructuralScan,
    TargetedScan,
    TracingScan,
    WeightScan,
)
from neural_mri.contract.tokens import Span, Tokens

__all__ = (
    "SCANS",
    "activation_scans",
    "architectures",
    "components",
    "numerics",
    "perturbations",
    "prompts",
    "scans",
    "tokens",
)

LAYERS = st.integers(0, 999_999)
PLAIN = (Kind.ATTN, Kind.MLP, Kind.RESID_PRE, Kind.RESID_MID, Kind.RESID_POST)

prompts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30
)


def components() -> st.SearchStrategy[Component]:
    return st.one_of(
        st.sampled_from([EMBED, UNEMBED]),
        st.builds(Component, st.sampled_from(PLAIN), LAYERS),
        st.builds(Component.head, LAYERS, st.integers(0, 9_999_999)),
        st.builds(Component.neuron, LAYERS, st.integers(0, 999_999_999)),
    )


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    n_kv_heads = draw(st.integers(1, 4))
    n_layers = draw(st.integers(1, 5))
    windows = st.tuples(*[st.none() | st.integers(1, 64)] * n_layers)
    return Architecture(
        family=draw(st.sampled_from(["gpt2", "llama", "gemma2", "gpt_neox"])),
        n_layers=n_layers,
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        d_model=draw(st.integers(4, 64)),
        d_head=draw(st.integers(2, 16)),
        d_mlp=draw(st.integers(4, 64)),
        d_vocab=draw(st.integers(10, 100)),
        n_ctx=draw(st.integers(8, 64)),
        activation="silu",
        gated_mlp=draw(st.booleans()),
        norm=draw(st.sampled_from(["rms", "layer"])),
        norm_placement=draw(st.sampled_from(NormPlacement)),
        parallel_blocks=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        positions=draw(st.sampled_from(["learned", "rotary"])),
        sliding_windows=draw(st.none() | windows),
        attention_softcap=draw(st.none() | st.floats(1, 100)),
        final_softcap=draw(st.none() | st.floats(1, 100)),
    )


MODELS = st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9./\-]{0,20}", fullmatch=True)
ADDRESSES = st.lists(components().map(str), min_size=1, max_size=4).map(tuple)
POSITIONS = st.lists(st.integers(-64, 64), min_size=1, max_size=4).map(tuple)
SOME_POSITIONS = st.just("all") | POSITIONS
ANSWERS = st.none() | prompts | st.integers(0, 99_999)
CALIBRATIONS = st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)
FINITE = st.floats(-1e6, 1e6)
SEEDS = st.integers(0, 2**31 - 1)


def several(of: st.SearchStrategy[Any], at_most: int) -> st.SearchStrategy[tuple[Any, ...]]:
    """Some, each once, in any order."""
    return st.lists(of, min_size=1, max_size=at_most, unique=True).map(tuple)


def _built(kind: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Of a scan: what every one has, and what all that read a prompt or ask about a token have."""
    shared: dict[str, st.SearchStrategy[Any]] = {"model": MODELS}
    if issubclass(kind, PromptScan):
        shared["prompt"] = prompts
    if issubclass(kind, TargetedScan):
        shared |= {"target_token_idx": st.integers(-64, 64), "answer": ANSWERS, "foil": ANSWERS}
    return st.builds(kind, **shared, **fields)


def activation_scans() -> st.SearchStrategy[ActivationScan]:
    return _built(
        ActivationScan,
        layers=st.just("all") | ADDRESSES,
        aggregation=st.sampled_from(Aggregation),
        canonical=st.booleans(),
        include_residual=st.booleans(),
        token_positions=SOME_POSITIONS,
        top_neurons=st.integers(0, 100),
        top_predictions=st.integers(1, 100),
        calibration=CALIBRATIONS,
    )


def perturbations() -> st.SearchStrategy[Perturbation]:
    place: dict[str, st.SearchStrategy[Any]] = {
        "component": components().map(str),
        "token_positions": SOME_POSITIONS,
    }
    return st.one_of(
        st.builds(ZeroAblation, **place),
        st.builds(Amplify, **place, factor=FINITE),
        st.builds(Invert, **place),
        st.builds(Noise, **place, sigma=st.floats(0, 1000), seed=SEEDS, draws=st.integers(1, 64)),
        st.builds(MeanAblation, **place),
        st.builds(
            Inject,
            **place,
            values=st.lists(FINITE, min_size=1, max_size=3).map(tuple),
            mode=st.sampled_from(InjectMode),
        ),
        st.builds(Patch, **place, source_prompt=prompts),
    )


SCANS: Mapping[ScanKind, st.SearchStrategy[Scan]] = MappingProxyType(
    {
        ScanKind.T1: _built(StructuralScan),
        ScanKind.T2: _built(
            WeightScan,
            layers=st.just("all") | ADDRESSES,
            baseline=MODELS,
            histogram_bins=st.integers(2, 1024),
            outlier_sigma=st.floats(1, 1000),
        ),
        ScanKind.FMRI: activation_scans(),
        ScanKind.ATTENTION: _built(
            AttentionScan,
            layers=st.lists(st.integers(0, 100), min_size=1, max_size=4).map(tuple),
            canonical=st.booleans(),
        ),
        ScanKind.DTI: _built(
            CircuitScan,
            corrupt_prompt=st.none() | prompts,
            method=st.sampled_from(CircuitMethod),
            ablation=st.none() | st.sampled_from(Ablation),
            granularity=st.sampled_from(Granularity),
            include_first_token=st.booleans(),
            exact=st.integers(0, 4096),
            edges=st.integers(0, 5000),
            steps=st.integers(1, 64),
            calibration=CALIBRATIONS,
            canonical=st.booleans(),
        ),
        ScanKind.FLAIR: _built(
            AnomalyScan,
            lens=st.sampled_from(Lens),
            token_positions=st.just("target") | SOME_POSITIONS,
            appearance=st.booleans(),
            sublayers=st.sampled_from(Sublayers),
            kl_weight=st.floats(0, 1000),
            entropy_weight=st.floats(0, 1000),
            false_alarm_rate=st.floats(0, 0.5, exclude_min=True, exclude_max=True),
            canonical=st.booleans(),
            calibration=CALIBRATIONS,
        ),
        ScanKind.PERTURBATION: _built(
            PerturbationScan,
            perturbations=st.lists(perturbations(), max_size=3).map(tuple),
            top_predictions=st.integers(1, 100),
            perturbed_scan=st.booleans(),
            canonical=st.booleans(),
            calibration=CALIBRATIONS,
        ),
        ScanKind.PATCHING: _built(
            PatchingScan,
            corrupt_prompt=prompts,
            direction=st.sampled_from(Direction),
            sites=several(st.sampled_from(PatchSite), 4),
        ),
        ScanKind.TRACING: _built(
            TracingScan,
            subject=prompts,
            sigma=st.floats(0, 1000, exclude_min=True),
            draws=st.integers(1, 32),
            seed=SEEDS,
            window=st.integers(1, 101),
            kinds=several(st.sampled_from(TraceKind), 3),
        ),
        ScanKind.CALIBRATION: _built(
            CalibrationScan,
            texts=st.lists(prompts, max_size=2).map(tuple),
            n_tokens=st.integers(256, 1_000_000),
            n_ordinary=st.integers(32, 4096),
            seed=st.integers(0, 2**63 - 1),
            lenses=several(st.sampled_from(Lens), 3),
        ),
    }
)
"""Requests of each kind, every field drawn."""


def scans() -> st.SearchStrategy[Scan]:
    return st.one_of(list(SCANS.values()))


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8))
    texts = draw(st.lists(prompts, min_size=len(ids), max_size=len(ids)))
    edges = sorted(draw(st.lists(st.integers(0, 99), min_size=len(ids) + 1, max_size=len(ids) + 1)))
    return Tokens(
        ids=tuple(ids),
        texts=tuple(texts),
        spans=tuple(Span(start, end) for start, end in pairwise(edges)),
    )


def numerics() -> st.SearchStrategy[Numerics]:
    return st.builds(
        Numerics,
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        device=st.sampled_from(["cpu", "cuda"]),
        attention=st.sampled_from(["sdpa", "eager"]),
    )
