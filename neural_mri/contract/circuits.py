"""Requests for a DTI scan: which components carry an answer, and along which paths."""

from typing import Annotated

from msgspec import Meta

from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scan_base import CalibrationKey, Choice, Forward, Prompt, TargetedScan

__all__ = ("Ablation", "CircuitMethod", "CircuitScan", "Granularity")


class CircuitMethod(Choice):
    """How a component's effect on the metric is measured."""

    FAST = "fast"
    """Attribution patching for all, then the exact ablation of the strongest `exact`."""
    ABLATION = "ablation"
    """Exact: the metric with the component replaced, minus the metric of the clean run."""
    ATTRIBUTION_PATCHING = "attribution_patching"
    """First-order estimate of the ablation from one backward pass (Nanda 2023; Syed 2023)."""
    INTEGRATED_GRADIENTS = "integrated_gradients"
    """The estimate averaged along the path from corrupt to clean inputs (EAP-IG; Hanna 2024)."""
    DIRECT = "direct"
    """Direct logit attribution: the part of the metric a component writes itself (Elhage 2021)."""


class Ablation(Choice):
    """What a component's output is replaced by. The choice is part of the result."""

    RESAMPLE = "resample"
    """Its value in the run of the corrupt prompt."""
    MEAN = "mean"
    """Its mean over reference text, positions 1 and later."""
    ZERO = "zero"
    """Nothing: far off the model's own distribution."""


class Granularity(Choice):
    """What counts as one component."""

    HEADS = "heads"
    """Every attention head and every MLP."""
    BLOCKS = "blocks"
    """Every attention layer and every MLP."""


class CircuitScan(TargetedScan, frozen=True, kw_only=True, tag="DTI", tag_field="scan_mode"):
    """DTI: the effect of every component on a chosen next token.

    Effect = metric with the component replaced, minus metric of the clean run: negative where the
    component helps. The metric is the logit difference answer - foil where there is a foil, else the
    answer's log-probability in nats.
    """

    corrupt_prompt: Prompt | None = None
    """A prompt of the same number of tokens that asks for the foil."""
    method: CircuitMethod = CircuitMethod.FAST
    ablation: Ablation | None = None
    """`resample` where a corrupt prompt is given, else `mean`."""
    granularity: Granularity = Granularity.HEADS
    include_first_token: bool = False
    """Whether to replace at position 0 as well, which carries the attention sink."""
    exact: Annotated[int, Meta(ge=0, le=4096)] = 30
    """Strongest components `fast` measures exactly; the first MLP as well, and every one where it does not
    resample."""
    edges: Annotated[int, Meta(ge=0, le=5000)] = 300
    """Strongest edges between components to report."""
    steps: Annotated[int, Meta(ge=1, le=64)] = 5
    """Steps of `integrated_gradients`."""
    calibration: CalibrationKey | None = None
    """Scan key of the calibration whose means are used; the model's own where left out."""
    canonical: bool = False
    """Run in a forward of its own: bit-identical on equal machines, whatever else is asked at the time."""

    @property
    def shared_forward(self) -> Forward | None:
        """With others that take one gradient after their last token."""
        shares = self.takes_one_gradient and self.target_token_idx == -1 and not self.canonical
        return Forward.DIFFERENTIATED if shares else None

    @property
    def n_rows(self) -> int:
        """The prompt and the corrupt one."""
        return 1 + len(self.other_prompts)

    @property
    def takes_one_gradient(self) -> bool:
        """Exact ablation takes none, and a path of gradients is a batch of its own."""
        return self.method in (CircuitMethod.FAST, CircuitMethod.ATTRIBUTION_PATCHING)

    @property
    def exact_at_most(self) -> int:
        """Components that are measured because they are the strongest."""
        return self.exact if self.method is CircuitMethod.FAST else 0

    @property
    def effective_ablation(self) -> Ablation:
        """The ablation that is used where the request leaves it open."""
        if self.ablation is not None:
            return self.ablation
        return Ablation.RESAMPLE if self.corrupt_prompt is not None else Ablation.MEAN

    @property
    def other_prompts(self) -> tuple[str, ...]:
        """The corrupt prompt."""
        return () if self.corrupt_prompt is None else (self.corrupt_prompt,)

    @property
    def needs_calibration(self) -> bool:
        """Mean ablation puts calibrated means in a component's place."""
        return self.method is not CircuitMethod.DIRECT and self.effective_ablation is Ablation.MEAN

    def check(self, architecture: Architecture) -> None:
        """Raises `Unprocessable` where the parts of the request contradict each other."""
        super().check(architecture)
        if self.effective_ablation is Ablation.RESAMPLE and self.corrupt_prompt is None:
            raise Unprocessable("ablation 'resample' needs a corrupt_prompt to take values from")
        if self.method is CircuitMethod.INTEGRATED_GRADIENTS and self.corrupt_prompt is None:
            raise Unprocessable(
                "method 'integrated_gradients' needs a corrupt_prompt: the path starts there"
            )
