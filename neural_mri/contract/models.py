"""Models as people know them: a name, weights with a digest, and a shape."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.problems import UnknownComponent

__all__ = (
    "Architecture",
    "ModelInfo",
    "ModelRequest",
    "ModelState",
    "NormPlacement",
    "Numerics",
)

ModelName = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][\w./\-]*$")]


class NormPlacement(StrEnum):
    """Where a block normalises: before its sublayers, after them, or both (Gemma-2)."""

    PRE = "pre"
    POST = "post"
    PRE_AND_POST = "pre+post"


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model, in TransformerLens's words; read from the configuration, never guessed."""

    family: str
    """`model_type` of the configuration: `gpt2`, `llama`, `gemma2`, ..."""
    n_layers: int
    n_heads: int
    """Query heads a layer."""
    n_kv_heads: int
    """Key-value heads a layer; fewer than `n_heads` in grouped-query attention."""
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    """Longest prompt, in tokens."""
    activation: str
    gated_mlp: bool
    """Whether the MLP has three matrices (gate, up, down) or two."""
    norm: str
    """`rms` or `layer`."""
    norm_placement: NormPlacement
    parallel_blocks: bool
    """Attention and MLP read the same residual (Pythia): there is no `resid_mid`."""
    tied_embeddings: bool
    positions: str
    """`learned` or `rotary`."""
    sliding_windows: tuple[int | None, ...] | None = None
    """Attention window of each layer in tokens (None: the whole prompt); None where no layer has one."""
    attention_softcap: float | None = None
    final_softcap: float | None = None

    def kv_head(self, head: int) -> int:
        """The key-value head that query head `head` reads."""
        return head // (self.n_heads // self.n_kv_heads)

    def nodes(self) -> Iterator[Component]:
        """What every picture shows, in reading order: embed, each layer's heads and MLP, unembed."""
        yield EMBED
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                yield Component.head(layer, head)
            yield Component(Kind.MLP, layer)
        yield UNEMBED

    def check(self, component: Component) -> Component:
        """The component, if the model has it. Raises `UnknownComponent` with what it has instead."""
        layer, index = component.layer, component.index
        if layer is not None and layer >= self.n_layers:
            raise UnknownComponent(
                f"{component} does not exist: the model has {self.n_layers} layers, 0 to "
                f"{self.n_layers - 1}",
                component=str(component),
            )
        if component.kind is Kind.RESID_MID and self.parallel_blocks:
            raise UnknownComponent(
                f"{component} does not exist: attention and MLP of this model run in parallel",
                component=str(component),
            )
        bound = {Kind.HEAD: self.n_heads, Kind.NEURON: self.d_mlp}.get(component.kind)
        if bound is not None and index is not None and index >= bound:
            raise UnknownComponent(
                f"{component} does not exist: a layer has {bound} {component.kind.value}s, 0 to "
                f"{bound - 1}",
                component=str(component),
            )
        return component


class Numerics(msgspec.Struct, frozen=True, kw_only=True):
    """What, beside weights and tokens, decides the last digits of a result."""

    dtype: str = "float32"
    device: str = "cpu"
    """Device class (`cpu`, `cuda`), not the device."""
    attention: str = "sdpa"


class ModelState(StrEnum):
    """What can be done with a registered model now."""

    AVAILABLE = "available"
    """Registered; no worker holds it."""
    LOADING = "loading"
    RESIDENT = "resident"
    """At least one worker holds it: scans start at once."""
    UNLOADING = "unloading"


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A registered model, and where it stands."""

    name: str
    source: str
    """Where it came from: `gguf:...`, `folder:...` or `hf:ID@REVISION`."""
    revision: str
    """SHA-256 over the weight files: two models with one digest give the same numbers."""
    tokenizer_digest: str
    architecture: Architecture
    n_parameters: int
    """Each storage counted once: tied embeddings are one matrix."""
    weights_bytes: int
    quantization: str | None = None
    """What the published file was quantised to (`Q4_1`): the values lie on its grid."""
    numerics: Numerics = Numerics()
    state: ModelState = ModelState.AVAILABLE
    pinned: bool = False
    default: bool = False
    workers: tuple[str, ...] = ()
    memory_bytes: int | None = None
    """Memory the model takes on its device, where a worker holds it."""


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model to load or unload."""

    model: ModelName
