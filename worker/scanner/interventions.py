"""Changing what components write while the plain model runs; never a weight.

Every operation is an edit of some rows of one batch, `value -> scale * value + offset`, where the offset may
be another row's value (a patch) or noise measured in the component's own size. Edits that meet at one hook
are applied as one gather, one multiply-add and one scatter, however many users they come from.

Rows that share their tokens with the clean row are not computed before the first block in which they
differ: the batch grows there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from worker.scanner.hooks import tensor_in, tensor_out
from worker.scanner.loading import LoadedModel
from worker.scanner.sites import BlockModules

__all__ = ("Edit", "Joining", "Rows", "first_layer", "forward", "width")

CLEAN = 0
"""The row that nothing is done to."""
_MASK_DIMENSIONS = 4
"""[row, head, query, key]: nothing else that blocks are given has as many."""
_OF_ONE_SHAPE = ("gpt_bigcode",)
"""Families that give their last residual the shape of what was embedded: no row can join on the way."""


class Edit(NamedTuple):
    """One change to one component of one row."""

    row: int
    component: Component
    positions: tuple[int, ...]
    scale: float = 1.0
    offset: Float[Tensor, "*pos width"] | None = None
    """Added; one vector for all positions or one for each."""
    source_row: int | None = None
    """Row whose own value at the same place and positions is added."""
    noise: Float[Tensor, "pos width"] | None = None
    """Added times the component's root mean square over positions 1 and later of the clean row."""
    clean_row: int = CLEAN
    """The row's own clean run, where a batch has several."""


class Joining(NamedTuple):
    """A copy of a prompt that joins the batch where its first edit is: until there the two are equal."""

    prompt: int
    layer: int


class Rows(NamedTuple):
    """The rows of one batch: prompts that are read from the start, then copies of them."""

    prompts: Int[Tensor, "prompt pos"]
    """Row 0 is the clean prompt."""
    copies: int
    """Rows that follow: a prompt again, each to be edited."""
    joining: tuple[Joining, ...] | None = None
    """Of each copy, in the order in which they join; copies of the clean prompt where left out."""

    @property
    def total(self) -> int:
        """Rows in the end."""
        return len(self.prompts) + self.copies


class _Point(NamedTuple):
    """One place in a block where values can be changed. In the order a block comes to them."""

    layer: int
    part: str


_PARTS = {
    Kind.EMBED: "resid_pre",
    Kind.RESID_PRE: "resid_pre",
    Kind.HEAD: "z",
    Kind.ATTN: "attn",
    Kind.RESID_MID: "resid_mid",
    Kind.NEURON: "hidden",
    Kind.MLP: "mlp",
    Kind.RESID_POST: "resid_post",
}


class _Source(NamedTuple):
    """Another row's values, added."""

    where: tuple[Tensor, ...]
    weight: Float[Tensor, "n 1"]
    """1, or 0 for an entry that takes nothing."""


class _Round(NamedTuple):
    """Edits at one point of which no two meet: `n` entries, one a row and position."""

    where: tuple[Tensor, ...]
    """Indices of each entry: row, position, and head or neuron where there is one."""
    scale: Float[Tensor, "n 1"]
    offset: Float[Tensor, "n width"] | None
    source: _Source | None
    noise: "_Noise | None"


class _Noise(NamedTuple):
    """What is added in the size that the component has in clean rows."""

    clean: Int[Tensor, " clean"]
    """Those rows, each once."""
    own: Int[Tensor, " n"]
    """Which of them is each entry's."""
    value: Float[Tensor, "n width"]


_Plan = dict[_Point, list[_Round]]


def width(kind: Kind, shape: Architecture) -> int:
    """Numbers in a component's value where it is edited: a head's before W_O, one for a neuron."""
    return {Kind.HEAD: shape.d_head, Kind.NEURON: 1}.get(kind, shape.d_model)


def forward(
    model: LoadedModel,
    rows: Rows,
    edits: Sequence[Edit],
    readers: Callable[[], Any] | None = None,
    on_layer: Callable[[int], None] | None = None,
    checkpoint: Callable[[], None] | None = None,
) -> Float[Tensor, "row pos d_vocab"]:
    """Logits of every row of one pass. The model is as it was afterwards, whatever happened.

    Args:
        model: The model; runs on its plain twin.
        rows: The batch. Edits may touch any row but the clean one.
        edits: What is done, in this order where two meet in one place.
        readers: Opens a context of reading hooks, called once the editing hooks are in place, so that
            they see edited values.
        on_layer: Called after each block; may raise to stop.
        checkpoint: Called while edits are put in order, before the model runs; may raise to stop.
    """
    if any(not CLEAN < edit.row < rows.total for edit in edits):
        raise ValueError(f"an edit names a row outside 1 to {rows.total - 1}")
    if model.architecture.family in _OF_ONE_SHAPE:
        rows = _from_the_start(rows)
    with _editing(model, rows, _compile(edits, model, checkpoint), _joining(rows, edits), on_layer):
        if readers is None:
            return _run(model, rows)
        with readers():
            return _run(model, rows)


def _from_the_start(rows: Rows) -> Rows:
    """The same rows, of which none joins later."""
    joining = rows.joining
    copied = [CLEAN] * rows.copies if joining is None else [copy.prompt for copy in joining]
    return Rows(torch.cat([rows.prompts, rows.prompts[copied]]), copies=0)


def _run(model: LoadedModel, rows: Rows) -> Float[Tensor, "row pos d_vocab"]:
    prompts = rows.prompts
    if len(prompts) > 1 and rows.joining is None:
        # Masks are built for the rows that are there from the start: then all are.
        prompts = torch.cat([prompts, prompts[:1].expand(rows.copies, -1)])
    logits: Tensor = model.plain(input_ids=prompts, use_cache=False).logits
    return logits


def first_layer(edits: Sequence[Edit]) -> int:
    """The first block in which something is changed; 0 where nothing is."""
    return min((edit.component.layer or 0 for edit in edits), default=0)


@contextmanager
def _editing(
    model: LoadedModel,
    rows: Rows,
    plan: _Plan,
    joining: dict[int, list[int]],
    on_layer: Callable[[int], None] | None,
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        edited = {point.layer for point in plan}
        for layer, block in enumerate(model.modules.blocks):
            copied = joining.get(layer, [])
            if layer in edited or copied:
                handles += _Block(layer, block, plan, model.architecture).hooks(copied)
            if rows.joining is not None:
                handles.append(
                    block.block.register_forward_pre_hook(_any_rows_mask, with_kwargs=True)
                )
            if on_layer is not None:
                handles.append(block.block.register_forward_hook(partial(_after, on_layer, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joining(rows: Rows, edits: Sequence[Edit]) -> dict[int, list[int]]:
    """Which prompts are copied, in this order, at a block's entry."""
    if rows.joining is None:
        alone = len(rows.prompts) == 1 and rows.copies
        return {first_layer(edits): [CLEAN] * rows.copies} if alone else {}
    copied: defaultdict[int, list[int]] = defaultdict(list)
    for copy in rows.joining:
        copied[copy.layer].append(copy.prompt)
    return copied


def _any_rows_mask(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Attention masks are made for the rows that were there from the start. None is padded: one does for all."""

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim == _MASK_DIMENSIONS else value

    return (
        tuple(first(value) for value in args),
        {name: first(value) for name, value in kwargs.items()},
    )


def _after(on_layer: Callable[[int], None], layer: int, *_: Any) -> None:
    on_layer(layer)


class _Block:
    """The editing hooks of one block."""

    def __init__(self, layer: int, modules: BlockModules, plan: _Plan, shape: Architecture) -> None:
        self._modules = modules
        self._shape = shape
        self._rounds = {
            part: rounds for part in _PARTS.values() if (rounds := plan.get(_Point(layer, part)))
        }
        self._before: Tensor | None = None

    def hooks(self, copied: Sequence[int]) -> Iterator[Any]:
        """Register what is needed here; copies of these rows join at the block's entry."""
        parts, modules = self._rounds, self._modules
        if copied or parts.keys() & {"resid_pre", "resid_mid"}:
            yield modules.block.register_forward_pre_hook(partial(self._enter, list(copied)))
        if "z" in parts:
            yield modules.w_o.register_forward_pre_hook(self._edit_z)
        if parts.keys() & {"attn", "resid_mid"}:
            yield modules.attn_write.register_forward_hook(self._edit_attn)
        if "hidden" in parts:
            yield modules.w_out.register_forward_pre_hook(self._edit_hidden)
        if "mlp" in parts:
            yield modules.mlp_write.register_forward_hook(partial(self._edit_output, "mlp"))
        if "resid_post" in parts:
            yield modules.block.register_forward_hook(partial(self._edit_output, "resid_post"))

    def _enter(
        self, copied: list[int], _module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        value = tensor_in(args)
        if copied:
            value = torch.cat([value, value[copied]])
        value = self._apply("resid_pre", value)
        if "resid_mid" in self._rounds:
            self._before = value
        return (value, *args[1:])

    def _edit_z(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = tensor_in(args)
        by_head = z.view(*z.shape[:-1], self._shape.n_heads, self._shape.d_head)
        return (self._apply("z", by_head).flatten(-2), *args[1:])

    def _edit_hidden(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = tensor_in(args)
        return (self._apply("hidden", hidden.unsqueeze(-1)).squeeze(-1), *args[1:])

    def _edit_attn(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        written = self._apply("attn", tensor_out(output))
        if self._before is not None:
            # No module puts out the residual between the sublayers: what makes it is changed.
            before, self._before = self._before, None
            written = self._apply("resid_mid", before + written) - before
        return _replaced(output, written)

    def _edit_output(
        self, part: str, _module: nn.Module, _args: tuple[Any, ...], output: Any
    ) -> Any:
        return _replaced(output, self._apply(part, tensor_out(output)))

    def _apply(self, part: str, value: Tensor) -> Tensor:
        for step in self._rounds.get(part, ()):
            value = _applied(step, value)
        return value


def _replaced(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


def _applied(step: _Round, value: Tensor) -> Tensor:
    changed = value[step.where] * step.scale
    if step.offset is not None:
        changed = changed + step.offset
    if step.source is not None:
        changed = changed + value[step.source.where] * step.source.weight
    if step.noise is not None:
        changed = changed + step.noise.value * _own_size(step, step.noise, value)
    edited = value.clone()
    edited[step.where] = changed
    return edited


def _own_size(
    step: _Round, noise: _Noise, value: Float[Tensor, "row pos *rest"]
) -> Float[Tensor, "n 1"]:
    """The component's root mean square in each entry's clean row."""
    clean = value[noise.clean]
    # Position 0 carries the attention sink: its size is not the component's.
    typical = clean[:, 1:] if clean.shape[1] > 1 else clean
    size = typical.float().square().mean(dim=(1, -1)).sqrt().to(value.dtype)
    own = size[noise.own] if len(step.where) < 3 else size[noise.own, step.where[2]]
    return own.unsqueeze(-1)


def _compile(
    edits: Sequence[Edit], model: LoadedModel, checkpoint: Callable[[], None] | None
) -> _Plan:
    """The rounds of each point, in the order of the edits."""
    at_point: defaultdict[_Point, list[Edit]] = defaultdict(list)
    for edit, point in zip(edits, _points(edits), strict=True):
        at_point[point].append(edit)
    plan: _Plan = {}
    for point, here in at_point.items():
        plan[point] = []
        for group in _groups(here):
            if checkpoint is not None:
                checkpoint()
            plan[point].append(_round(group, model))
    return plan


def _points(edits: Sequence[Edit]) -> list[_Point]:
    """Where each edit is made.

    What leaves a block is what enters the next: an edit of the latter that an edit of the former follows is
    made where the former is, or it would come after it.
    """
    points = []
    leaving = set[tuple[int, int]]()
    for edit in reversed(edits):
        layer, kind = edit.component.layer or 0, edit.component.kind
        if kind is Kind.RESID_POST:
            leaving.add((edit.row, layer))
        if kind is Kind.RESID_PRE and (edit.row, layer - 1) in leaving:
            layer, kind = layer - 1, Kind.RESID_POST
        points.append(_Point(layer, _PARTS[kind]))
    return points[::-1]


def _groups(edits: Sequence[Edit]) -> list[list[Edit]]:
    """Edits at one point: each joins the first round after all that change an entry it changes or reads."""
    groups: list[list[Edit]] = []
    # Of each row and index within the component, the last round that changes a position.
    last: defaultdict[tuple[int, int | None], dict[int, int]] = defaultdict(dict)
    for edit in edits:
        index = edit.component.index
        changed = last[edit.row, index]
        met = [changed]
        if edit.source_row is not None:
            met.append(last[edit.source_row, index])
        after = 1 + max((rounds.get(at, -1) for rounds in met for at in edit.positions), default=-1)
        changed.update(dict.fromkeys(edit.positions, after))
        if after == len(groups):
            groups.append([])
        groups[after].append(edit)
    return groups


def _round(edits: Sequence[Edit], model: LoadedModel) -> _Round:
    device, dtype = model.device, model.plain.dtype
    numbers = width(edits[0].component.kind, model.architecture)

    counts = torch.tensor([len(edit.positions) for edit in edits])

    def indices(values: Sequence[int]) -> Int[Tensor, " n"]:
        return torch.tensor(values).repeat_interleave(counts).to(device)

    def column(values: Sequence[float]) -> Float[Tensor, "n 1"]:
        of_each = torch.tensor(values, dtype=dtype).repeat_interleave(counts)
        return of_each.to(device).unsqueeze(-1)

    def stacked(given: Sequence[Tensor | None]) -> Float[Tensor, "n width"] | None:
        if all(one is None for one in given):
            return None
        return torch.cat(
            [
                torch.zeros(len(edit.positions), numbers, device=device, dtype=dtype)
                if one is None
                else one.to(device, dtype).expand(len(edit.positions), numbers)
                for edit, one in zip(edits, given, strict=True)
            ]
        )

    rows = indices([edit.row for edit in edits])
    place: tuple[Tensor, ...] = (
        torch.tensor([at for edit in edits for at in edit.positions], device=device),
    )
    if edits[0].component.index is not None:
        place = (*place, indices([edit.component.index or 0 for edit in edits]))
    source = None
    if any(edit.source_row is not None for edit in edits):
        source = _Source(
            (indices([edit.source_row or CLEAN for edit in edits]), *place),
            column([float(edit.source_row is not None) for edit in edits]),
        )
    noise = None
    if (drawn := stacked([edit.noise for edit in edits])) is not None:
        clean = sorted({edit.clean_row for edit in edits})
        own = indices([clean.index(edit.clean_row) for edit in edits])
        noise = _Noise(torch.tensor(clean, device=device), own, drawn)
    return _Round(
        where=(rows, *place),
        scale=column([edit.scale for edit in edits]),
        offset=stacked([edit.offset for edit in edits]),
        source=source,
        noise=noise,
    )
