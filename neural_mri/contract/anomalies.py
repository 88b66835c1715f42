"""Requests for a FLAIR scan, and for the calibration it is read against."""

from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta

from neural_mri.contract.scan_base import Positions, Prompt, ScanBase, TargetedScan

__all__ = ("AnomalyScan", "CalibrationScan", "Lens")

Weight = Annotated[float, Meta(ge=0, le=1000)]


class Lens(StrEnum):
    """How an intermediate residual is read through the unembedding."""

    RAW = "raw"
    """As it is, through the final norm (nostalgebraist 2020)."""
    BIAS = "bias"
    """With the mean difference to the last layer's residual added first."""
    RIDGE = "ridge"
    """After an affine map to the last layer's residual, fitted by ridge regression."""


class AnomalyScan(TargetedScan, frozen=True, kw_only=True, tag="FLAIR", tag_field="scan_mode"):
    """FLAIR: uncertainty, where the answer appears, and whether it is supported.

    All in absolute nats, never scaled by the prompt itself.
    """

    lens: Lens = Lens.BIAS
    token_positions: Literal["last"] | Positions = "all"
    kl_weight: Weight = 0.6
    entropy_weight: Weight = 0.4
    """Weights of the seed's score, kl_weight * KL + entropy_weight * H. Not an error detector."""
    false_alarm_rate: Annotated[float, Meta(gt=0, lt=0.5)] = 0.01
    """Share of ordinary text on which a node may be called anomalous."""


class CalibrationScan(
    ScanBase, frozen=True, kw_only=True, tag="calibration", tag_field="scan_mode"
):
    """Fits what scans are read against: reference means and quantiles, and the lenses.

    Without texts, the model's own: sampled from it, seeded.
    """

    texts: Annotated[tuple[Prompt, ...], Meta(max_length=10_000)] = ()
    n_tokens: Annotated[int, Meta(ge=256, le=1_000_000)] = 2048
    seed: Annotated[int, Meta(ge=0)] = 0
    ridge: bool = False
    """Whether to fit the ridge lens too: `d_model`^2 + `d_model` numbers a layer."""
