"""Requests that do one thing to one component, as people send them: `POST /api/perturb/zero` and its kin.

Each says the same as a `PerturbationScan` with one perturbation, and becomes one: there is a single way
through the queue, and a single key for equal requests.
"""

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from neural_mri.contract.perturbations import (
    Amplify,
    Finite,
    Inject,
    InjectMode,
    Invert,
    MeanAblation,
    Noise,
    Patch,
    Perturbation,
    PerturbationScan,
    Seed,
    ZeroAblation,
)
from neural_mri.contract.scan_base import Address, CalibrationKey, Positions, Prompt, TargetedScan

__all__ = (
    "AblateRequest",
    "AmplifyRequest",
    "InjectRequest",
    "InvertRequest",
    "NoiseRequest",
    "PatchRequest",
    "ResetRequest",
    "StimulusRequest",
    "ZeroRequest",
)


class ResetRequest(TargetedScan, frozen=True, kw_only=True):
    """Nothing is done: the clean run, as a perturbation scan reports it."""

    top_predictions: Annotated[int, Meta(ge=1, le=100)] = 10
    perturbed_scan: bool = True
    """Whether to report the activations of the perturbed run."""

    def perturbations(self) -> tuple[Perturbation, ...]:
        """What is done."""
        return ()

    def scan(self) -> PerturbationScan:
        """The same request as a perturbation scan."""
        ours = msgspec.structs.asdict(self)
        shared = {name: ours[name] for name in PerturbationScan.__struct_fields__ if name in ours}
        return PerturbationScan(perturbations=self.perturbations(), **shared)


class StimulusRequest(ResetRequest, frozen=True, kw_only=True):
    """One component, at some tokens."""

    operation: ClassVar[type[Perturbation]]

    component: Address
    token_positions: Positions = "all"
    """Positions at which it is done."""

    def perturbations(self) -> tuple[Perturbation, ...]:
        """The one thing that is done."""
        ours = msgspec.structs.asdict(self)
        fields = {name: ours[name] for name in self.operation.__struct_fields__}
        return (self.operation(**fields),)


class ZeroRequest(StimulusRequest, frozen=True, kw_only=True):
    """Set a component's output to 0."""

    operation: ClassVar[type[Perturbation]] = ZeroAblation


class AmplifyRequest(StimulusRequest, frozen=True, kw_only=True):
    """Multiply a component's output."""

    operation: ClassVar[type[Perturbation]] = Amplify

    factor: Finite = 2.0


class InvertRequest(StimulusRequest, frozen=True, kw_only=True):
    """Change the sign of a component's output."""

    operation: ClassVar[type[Perturbation]] = Invert


class NoiseRequest(StimulusRequest, frozen=True, kw_only=True):
    """Add Gaussian noise of `sigma` times the component's own root mean square."""

    operation: ClassVar[type[Perturbation]] = Noise

    sigma: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    seed: Seed = 0
    draws: Annotated[int, Meta(ge=1, le=64)] = 8


class AblateRequest(StimulusRequest, frozen=True, kw_only=True):
    """Replace a component's output by its mean over reference text."""

    operation: ClassVar[type[Perturbation]] = MeanAblation

    calibration: CalibrationKey | None = None


class InjectRequest(StimulusRequest, frozen=True, kw_only=True):
    """Add given values to a component's output, or put them in its place."""

    operation: ClassVar[type[Perturbation]] = Inject

    values: Annotated[tuple[Finite, ...], Meta(min_length=1, max_length=65536)]
    mode: InjectMode = InjectMode.ADD


class PatchRequest(StimulusRequest, frozen=True, kw_only=True):
    """Put in a component's output in the run of another prompt of as many tokens."""

    operation: ClassVar[type[Perturbation]] = Patch

    source_prompt: Prompt
