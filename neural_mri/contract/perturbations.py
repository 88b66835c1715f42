"""Stimulation: what may be done to a component, and the scans that do it.

By hooks alone. No weight is ever changed; every request stands by itself; resetting is the empty list.
"""

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scan_base import (
    Address,
    CalibrationKey,
    Choice,
    Forward,
    Positions,
    Prompt,
    TargetedScan,
    resolve_positions,
)
from neural_mri.contract.tokens import Tokens

__all__ = (
    "Amplify",
    "Direction",
    "Inject",
    "InjectMode",
    "Invert",
    "MeanAblation",
    "Noise",
    "Patch",
    "PatchSite",
    "PatchingScan",
    "Perturbation",
    "PerturbationScan",
    "TraceKind",
    "TracingScan",
    "ZeroAblation",
)

Finite = Annotated[float, Meta(ge=-1e6, le=1e6)]
Seed = Annotated[int, Meta(ge=0, lt=2**31)]


class PerturbationBase(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="operation"
):
    """What every perturbation has: where, and at which tokens."""

    component: Address
    token_positions: Positions = "all"


class ZeroAblation(PerturbationBase, frozen=True, kw_only=True, tag="zero"):
    """Its output becomes 0."""


class Amplify(PerturbationBase, frozen=True, kw_only=True, tag="amplify"):
    """Its output is multiplied by `factor`."""

    factor: Finite = 2.0


class Invert(PerturbationBase, frozen=True, kw_only=True, tag="invert"):
    """Its output changes sign."""


class Noise(PerturbationBase, frozen=True, kw_only=True, tag="noise"):
    """Gaussian noise is added: `sigma` times the component's own root mean square.

    The root mean square is over positions 1 and later of the clean run; several draws run as rows of one
    batch, and mean and spread over them are reported.
    """

    sigma: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    seed: Seed = 0
    draws: Annotated[int, Meta(ge=1, le=64)] = 8


class MeanAblation(PerturbationBase, frozen=True, kw_only=True, tag="ablate"):
    """Its output becomes its mean over reference text, positions 1 and later."""


class InjectMode(Choice):
    """Whether injected values are added to the output or take its place."""

    ADD = "add"
    REPLACE = "replace"


class Inject(PerturbationBase, frozen=True, kw_only=True, tag="inject"):
    """Given values are added to its output, or replace it.

    `values` has `d_model` numbers (one for a neuron); for a head they are in the residual stream's
    space only where `mode` is `add`, and `d_head` numbers before W_O where it is `replace`.
    """

    values: Annotated[tuple[Finite, ...], Meta(min_length=1, max_length=65536)]
    mode: InjectMode = InjectMode.ADD

    def check_values(self, component: Component, architecture: Architecture) -> None:
        """Raises `Unprocessable` where `values` has not as many numbers as the component takes."""
        expected = architecture.d_model
        if component.kind is Kind.NEURON:
            expected = 1
        elif component.kind is Kind.HEAD and self.mode is InjectMode.REPLACE:
            expected = architecture.d_head
        if len(self.values) != expected:
            raise Unprocessable(
                f"inject has {len(self.values)} values for {component}: expected {expected} where the "
                f"mode is {self.mode.value}",
                component=str(component),
                expected=expected,
            )


class Patch(PerturbationBase, frozen=True, kw_only=True, tag="patch"):
    """Its output in the run of another prompt of the same number of tokens."""

    source_prompt: Prompt


Perturbation: TypeAlias = ZeroAblation | Amplify | Invert | Noise | MeanAblation | Inject | Patch


class PerturbationScan(
    TargetedScan, frozen=True, kw_only=True, tag="perturbation", tag_field="scan_mode"
):
    """The model reading a prompt, clean and perturbed, side by side."""

    perturbations: Annotated[tuple[Perturbation, ...], Meta(max_length=256)] = ()
    """All applied in one run, in this order where they meet. Empty: nothing is changed."""
    top_predictions: Annotated[int, Meta(ge=1, le=100)] = 10
    perturbed_scan: bool = True
    """Whether to report the activations of the perturbed run."""
    calibration: CalibrationKey | None = None
    """Scan key of the calibration whose means `ablate` uses; the model's own where left out."""
    canonical: bool = False
    """Run in a forward of its own: bit-identical on equal machines, whatever else is asked at the time."""

    @property
    def n_draws(self) -> int:
        """Perturbed rows: as many as its noise is drawn, at least one."""
        return max((p.draws for p in self.perturbations if isinstance(p, Noise)), default=1)

    @property
    def n_rows(self) -> int:
        """The clean prompt, the perturbed ones, and what patches are taken from."""
        return 1 + self.n_draws + len(self.other_prompts)

    @property
    def shared_forward(self) -> Forward | None:
        """With others who perturb the model, in whatever way."""
        return None if self.canonical else Forward.EDITED

    @property
    def other_prompts(self) -> tuple[str, ...]:
        """Source prompts of patches, each once."""
        return tuple(
            dict.fromkeys(p.source_prompt for p in self.perturbations if isinstance(p, Patch))
        )

    @property
    def needs_calibration(self) -> bool:
        """Mean ablation puts calibrated means in a component's place."""
        return any(isinstance(p, MeanAblation) for p in self.perturbations)

    def check(self, architecture: Architecture) -> None:
        """Raises `UnknownComponent`, `InvalidAddress` or `Unprocessable` naming what is wrong."""
        super().check(architecture)
        for perturbation in self.perturbations:
            component = architecture.check(Component.parse(perturbation.component))
            if component.kind is Kind.UNEMBED:
                raise Unprocessable(
                    "unembed cannot be perturbed: nothing reads it but the logits; perturb the last "
                    "resid_post instead",
                    component=str(component),
                )
            if isinstance(perturbation, Inject):
                perturbation.check_values(component, architecture)


class Direction(Choice):
    """Which run is patched with the other's activations (Heimersheim & Nanda 2024)."""

    DENOISING = "denoising"
    """Clean activations into the corrupted run: what suffices to restore the answer."""
    NOISING = "noising"
    """Corrupted activations into the clean run: what is needed for it."""


class PatchSite(Choice):
    """What is patched, for every layer (and head) and every position."""

    RESIDUAL = "resid_pre"
    """The residual stream entering the block."""
    ATTENTION = "attn"
    MLP = "mlp"
    HEAD = "head"


class PatchingScan(TargetedScan, frozen=True, kw_only=True, tag="patching", tag_field="scan_mode"):
    """Activation patching between two prompts of equal token length, as layer x position maps.

    Recovery = (patched - corrupted) / (clean - corrupted) of the metric, in either direction: 0 is the
    corrupted run, 1 the clean one. Unclamped, and undefined (NaN) where the two runs differ by less than
    0.1. The metric is the logit difference answer - foil where there is a foil, else the answer's
    log-probability in nats. (Zhang & Nanda 2024.)
    """

    corrupt_prompt: Prompt
    direction: Direction = Direction.DENOISING
    sites: Annotated[tuple[PatchSite, ...], Meta(min_length=1, max_length=4)] = (
        PatchSite.RESIDUAL,
        PatchSite.ATTENTION,
        PatchSite.MLP,
    )

    @property
    def other_prompts(self) -> tuple[str, ...]:
        """The corrupt prompt."""
        return (self.corrupt_prompt,)

    def check(self, architecture: Architecture) -> None:
        """Raises `Unprocessable` where there is nothing to patch."""
        super().check(architecture)
        if self.corrupt_prompt == self.prompt:
            raise Unprocessable(
                f"corrupt_prompt is the prompt itself, {self.prompt!r}: expected one that differs, or "
                "there is nothing to recover"
            )


class TraceKind(Choice):
    """What causal tracing restores (Meng et al. 2022, figure 2)."""

    STATE = "state"
    """The residual stream leaving one block."""
    MLP = "mlp"
    """What the MLPs of a window of layers write."""
    ATTENTION = "attn"
    """What the attention layers of a window of layers write."""


class TracingScan(TargetedScan, frozen=True, kw_only=True, tag="tracing", tag_field="scan_mode"):
    """Causal tracing (Meng et al. 2022): noise on the subject's embeddings, then states restored.

    Indirect effect = the answer's probability with the clean values put back at one place and position,
    minus its probability in the corrupted run; with a foil, the same of the logit difference answer -
    foil. Mean and standard deviation over draws of the noise.
    """

    subject: Annotated[str, Meta(min_length=1, max_length=2000)]
    """Text in the prompt whose tokens are corrupted; its last occurrence."""
    sigma: Annotated[float, Meta(gt=0, le=1000)] = 3.0
    """Noise in standard deviations of the embedding matrix's entries."""
    draws: Annotated[int, Meta(ge=1, le=32)] = 3
    seed: Seed = 0
    window: Annotated[int, Meta(ge=1, le=101)] = 6
    """Layers restored together for `mlp` and `attn`, centred on the layer shown."""
    kinds: Annotated[tuple[TraceKind, ...], Meta(min_length=1, max_length=3)] = (
        TraceKind.STATE,
        TraceKind.MLP,
        TraceKind.ATTENTION,
    )

    def check(self, architecture: Architecture) -> None:
        """Raises `Unprocessable` where the prompt has no such subject."""
        super().check(architecture)
        self._subject_start()

    def subject_positions(self, tokens: Tokens) -> tuple[int, ...]:
        """Positions of the tokens that hold any of the subject's characters, in order.

        Raises `Unprocessable` where the prompt has no such subject, none of its tokens holds it, or it has
        not been read by the position whose next token is asked about.
        """
        start = self._subject_start()
        end = start + len(self.subject)
        positions = tuple(
            position
            for position, span in enumerate(tokens.spans)
            if max(span.start, start) < min(span.end, end)
        )
        if not positions:
            raise Unprocessable(f"no token of the prompt holds the subject {self.subject!r}")
        (target,) = resolve_positions((self.target_token_idx,), len(tokens))
        if positions[-1] > target:
            raise Unprocessable(
                f"the subject {self.subject!r} ends at token {positions[-1]}, and the next token after "
                f"{target} is asked about: expected a subject that has been read by then",
                subject=self.subject,
                target_token_idx=self.target_token_idx,
            )
        return positions

    def layers(self, layer: int, n_layers: int) -> range:
        """The layers restored together for `layer`: fewer than `window` at either end of the model."""
        before = self.window // 2
        return range(max(0, layer - before), min(n_layers, layer - before + self.window))

    def _subject_start(self) -> int:
        start = self.prompt.rfind(self.subject)
        if start < 0:
            raise Unprocessable(
                f"the subject {self.subject!r} does not stand in the prompt {self.prompt!r}",
                subject=self.subject,
            )
        return start
