"""Requests for a FLAIR scan, and for the calibration it is read against."""

from typing import Annotated, Literal

from msgspec import Meta

from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scan_base import (
    CalibrationKey,
    Choice,
    Forward,
    Positions,
    Prompt,
    ScanBase,
    TargetedScan,
)

__all__ = ("AnomalyScan", "CalibrationScan", "Lens", "Sublayers")

Weight = Annotated[float, Meta(ge=0, le=1000)]


class Lens(Choice):
    """How an intermediate residual is read through the unembedding."""

    RAW = "raw"
    """As it is, through the final norm (nostalgebraist 2020)."""
    BIAS = "bias"
    """With the mean difference to the last layer's residual added first."""
    RIDGE = "ridge"
    """After an affine map to the last layer's residual, fitted by ridge regression."""


class Sublayers(Choice):
    """Where the lens is read between attention and MLP too, so that each has a value of its own."""

    NONE = "none"
    TARGET = "target"
    """At the target position."""
    ALL = "all"
    """At every position of the scan: twice the work."""


class AnomalyScan(TargetedScan, frozen=True, kw_only=True, tag="FLAIR", tag_field="scan_mode"):
    """FLAIR: uncertainty, where the answer appears, and whether it is supported.

    All in absolute nats, never scaled by the prompt itself. Position 0 is not measured: its residual is
    the attention sink's.
    """

    lens: Lens = Lens.BIAS
    token_positions: Literal["target"] | Positions = "all"
    """Positions to read the lens at; the target position always is."""
    appearance: bool = True
    """Whether to hold the lens to every layer, which says where the answer appears.

    Without it uncertainty and support alone are measured, at the price of a few readings of the lens; no
    sublayers are read then.
    """
    sublayers: Sublayers = Sublayers.TARGET
    kl_weight: Weight = 0.6
    entropy_weight: Weight = 0.4
    """Weights of the seed's score, kl_weight * KL + entropy_weight * H. Not an error detector."""
    false_alarm_rate: Annotated[float, Meta(gt=0, lt=0.5)] = 0.01
    """Share of ordinary positions at which a channel (all layers together, all sublayers together,
    entropy, support) may call anything anomalous."""
    calibration: CalibrationKey | None = None
    """Scan key of the calibration it is read against; the model's own where left out."""
    canonical: bool = False
    """Run in a forward of its own: bit-identical on equal machines, whatever else is asked at the time."""

    @property
    def shared_forward(self) -> Forward | None:
        """At the answer with all who read the plain model.

        At many positions the lens takes several times as long as the forward: hardly anything would be
        saved, and everybody would wait for everybody's lens.
        """
        shares = self.token_positions == "target" and not self.canonical
        return Forward.READ if shares else None

    @property
    def needs_calibration(self) -> bool:
        """Always: what is anomalous is told by what is ordinary."""
        return True


class CalibrationScan(
    ScanBase, frozen=True, kw_only=True, tag="calibration", tag_field="scan_mode"
):
    """Fits what scans are read against: reference means and quantiles, and the lenses.

    Without texts, the model's own: sampled from it, seeded.
    """

    texts: Annotated[tuple[Prompt, ...], Meta(max_length=10_000)] = ()
    n_tokens: Annotated[int, Meta(ge=256, le=1_000_000)] = 2048
    """Tokens of reference text, at most."""
    n_ordinary: Annotated[int, Meta(ge=32, le=4096)] = 128
    """Positions of texts that no lens is fitted on (a quarter) whose channel values are kept as ordinary,
    at most. n of them can promise a false-alarm rate of 1 / (n + 1) and no lower."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    lenses: Annotated[tuple[Lens, ...], Meta(min_length=1, max_length=3)] = (Lens.BIAS,)
    """Lenses whose ordinary values are kept. With `ridge` among them that lens is fitted:
    2 x n_layers x (`d_model`^2 + `d_model`) numbers."""

    @property
    def other_prompts(self) -> tuple[str, ...]:
        """The texts, each once."""
        return tuple(dict.fromkeys(self.texts))

    def check(self, architecture: Architecture) -> None:
        """Raises `Unprocessable` where a lens is named twice."""
        super().check(architecture)
        if len(set(self.lenses)) < len(self.lenses):
            raise Unprocessable(f"lenses {self.lenses} names a lens twice: expected each once")
