"""Requests for a scan: one frozen struct a modality, together a tagged union.

Fields bear the names of the seed specification's section 4.3. Strict where a human sends them: an
unknown field is refused, so that a typing error is never a silent default.
"""

from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta

from neural_mri.contract.anomalies import AnomalyScan, CalibrationScan
from neural_mri.contract.circuits import CircuitScan
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.perturbations import PatchingScan, PerturbationScan, TracingScan
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scan_base import (
    MAX_PROMPT_CHARACTERS,
    Address,
    CalibrationKey,
    Choice,
    Forward,
    Positions,
    Prompt,
    PromptScan,
    ScanBase,
    TargetedScan,
    resolve_positions,
)
from neural_mri.contract.weights import WeightScan

__all__ = (
    "MAX_PROMPT_CHARACTERS",
    "ActivationScan",
    "Aggregation",
    "AnomalyScan",
    "AttentionScan",
    "CalibrationScan",
    "CircuitScan",
    "Forward",
    "PatchingScan",
    "PerturbationScan",
    "Prompt",
    "PromptScan",
    "Scan",
    "ScanBase",
    "ScanKind",
    "StructuralScan",
    "TargetedScan",
    "TracingScan",
    "WeightScan",
    "decode_scan",
    "encode_scan",
    "kind_of",
    "reporting_order",
    "resolve_positions",
)


class ScanKind(StrEnum):
    """The tag of each request."""

    T1 = "T1"
    T2 = "T2"
    FMRI = "fMRI"
    ATTENTION = "attention"
    DTI = "DTI"
    FLAIR = "FLAIR"
    PERTURBATION = "perturbation"
    PATCHING = "patching"
    TRACING = "tracing"
    CALIBRATION = "calibration"


class Aggregation(Choice):
    """How a component's output vector at one token becomes one number."""

    L2_NORM = "l2_norm"
    """Euclidean norm of what the component writes to the residual stream."""
    MAX = "max"
    """Largest absolute coordinate of it."""
    MEAN = "mean"
    """Mean absolute coordinate of it."""
    RAW = "raw"
    """The vectors themselves, as further tables; the picture shows their norms."""


class StructuralScan(ScanBase, frozen=True, kw_only=True, tag="T1", tag_field="scan_mode"):
    """T1, topology: structure and exact parameter counts, from the configuration alone."""

    needs_loaded_model: ClassVar[bool] = False


class ActivationScan(PromptScan, frozen=True, kw_only=True, tag="fMRI", tag_field="scan_mode"):
    """fMRI: what each component writes to the residual stream at each token of a prompt."""

    layers: Literal["all"] | Annotated[tuple[Address, ...], Meta(min_length=1, max_length=4096)] = (
        "all"
    )
    """Addresses to report. `blocks.L.attn` brings its heads; `all` is every node."""
    aggregation: Aggregation = Aggregation.L2_NORM
    include_residual: bool = True
    """Whether to report the residual stream (`resid_pre`, `resid_mid`, `resid_post`) as well."""
    token_positions: Positions = "all"
    """Positions to report, from 0; negative ones count from the end."""
    top_neurons: Annotated[int, Meta(ge=0, le=100)] = 10
    """Strongest neurons to name for each MLP and position."""
    top_predictions: Annotated[int, Meta(ge=1, le=100)] = 10
    """Likeliest next tokens to name for each position."""
    canonical: bool = False
    """Run in a forward of its own: bit-identical on equal machines, whatever else is asked at the time."""
    calibration: CalibrationKey | None = None
    """Scan key of the calibration that `percentile` ranks values in; the model's own where left out."""

    @property
    def shared_forward(self) -> Forward | None:
        """With all who read the plain model, where every position is reported and no vectors are."""
        alone = self.canonical or self.aggregation is Aggregation.RAW
        return None if alone or self.token_positions != "all" else Forward.READ

    @property
    def needs_calibration(self) -> bool:
        """Norms are ranked among those on reference text."""
        return self.aggregation is Aggregation.L2_NORM

    def check(self, architecture: Architecture) -> None:
        """Raises what `selected` does."""
        super().check(architecture)
        self.selected(architecture)

    def selected(self, architecture: Architecture) -> tuple[Component, ...]:
        """The components to report, in reading order, each once.

        Raises `InvalidAddress` or `UnknownComponent` naming the first bad one.
        """
        everything = [
            component
            for component in reporting_order(architecture)
            if self.include_residual or not component.kind.is_residual
        ]
        if self.layers == "all":
            return tuple(everything)
        wanted = {architecture.check(Component.parse(address)) for address in self.layers}
        for component in wanted:
            if component.kind is Kind.NEURON:
                raise Unprocessable(
                    f"{component} cannot be selected one by one: ask for its MLP and read the "
                    "top_neurons",
                    component=str(component),
                )
        return tuple(
            component
            for component in reporting_order(architecture)
            if component in wanted
            or (component.kind is Kind.HEAD and Component(Kind.ATTN, component.layer) in wanted)
        )


class AttentionScan(PromptScan, frozen=True, kw_only=True, tag="attention", tag_field="scan_mode"):
    """Attention patterns of some layers: `[head, query position, key position]`, rows sum to 1."""

    layers: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1, max_length=4096)]
    canonical: bool = False
    """Run in a forward of its own: bit-identical on equal machines, whatever else is asked at the time."""

    @property
    def shared_forward(self) -> Forward | None:
        """With others who look at attention, at whatever layers."""
        return None if self.canonical else Forward.PATTERNS

    def check(self, architecture: Architecture) -> None:
        """Raises `UnknownComponent` naming the first layer that the model does not have."""
        super().check(architecture)
        for layer in self.layers:
            architecture.check(Component(Kind.ATTN, layer))


Scan: TypeAlias = (
    StructuralScan
    | WeightScan
    | ActivationScan
    | AttentionScan
    | CircuitScan
    | AnomalyScan
    | PerturbationScan
    | PatchingScan
    | TracingScan
    | CalibrationScan
)

_decoder: msgspec.json.Decoder[Scan] = msgspec.json.Decoder(Scan)
_encoder = msgspec.json.Encoder(order="deterministic")


def decode_scan(body: bytes | str) -> Scan:
    """A scan as it was stored."""
    return _decoder.decode(body)


def encode_scan(scan: Scan) -> bytes:
    """A scan to store: every default written out, keys in order."""
    return _encoder.encode(scan)


def kind_of(scan: Scan) -> ScanKind:
    """The tag of a scan."""
    config: Any = scan.__struct_config__
    return ScanKind(config.tag)


@lru_cache(maxsize=32)
def reporting_order(architecture: Architecture) -> tuple[Component, ...]:
    """Every component an fMRI scan can report, from the embedding down to the last residual."""
    order = [Component(Kind.EMBED)]
    for layer in range(architecture.n_layers):
        order.append(Component(Kind.RESID_PRE, layer))
        order.append(Component(Kind.ATTN, layer))
        order.extend(Component.head(layer, head) for head in range(architecture.n_heads))
        if not architecture.parallel_blocks:
            order.append(Component(Kind.RESID_MID, layer))
        order.append(Component(Kind.MLP, layer))
        order.append(Component(Kind.RESID_POST, layer))
    order.append(Component(Kind.UNEMBED))
    return tuple(order)
