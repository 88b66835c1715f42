"""The channels of FLAIR: what is read off the lens, one number a position or one a layer and position.

A scan and the calibration it is read against measure them here alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worker.scanner import logit_lens
from worker.scanner.lens_maps import Affine, applied, support_layers
from worker.scanner.loading import LoadedModel
from worker.scanner.logit_lens import FinalReadings, LensReadings, Readings
from worker.scanner.ordinary import Ordinary
from worker.scanner.residuals import Residuals

__all__ = (
    "Channels",
    "LensSet",
    "Measured",
    "channels",
    "derived",
    "gain",
    "measure",
    "measure_each",
    "support",
)

Channels = dict[str, Float[Tensor, "row pos"]]
"""By name. `kl`, `js`, `entropy`: a row a place between blocks, the last excepted. `attn`, `mlp`: a row a
layer. All others one row."""


class LensSet(NamedTuple):
    """The maps of one scan; None for the raw lens."""

    outer: Affine | None
    """At `embed` and after each block but the last."""
    inner: Affine | None
    """Inside each block."""
    support: Affine | None
    """After each of `support_layers`."""


class Measured(NamedTuple):
    """One prompt's readings."""

    final: FinalReadings
    outer: LensReadings
    """At `embed` and after each block, or after the last alone: the model's own prediction."""
    inner: LensReadings | None
    """Inside each block, at `inner_at` alone."""
    inner_at: Int[Tensor, " inner_pos"]
    """Which of the positions."""
    support: LensReadings
    """After each of `support_layers`."""
    asked: tuple[int, ...]
    """The tokens asked about."""
    logits: Float[Tensor, "target d_vocab"]
    """The model's own at the target; no row where there is none."""


def measure(
    model: LoadedModel,
    residuals: Residuals,
    lenses: LensSet,
    inner_at: Int[Tensor, " inner_pos"],
    *,
    appearance: bool = True,
    asked: tuple[int | None, ...] = (),
    target: int | None = None,
    after_chunk: Callable[[int], None] | None = None,
) -> Measured:
    """Hold the lenses to what was read. `asked`, `target` and `after_chunk` as in `logit_lens.read`.

    Without `appearance`, between blocks only to the last residual.
    """
    final, inner = residuals.outer[-1], residuals.inner
    together = 0 < len(inner_at) == len(final)
    places = _Places.of(residuals, lenses, appearance=appearance, inside=together)
    found = logit_lens.read(
        model, places.mapped, final, asked=asked, target=target, after_chunk=after_chunk
    )
    inside = None
    if len(inner_at) and not together:
        at = inner_at.to(final.device)
        inside = logit_lens.read(
            model, applied(lenses.inner, inner), final[at], asked=found.asked
        ).lens
    return places.measured(found, inner_at, inside)


def measure_each(
    model: LoadedModel,
    residuals: Residuals,
    lenses: LensSet,
    *,
    appearance: bool = True,
    asked: Sequence[tuple[int | None, ...]],
    after_chunk: Callable[[int], None] | None = None,
) -> list[Measured]:
    """The same of several prompts' targets, a position each; inside the blocks at all of them or at none."""
    inside = residuals.inner.shape[1] > 0
    places = _Places.of(residuals, lenses, appearance=appearance, inside=inside)
    inner_at = torch.arange(1 if inside else 0)
    return [
        places.measured(found, inner_at, None)
        for found in logit_lens.read_each(
            model, places.mapped, residuals.outer[-1], asked=asked, after_chunk=after_chunk
        )
    ]


class _Places(NamedTuple):
    """Where the lenses are held to the stream, one after another."""

    mapped: Float[Tensor, "place pos d_model"]
    """The stream there, as each lens has it."""
    n_outer: int
    n_support: int
    inside: bool
    """Whether the places inside the blocks come last."""

    @classmethod
    def of(
        cls, residuals: Residuals, lenses: LensSet, *, appearance: bool, inside: bool
    ) -> "_Places":
        """Without `appearance`, between blocks only where support is read."""
        outer = residuals.outer[:-1]
        after_support = residuals.outer[[layer + 1 for layer in support_layers(len(outer))]]
        mapped = [applied(lenses.support, after_support)]
        if appearance:
            mapped.insert(0, applied(lenses.outer, outer))
        if inside:
            mapped.append(applied(lenses.inner, residuals.inner))
        n_outer = len(outer) if appearance else 0
        return cls(torch.cat(mapped), n_outer, len(after_support), inside)

    def measured(
        self, found: Readings, inner_at: Int[Tensor, " inner_pos"], inside: LensReadings | None
    ) -> Measured:
        """One prompt's readings here; `inside` the blocks where those were read by themselves."""
        first_inner = self.n_outer + self.n_support
        return Measured(
            final=found.final,
            outer=_with_last(_rows(found.lens, slice(self.n_outer)), found.final),
            inner=_rows(found.lens, slice(first_inner, None)) if self.inside else inside,
            inner_at=inner_at,
            support=_rows(found.lens, slice(self.n_outer, first_inner)),
            asked=found.asked,
            logits=found.logits,
        )


def gain(measured: Measured) -> Float[Tensor, " pos"]:
    """Retrieval gain of the model's own next token: log p(y) - mean over support lenses of log q(y).

    Low where the prediction is what the model would have made anyway, without anything recalled.
    """
    return measured.final.log_probability - measured.support.own.mean(0)


def channels(
    measured: Measured, *, kl_weight: float = 0.6, entropy_weight: float = 0.4
) -> Channels:
    """All channels, on the CPU. Those of sublayers stand at `inner_at`, where it is not empty.

    Those of the layers are left out where the lens was not held to them.
    """
    final, outer = measured.final, measured.outer
    found = {
        "final_entropy": final.entropy.unsqueeze(0),
        "log_probability": final.log_probability.unsqueeze(0),
        "margin": final.margin.unsqueeze(0),
        "gain": gain(measured).unsqueeze(0),
    }
    if len(outer.kl) > 1:
        score = kl_weight * outer.kl[1:-1] + entropy_weight * outer.entropy[1:-1]
        found |= {
            "kl": outer.kl[:-1],
            "js": outer.js[:-1],
            "entropy": outer.entropy[:-1],
            "seed_score": score.mean(0, keepdim=True),
        }
    if measured.inner is not None:
        around = outer.kl[:, measured.inner_at.to(outer.kl.device)]
        found["attn"] = measured.inner.kl - around[:-1]
        found["mlp"] = around[1:] - measured.inner.kl
    return {name: values.cpu() for name, values in found.items()}


def derived(found: Channels, known: Mapping[str, Ordinary]) -> Channels:
    """Channels that are made of how ordinary others are.

    `support`; `extreme_lens`, the largest |z| of KL over all layers; `extreme_node`, the largest |z| over
    all sublayers. One bound on an extreme holds for a whole picture, however many layers it has.
    """
    made = {"support": support(found["gain"], found["margin"], known)}
    if "kl" in found:
        made["extreme_lens"] = _largest(known["kl"].z(found["kl"]))
    if "attn" in found:
        z = torch.cat([known[name].z(found[name]) for name in ("attn", "mlp")])
        made["extreme_node"] = _largest(z)
    return made


def support(
    gains: Float[Tensor, "row pos"],
    margins: Float[Tensor, "row pos"],
    known: Mapping[str, Ordinary],
) -> Float[Tensor, "row pos"]:
    """How well an answer is supported: the mean of z(gain) and z(margin). Low is suspicious."""
    return (known["gain"].z(gains) + known["margin"].z(margins)) / 2


def _largest(z: Float[Tensor, "row pos"]) -> Float[Tensor, "one pos"]:
    return z.abs().nan_to_num(nan=0.0).amax(0, keepdim=True)


def _rows(lens: LensReadings, rows: slice) -> LensReadings:
    return LensReadings(*(values[rows] for values in lens))


def _with_last(lens: LensReadings, final: FinalReadings) -> LensReadings:
    """The last residual through the lens is the model's own prediction: no divergence."""
    nothing = torch.zeros_like(final.entropy)
    last = LensReadings(
        kl=nothing,
        js=nothing,
        entropy=final.entropy,
        top=final.top,
        top_log_probability=final.log_probability,
        own=final.log_probability,
        asked=final.asked,
        rank=final.rank,
    )
    return LensReadings(
        *(torch.cat([rows, row.unsqueeze(0)]) for rows, row in zip(lens, last, strict=True))
    )
