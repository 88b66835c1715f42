"""The logit lens: what the model would predict next if it stopped early.

    lens(x) = softmax(softcap(s W_U norm_f(A x + b)))

with A = 1, b = 0 for the raw lens (nostalgebraist 2020) and a fitted map otherwise (`lens_maps`), and s = 1
but for families that scale their logits (Cohere, Granite). The last residual read so is the model's own
prediction.

The unembedding is most of the work, and a fresh temporary as wide as a vocabulary costs as much again. So
places and positions are read together, chunk by chunk, in two buffers that are made once: one that keeps
the matrix product busy, one that a processor's cache can hold, in which every quantity is taken before the
next rows come. How the rows are cut depends on shapes alone, so that equal scans give equal digits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worker.scanner.halving import portion
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import largest

__all__ = ("FinalReadings", "LensReadings", "Readings", "read", "read_each", "unembed")

_PRODUCT_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30}
"""Logits that one matrix product makes: enough that reading W_U is not what it spends its time on."""
_CACHED_BYTES = {"cpu": 3 << 18, "cuda": 1 << 28}
"""Logits that are measured together: what, with as many again twice, stays in a cache."""
_COLUMNS = {"cpu": 4096, "cuda": 1 << 30}
"""Tokens that one matrix product is for: on a processor, so much of W_U as stays in its cache meanwhile."""


class FinalReadings(NamedTuple):
    """What the model itself predicts at each position."""

    entropy: Float[Tensor, " pos"]
    top: Int[Tensor, " pos"]
    """The likeliest next token."""
    log_probability: Float[Tensor, " pos"]
    """Of `top`."""
    margin: Float[Tensor, " pos"]
    """By how many logits `top` beats the next."""
    asked: Float[Tensor, "pos asked"]
    """Log-probability of each token asked about."""
    rank: Int[Tensor, " pos"]
    """Tokens likelier than the first one asked about; -1 where none was."""


class LensReadings(NamedTuple):
    """What the lens predicts at each place and position, beside what the model does. Nats."""

    kl: Float[Tensor, "place pos"]
    """D_KL(model ‖ lens), at least 0."""
    js: Float[Tensor, "place pos"]
    """Jensen-Shannon divergence of the two, from 0 to log 2."""
    entropy: Float[Tensor, "place pos"]
    """Of the lens's prediction, from 0 to log d_vocab."""
    top: Int[Tensor, "place pos"]
    """The lens's likeliest next token."""
    top_log_probability: Float[Tensor, "place pos"]
    own: Float[Tensor, "place pos"]
    """The lens's log-probability of the token that the model finds likeliest."""
    asked: Float[Tensor, "place pos asked"]
    rank: Int[Tensor, "place pos"]
    """Tokens that the lens finds likelier than the first one asked about; -1 where none was."""


class Readings(NamedTuple):
    """All of it, on the model's device."""

    final: FinalReadings
    lens: LensReadings
    asked: tuple[int, ...]
    """The tokens asked about."""
    logits: Float[Tensor, "target d_vocab"]
    """The model's own at the target; no row where there is none."""


def unembed(
    model: LoadedModel,
    residuals: Float[Tensor, "*rows d_model"],
    out: Float[Tensor, "flat d_vocab"] | None = None,
) -> Float[Tensor, "flat d_vocab"]:
    """Logits of residuals as the model reads its last one: final norm, unembedding, scale, soft-cap.

    In the model's own type, as the model does it; `out` is written to where it is given.
    """
    normed = model.modules.final_norm(residuals.to(model.plain.dtype)).flatten(0, -2)
    head = model.modules.unembed
    weight = head.get_parameter("weight")
    logits = normed.new_empty(len(normed), len(weight)) if out is None else out
    width = _COLUMNS[model.device.type]
    for first in range(0, len(weight), width):
        columns = slice(first, first + width)
        torch.mm(normed, weight[columns].T, out=logits[:, columns])
    bias = getattr(head, "bias", None)
    if bias is not None:
        logits += bias
    if model.logit_scale != 1.0:
        logits *= model.logit_scale
    cap = model.architecture.final_softcap
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


@torch.inference_mode()
def read(
    model: LoadedModel,
    places: Float[Tensor, "place pos d_model"],
    final: Float[Tensor, "pos d_model"],
    *,
    asked: tuple[int | None, ...] = (),
    target: int | None = None,
    after_chunk: Callable[[int], None] | None = None,
) -> Readings:
    """Hold the lens to residuals, already mapped by it.

    Args:
        model: The model.
        places: Residuals at each place and position, mapped.
        final: What the final norm reads, at the same positions.
        asked: Tokens whose log-probabilities are wanted; the first one's rank as well. None is the one
            that the model finds likeliest at the target.
        target: Which of the positions is read first, its logits kept.
        after_chunk: Called with the number of positions that are done; may raise to stop.
    """
    one = {} if target is None else {target: slice(None)}
    wanted = torch.tensor([-1 if token is None else token for token in asked], dtype=torch.int64)
    everywhere = wanted.expand(final.shape[0], -1).clone()
    found = _read(model, places, final, everywhere, one, after_chunk)
    known = found.asked[0] if len(found.asked) else wanted
    return Readings(*found.numbers, tuple(known.tolist()), found.logits)


@torch.inference_mode()
def read_each(
    model: LoadedModel,
    places: Float[Tensor, "place prompt d_model"],
    final: Float[Tensor, "prompt d_model"],
    *,
    asked: Sequence[tuple[int | None, ...]],
    after_chunk: Callable[[int], None] | None = None,
) -> list[Readings]:
    """The same of one position of each of several prompts, which is its target: what `read` gives of each.

    To the last digits but one. What reading W_U costs they share; so each of few places is worth it most.
    """
    width = max(map(len, asked))
    wanted = torch.tensor(
        [
            [-1 if token is None else token for token in tokens] + [0] * (width - len(tokens))
            for tokens in asked
        ]
    )
    own = {position: slice(position, position + 1) for position in range(len(asked))}
    found = _read(model, places, final, wanted, own, after_chunk)
    known = found.asked.tolist()
    return [
        Readings(
            _only(found.numbers[0], (at,), len(asked[position])),
            _only(found.numbers[1], (slice(None), at), len(asked[position])),
            tuple(known[position][: len(asked[position])]),
            found.logits[at],
        )
        for position, at in own.items()
    ]


R = TypeVar("R", FinalReadings, LensReadings)


def _only(readings: R, at: tuple[slice, ...], n_asked: int) -> R:
    """Those at some positions, of so many tokens asked about."""
    values = {name: value[at] for name, value in readings._asdict().items()}
    return readings._replace(**{**values, "asked": values["asked"][..., :n_asked]})


class _Found(NamedTuple):
    numbers: tuple[FinalReadings, LensReadings]
    asked: Int[Tensor, "pos asked"]
    logits: Float[Tensor, "target d_vocab"]


def _read(
    model: LoadedModel,
    places: Float[Tensor, "place pos d_model"],
    final: Float[Tensor, "pos d_model"],
    asked: Int[Tensor, "pos asked"],
    targets: Mapping[int, slice],
    after_chunk: Callable[[int], None] | None,
) -> _Found:
    """Chunk by chunk, `targets` first: what is likeliest there is what -1 asks about at their positions."""
    n_places, n_positions, _ = places.shape
    d_vocab = model.modules.unembed.get_parameter("weight").shape[0]
    device, kind = model.device, model.device.type
    rows = 1 + n_places
    row_bytes = d_vocab * places.element_size()
    at_once = max(1, min(n_positions, portion(_PRODUCT_BYTES[kind]) // (rows * row_bytes)))
    product = torch.empty(rows * at_once, d_vocab, device=device, dtype=model.plain.dtype)
    chunks = [
        slice(start, min(start + at_once, n_positions)) for start in range(0, n_positions, at_once)
    ]
    # Those with a target come first, the others in their order.
    chunks.sort(key=lambda chunk: not any(at in range(chunk.start, chunk.stop) for at in targets))
    measuring = _Measuring(n_places, at_once, d_vocab, asked.to(device))
    kept: dict[int, Float[Tensor, " d_vocab"]] = {}
    done = 0
    for chunk in chunks:
        width = chunk.stop - chunk.start
        together = torch.cat([final[chunk].unsqueeze(0), places[:, chunk]])
        logits = unembed(model, together, out=product[: rows * width]).view(rows, width, d_vocab)
        for target in targets.keys() & range(chunk.start, chunk.stop):
            kept[target] = logits[0, target - chunk.start].clone()
            measuring.ask(targets[target], int(kept[target].argmax()))
        measuring.measure(chunk, logits)
        done += width
        if after_chunk is not None:
            after_chunk(done)
    logits = torch.stack([kept[target] for target in targets]) if targets else product[:0]
    return _Found(measuring.readings(), measuring.asked.cpu(), logits)


class _Measuring:
    """Takes every quantity of some rows of logits while they are in the cache."""

    def __init__(
        self, n_places: int, at_once: int, d_vocab: int, asked: Int[Tensor, "pos asked"]
    ) -> None:
        self.asked = asked
        """Which tokens to look for at each position; -1 for what is not known yet."""
        device, (n_positions, n_asked) = asked.device, asked.shape
        self._step = max(1, _CACHED_BYTES[device.type] // (4 * at_once * d_vocab))
        self._step = min(self._step, max(1, n_places))
        self._log_p = torch.empty(at_once, d_vocab, device=device)
        self._p = torch.empty(at_once, d_vocab, device=device)
        self._log_q = torch.empty(self._step * at_once * d_vocab, device=device)
        self._spare = torch.empty_like(self._log_q)

        def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self._final = FinalReadings(
            entropy=numbers(n_positions),
            top=numbers(n_positions, dtype=torch.int64),
            log_probability=numbers(n_positions),
            margin=numbers(n_positions),
            asked=numbers(n_positions, n_asked),
            rank=torch.full((n_positions,), -1, device=device),
        )
        self._lens = LensReadings(
            kl=numbers(n_places, n_positions),
            js=numbers(n_places, n_positions),
            entropy=numbers(n_places, n_positions),
            top=numbers(n_places, n_positions, dtype=torch.int64),
            top_log_probability=numbers(n_places, n_positions),
            own=numbers(n_places, n_positions),
            asked=numbers(n_places, n_positions, n_asked),
            rank=torch.full((n_places, n_positions), -1, device=device),
        )

    def ask(self, positions: slice, likeliest: int) -> None:
        """What is likeliest is looked for where nothing else was."""
        own = self.asked[positions]
        own[own < 0] = likeliest

    def readings(self) -> tuple[FinalReadings, LensReadings]:
        """What was measured. Divergences that rounding left below 0 are 0."""
        self._lens.kl.clamp_min_(0)
        self._lens.js.clamp_(0, math.log(2))
        return self._final, self._lens

    def measure(self, chunk: slice, logits: Float[Tensor, "row pos d_vocab"]) -> None:
        """Row 0 is the model's own prediction, the others are the lens's at each place."""
        width = logits.shape[1]
        log_p, p = self._log_p[:width], self._p[:width]
        self._measure_final(chunk, logits[0], log_p, p)
        for first in range(1, len(logits), self._step):
            some = logits[first : first + self._step]
            self._measure_lens(slice(first - 1, first - 1 + len(some)), chunk, some, p)

    def _measure_final(
        self,
        chunk: slice,
        logits: Float[Tensor, "pos d_vocab"],
        log_p: Float[Tensor, "pos d_vocab"],
        p: Float[Tensor, "pos d_vocab"],
    ) -> None:
        found = self._final
        torch.log_softmax(logits.float(), -1, out=log_p)
        torch.exp(log_p, out=p)
        top = largest(log_p, 2)
        found.top[chunk], found.log_probability[chunk] = top.indices[:, 0], top.values[:, 0]
        found.margin[chunk] = top.values[:, 0] - top.values[:, 1]
        found.entropy[chunk] = torch.linalg.vecdot(p, log_p).neg_()
        found.asked[chunk] = log_p.gather(-1, self.asked[chunk])
        if self.asked.shape[1]:
            found.rank[chunk] = (log_p > found.asked[chunk][:, :1]).sum(-1)

    def _measure_lens(
        self,
        places: slice,
        chunk: slice,
        logits: Float[Tensor, "place pos d_vocab"],
        p: Float[Tensor, "pos d_vocab"],
    ) -> None:
        found, at = self._lens, (places, chunk)
        log_q = self._log_q[: logits.numel()].view(logits.shape)
        spare = self._spare[: logits.numel()].view(logits.shape)
        torch.log_softmax(logits.float(), -1, out=log_q)
        top = largest(log_q, 1)
        found.top[at], found.top_log_probability[at] = top.indices[..., 0], top.values[..., 0]
        own = self._final.top[chunk].expand(logits.shape[:-1]).unsqueeze(-1)
        found.own[at] = log_q.gather(-1, own).squeeze(-1)
        found.asked[at] = log_q.gather(-1, self.asked[chunk].expand(len(log_q), -1, -1))
        if self.asked.shape[1]:
            # As float32: a sum of booleans takes longer than the matrix product. Exact up to 2^24.
            torch.gt(log_q, found.asked[at][..., :1], out=spare)
            found.rank[at] = spare.sum(-1).long()
        entropy_p = self._final.entropy[chunk]
        found.kl[at] = torch.linalg.vecdot(p, log_q).add_(entropy_p).neg_()
        torch.exp(log_q, out=spare)
        entropy_q = torch.linalg.vecdot(spare, log_q).neg_()
        found.entropy[at] = entropy_q
        # JS = H(m) - (H(p) + H(q)) / 2, with m halfway between p and q.
        spare.add_(p).mul_(0.5)
        # Where both are 0, so is m log m: a floor below every other m keeps the logarithm finite.
        torch.clamp_min(spare, torch.finfo(torch.float32).tiny, out=log_q).log_()
        found.js[at] = torch.linalg.vecdot(spare, log_q).add_((entropy_p + entropy_q) / 2).neg_()
