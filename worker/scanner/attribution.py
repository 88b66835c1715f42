"""Estimates of every component's effect, from gradients.

*Attribution patching* (Nanda 2023; Syed et al. 2023): to first order, the effect of replacing a component is
the difference that makes to its value, times the metric's gradient there. One forward and one backward pass
give all of them. *Integrated gradients* (EAP-IG, inputs; Hanna et al. 2024) average the gradient over the
straight line from the corrupt prompt's embeddings to the clean one's, where a single one may have saturated.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from neural_mri.contract.components import Component, Kind
from worker.scanner import linear_maps
from worker.scanner.halving import portion
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run, embedded, record

__all__ = (
    "Differentiated",
    "StraightPath",
    "differentiate",
    "estimates",
    "in_metric",
    "slope",
    "steps_at_once",
)

_LARGE_MAP = 1 << 19
"""Weights of a linear map whose gradient is worth a function of its own."""
_PATH_TOKENS = 4096
"""Tokens of a path that are differentiated together."""


class Gradients(NamedTuple):
    """Of a metric, at what components write and read. Tuples have an entry a layer."""

    z: tuple[Float[Tensor, "batch pos heads_by_d_head"], ...]
    attn: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlp: tuple[Float[Tensor, "batch pos d_model"], ...]
    attn_reads: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlp_reads: tuple[Float[Tensor, "batch pos d_model"], ...]
    embed: Float[Tensor, "batch pos d_model"]
    """At the residual that enters block 0."""
    final: Float[Tensor, "batch pos d_model"]


class Differentiated(NamedTuple):
    """A run and the metric's gradients in it, row by row."""

    run: Run
    gradients: Gradients

    def row(self, row: int) -> "Differentiated":
        """One prompt of the batch."""

        def layers(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(value[row : row + 1] for value in values)

        found = self.gradients
        return Differentiated(
            self.run.row(row),
            Gradients(
                z=layers(found.z),
                attn=layers(found.attn),
                mlp=layers(found.mlp),
                attn_reads=layers(found.attn_reads),
                mlp_reads=layers(found.mlp_reads),
                embed=found.embed[row : row + 1],
                final=found.final[row : row + 1],
            ),
        )


def slope(metric: Metric, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """What is differentiated: the metric, or where it is a log-probability, the answer's log-odds.

    A log-probability near 0 has no slope left. The log-odds go on, in the same direction.
    """
    if metric.foil_id is not None:
        return metric(logits)
    exact = logits.float()
    is_answer = torch.arange(exact.shape[-1], device=exact.device) == metric.answer_id
    return exact[..., metric.answer_id] - exact.masked_fill(is_answer, -torch.inf).logsumexp(-1)


def in_metric(
    metric: Metric,
    logits: Float[Tensor, " d_vocab"],
    first_order: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Changes of the metric, from changes of what was differentiated.

    The same where there is a foil. Else a change of log-odds, which the logistic function bounds: no
    component can raise a log-probability above 0.
    """
    if metric.foil_id is not None:
        return first_order
    odds = slope(metric, logits)
    return logsigmoid(odds + first_order) - logsigmoid(odds)


def differentiate(
    model: LoadedModel,
    ids: Int[Tensor, "batch pos"],
    scalar: Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, ""]],
    *,
    rows: int | None = None,
    embeddings: Float[Tensor, "batch pos d_model"] | None = None,
    on_layer: Callable[[int], None] | None = None,
    on_layer_back: Callable[[], None] | None = None,
) -> Differentiated:
    """Run the plain twin forward and back once.

    Args:
        model: The model: frozen, so that only activations get gradients.
        ids: Prompts of equal length.
        scalar: What is differentiated, of the logits after the last position.
        rows: How many prompts, from the first, it is made of: the gradients of the others are 0, and
            little is done for them. All where None.
        embeddings: Token embeddings to read instead of the prompts' own.
        on_layer: Called after each block of the forward pass; may raise to stop.
        on_layer_back: Called after each block of the backward pass; may raise to stop.
    """
    # The caller's thread may be in inference mode, where nothing can be differentiated.
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = (embedded(model, ids) if embeddings is None else embeddings).clone().requires_grad_()
        with _sparsely_unembedding(model), _going_back_along(model, rows, of=len(ids)):
            run = record(model, ids, embeddings=leaf, on_layer=on_layer)
        if on_layer_back is not None:
            for resid_pre in run.resid_pre:
                resid_pre.register_hook(lambda _gradient: on_layer_back())  # type: ignore[no-untyped-call]
        places = (run.z, run.attn, run.mlp, run.attn_reads, run.mlp_reads)
        wanted = [tensor for layers in places for tensor in layers]
        found = torch.autograd.grad(scalar(run.logits), [*wanted, run.resid_pre[0], run.final])
    n_layers = len(run.z)
    z, attn, mlp, attn_reads, mlp_reads = (
        found[at : at + n_layers] for at in range(0, len(wanted), n_layers)
    )
    gradients = Gradients(z, attn, mlp, attn_reads, mlp_reads, embed=found[-2], final=found[-1])
    return Differentiated(run.detached(), gradients)


@contextmanager
def _going_back_along(model: LoadedModel, rows: int | None, *, of: int) -> Iterator[None]:
    """The next forward's graph leads back along the first rows alone, where that is less than all.

    Most of a backward pass is spent in the blocks' large linear maps; what lies between them goes back along
    zeros, and so do small maps, where a few more rows cost less than a call into Python.
    """
    if rows is None or rows == of:
        yield
        return
    maps = [
        linear_map
        for block in model.modules.blocks
        for linear_map in linear_maps.of(block.block)
        if linear_map.weight.numel() >= _LARGE_MAP
    ]
    with linear_maps.computing(maps, back_along=rows):
        yield


class _Unembedding(torch.autograd.Function):
    """Logits whose gradient, where it is of a few tokens, reads those tokens' rows of W_U alone.

    The whole of W_U is a fifth of a small model: reading it for the two logits of a difference would cost
    as much as six blocks.
    """

    @staticmethod
    def forward(ctx: Any, _normed: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """The logits, as they were computed."""
        ctx.save_for_backward(weight)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient at what the unembedding read."""
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        tokens = gradient.flatten(0, -2).any(0).nonzero().squeeze(1)
        if len(tokens) < len(weight) // 8:
            return gradient[..., tokens] @ weight[tokens], None, None
        return linear_maps.linear(gradient, weight.T), None, None


@contextmanager
def _sparsely_unembedding(model: LoadedModel) -> Iterator[None]:
    unembed = model.modules.unembed
    weight = unembed.get_parameter("weight").detach()

    def replaced(_module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        found: Tensor = _Unembedding.apply(args[0], logits.detach(), weight)  # type: ignore[no-untyped-call]
        return found

    handle = unembed.register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


def steps_at_once(n_tokens: int) -> int:
    """Points of a path that are differentiated together, for prompts of so many tokens; at least one."""
    return max(1, portion(_PATH_TOKENS) // n_tokens)


class StraightPath:
    """The clean prompt's embeddings, mixed with more and more of the corrupt ones'.

    Iterating over it differentiates the metric in the middle of each of `steps` equal parts of the way,
    some of them at a time, whenever it is iterated over: a long path is not kept.
    """

    def __init__(
        self,
        model: LoadedModel,
        clean_ids: Int[Tensor, "1 pos"],
        corrupt_ids: Int[Tensor, "1 pos"],
        metric: Metric,
        steps: int,
        on_layer: Callable[[int], None] | None = None,
        on_layer_back: Callable[[], None] | None = None,
    ) -> None:
        self._model = model
        self._ids = clean_ids
        self._metric = metric
        self._on_layer, self._on_layer_back = on_layer, on_layer_back
        with torch.inference_mode(mode=False), torch.no_grad():
            corrupt, clean = embedded(model, corrupt_ids), embedded(model, clean_ids)
            share = (torch.arange(steps, device=model.device) + 0.5) / steps
            points = corrupt + share.to(clean.dtype)[:, None, None] * (clean - corrupt)
        self._parts = torch.split(points, steps_at_once(clean_ids.shape[1]))
        self._kept: Differentiated | None = None

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Differentiated]:
        if len(self._parts) > 1:
            yield from map(self._differentiated, self._parts)
            return
        if self._kept is None:
            self._kept = self._differentiated(self._parts[0])
        yield self._kept

    def _differentiated(self, points: Float[Tensor, "batch pos d_model"]) -> Differentiated:
        return differentiate(
            self._model,
            self._ids.expand(len(points), -1),
            lambda logits: slope(self._metric, logits).sum(),
            embeddings=points,
            on_layer=self._on_layer,
            on_layer_back=self._on_layer_back,
        )


def estimates(
    components: Sequence[Component],
    clean: Run,
    replacements: Replacements,
    path: Sequence[Differentiated] | StraightPath,
) -> Float[Tensor, " component"]:
    """First-order effect of replacing each component: difference x gradient, summed over positions.

    The gradient is the mean over the rows of `path`: the clean run alone, or a `StraightPath`. The effect is
    one on what was differentiated.
    """
    layers = {
        kind: sorted({c.layer or 0 for c in components if c.kind is kind})
        for kind in dict.fromkeys(component.kind for component in components)
    }
    n_rows = 0
    summed = torch.zeros(())
    for part in path:
        n_rows += len(part.gradients.embed)
        # Brought to the processor together: on a GPU each transfer waits for what was queued before it.
        found = [
            _of_kind(kind, of_kind, clean, replacements, part.gradients)
            for kind, of_kind in layers.items()
        ]
        summed = summed + torch.cat(found).cpu()
        del part, found  # or they would be held while the next part is differentiated
    n_heads = clean.z[0].shape[-1] // replacements.d_head
    rows: dict[Component, int] = {}
    for kind, of_kind in layers.items():
        indices = range(n_heads) if kind is Kind.HEAD else (None,)
        for layer in of_kind:
            for index in indices:
                rows[Component(kind, None if kind is Kind.EMBED else layer, index)] = len(rows)
    return summed[[rows[component] for component in components]] / n_rows


def _of_kind(
    kind: Kind,
    layers: Sequence[int],
    clean: Run,
    replacements: Replacements,
    gradients: Gradients,
) -> Float[Tensor, " layer_by_index"]:
    """Estimates of all components of a kind in some layers, summed over the rows of the gradients.

    Stacked first: a small model has so many layers that their operations are what takes time.
    """
    match kind:
        case Kind.HEAD:
            old, new, found = clean.z, replacements.z, gradients.z
        case Kind.ATTN:
            old, new, found = clean.attn, replacements.attn, gradients.attn
        case Kind.MLP:
            old, new, found = clean.mlp, replacements.mlp, gradients.mlp
        case Kind.EMBED:
            old, new, found = clean.resid_pre[:1], (replacements.embed,), (gradients.embed,)
        case _:
            raise ValueError(f"{kind} is no component that a circuit is made of")
    kept = slice(replacements.start, None)
    difference = torch.stack([new[layer] for layer in layers]).float()
    difference -= torch.stack([old[layer][0, kept] for layer in layers]).float()
    slopes = torch.stack([found[layer][:, kept] for layer in layers]).float().sum(1)
    products = (difference * slopes).sum(1)
    width = replacements.d_head if kind is Kind.HEAD else products.shape[-1]
    return products.view(len(layers), -1, width).sum(-1).flatten()
