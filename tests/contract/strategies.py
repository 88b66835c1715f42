"""What hypothesis draws: addresses, shapes of models, requests, tokens."""

from itertools import pairwise

from hypothesis import strategies as st

from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.models import Architecture, NormPlacement, Numerics
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AttentionScan,
    Scan,
    StructuralScan,
)
from neural_mri.contract.tokens import Span, Tokens

__all__ = (
    "activation_scans",
    "architectures",
    "components",
    "numerics",
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


def activation_scans() -> st.SearchStrategy[ActivationScan]:
    return st.builds(
        ActivationScan,
        model=MODELS,
        prompt=prompts,
        layers=st.just("all") | ADDRESSES,
        aggregation=st.sampled_from(Aggregation),
        include_residual=st.booleans(),
        token_positions=st.just("all") | POSITIONS,
        top_neurons=st.integers(0, 100),
        top_predictions=st.integers(1, 100),
    )


def scans() -> st.SearchStrategy[Scan]:
    layers = st.lists(st.integers(0, 100), min_size=1, max_size=4).map(tuple)
    return st.one_of(
        st.builds(StructuralScan, model=MODELS),
        activation_scans(),
        st.builds(AttentionScan, model=MODELS, prompt=prompts, layers=layers),
    )


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
