"""The exact effect of replacing every component, one at a time, in one pass over the weights.

The batch grows as it goes down the model. Row 0 is the clean run. After block l, one row joins for each
component of that block: the clean residual as it would be had the component written something else. From
there on all rows run through the same blocks together, so that each weight is read once, and no row is
computed before the block in which it begins to differ.

    row                    0      1      2      3      ...
    block 0             clean
      and join            |    head 0  head 1   MLP
    block 1               |      |      |      |
      and join            |      |      |      |     head 0 ...

A row for a head needs no attention of its own in the block where it joins: its z is the clean one with one
head's part replaced. Rows hold positions from the first that is replaced; of the last block only the last
position is finished. Row 0 must arrive at the clean run's logits; in a family whose blocks compute
something else than `Block` does, it would not, and then every row is run whole, by hooks.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from worker.scanner.blocks import Block, causal_mask, rows_at_once
from worker.scanner.final_residuals import Known, Measure, measured, predictions_at_once
from worker.scanner.halving import portion
from worker.scanner.interventions import Edit, Rows, forward
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run

__all__ = ("Swept", "sweep")

_ROWS_BYTES = 1 << 30
"""Residuals of one pass; more components than that take another pass over the weights."""

_WORTHWHILE = 16
"""A share of the positions that rows need not hold, as its inverse."""

_EMBEDDING = -1
"""Its layer, as far as order goes."""


class Swept(NamedTuple):
    """What came of replacing components one at a time."""

    effects: Float[Tensor, " component"]
    """Metric with the component replaced, minus metric of the clean row of the same batch."""
    method: str
    """How the rows were run."""


@torch.inference_mode()
def sweep(
    model: LoadedModel,
    clean: Run,
    components: Sequence[Component],
    replacements: Replacements,
    metric: Measure,
    listener: Listener,
) -> Swept:
    """The effect of each component: the embedding, heads, attention layers and MLPs, in any order.

    Tells how far it is as stage `sweep`, in rows times blocks. Raises `Cancelled` when the listener
    stops it.
    """
    if not components:
        return Swept(torch.empty(0), "nothing was replaced")
    order = sorted(range(len(components)), key=lambda index: _layer(components[index]))
    growing = _GrowingBatch(model, clean, replacements, metric, listener)
    swept = growing.run([components[index] for index in order])
    method = "rows that join after the block of their component, in one pass"
    if swept is None:
        whole = _whole_rows(
            model, clean, [components[i] for i in order], replacements, metric, listener
        )
        swept, method = whole, "rows run whole"
    effects = torch.empty(len(components))
    effects[torch.tensor(order)] = swept.cpu()
    return Swept(effects, method)


def _layer(component: Component) -> int:
    return _EMBEDDING if component.layer is None else component.layer


class _GrowingBatch:
    """One sweep's state."""

    def __init__(
        self,
        model: LoadedModel,
        clean: Run,
        replacements: Replacements,
        metric: Measure,
        listener: Listener,
    ) -> None:
        self._model = model
        self._clean = clean
        self._replacements = replacements
        self._metric = metric
        self._listener = listener
        self._shape = model.architecture
        n_positions, start = clean.n_positions, replacements.start
        # Beginning later needs a mask, which costs more than a few positions are worth.
        worth_it = start * _WORTHWHILE >= n_positions
        shared = worth_it and all(call.keys is not None for call in clean.calls)
        self._kept = slice(start if shared else 0, n_positions)
        self._last = slice(n_positions - 1, n_positions)
        width = n_positions - self._kept.start
        row_bytes = width * self._shape.d_model * clean.final.element_size()
        self._rows_at_once = rows_at_once(model, width)
        self._rows_at_most = max(2, portion(_ROWS_BYTES) // row_bytes)
        self._causal = causal_mask(n_positions, clean.final) if shared else None
        self._done = self._total = 0

    def run(self, components: Sequence[Component]) -> Float[Tensor, " component"] | None:
        """Effects of components in the order of their layers; None where row 0 went astray."""
        step = self._rows_at_most - 1
        passes = [components[i : i + step] for i in range(0, len(components), step)]
        self._total = sum(self._work(part) for part in passes)
        known = Known(self._clean.logits, torch.zeros(1, dtype=torch.long))
        effects = []
        for part in passes:
            values = measured(self._model, self._grown(part), known, self._metric)
            if values is None:
                return None
            effects.append(values[1:] - values[0])
        return torch.cat(effects)

    def _work(self, components: Sequence[Component]) -> int:
        """Rows times blocks of one pass."""
        n_layers = self._shape.n_layers
        joins = [max(_layer(component), 0) for component in components]
        return n_layers - joins[0] + sum(n_layers - layer for layer in joins)

    def _grown(self, components: Sequence[Component]) -> Float[Tensor, "row d_model"]:
        """The last position's final residual in every row; row 0 is the clean one."""
        first = max(_layer(components[0]), 0)
        joining = {layer: list(group) for layer, group in groupby(components, key=_layer)}
        begun = self._clean.resid_pre[first][:, self._kept]
        rows = begun.new_empty(1 + len(components), *begun.shape[1:])
        rows[0] = begun[0]
        present = 1
        for embedding in joining.get(_EMBEDDING, []):
            rows[present] = begun[0]
            self._replace(rows[present], embedding)
            present += 1
        for layer in range(first, self._shape.n_layers):
            block = self._block(layer)
            last = layer == self._shape.n_layers - 1
            for some in torch.split(rows[:present], self._rows_at_once):
                self._listener.pause()
                block.advance(some, last=last)
            for some in self._newcomers(layer, block, joining.get(layer, []), last=last):
                rows[present : present + len(some), -some.shape[1] :] = some
                present += len(some)
            self._done += present
            self._listener.progress("sweep", self._done, self._total)
        return rows[:, -1]

    def _block(self, layer: int) -> Block:
        return Block.of(
            self._model.modules.blocks[layer],
            self._clean.calls[layer],
            parallel=self._shape.parallel_blocks,
            start=self._kept.start,
            causal=self._causal,
        )

    def _newcomers(
        self, layer: int, block: Block, components: Sequence[Component], *, last: bool
    ) -> Iterator[Float[Tensor, "row pos d_model"]]:
        """Residuals after the block with one of its components replaced, in the components' order."""
        here = self._last if last else self._kept
        before, attn, mlp = (
            values[layer][:, here]
            for values in (self._clean.resid_pre, self._clean.attn, self._clean.mlp)
        )
        for kind, group in groupby(components, key=lambda component: component.kind):
            replaced = list(group)
            for at in range(0, len(replaced), self._rows_at_once):
                self._listener.pause()
                some = replaced[at : at + self._rows_at_once]
                if kind is Kind.MLP:
                    yield before + attn + self._with_replaced(mlp, some)
                    continue
                if kind is Kind.HEAD:
                    z = self._with_replaced(self._clean.z[layer][:, here], some)
                    written = block.post_norm(block.modules.w_o(z))
                else:
                    written = self._with_replaced(attn, some)
                rows = before + written
                rows += mlp if block.parallel else block.mlp(rows)
                yield rows

    def _with_replaced(
        self, clean: Float[Tensor, "1 pos width"], components: Sequence[Component]
    ) -> Float[Tensor, "row pos width"]:
        """The clean value once for each component, the component's own part replaced."""
        rows = clean.repeat(len(components), 1, 1)
        for row, component in zip(rows, components, strict=True):
            self._replace(row, component)
        return rows

    def _replace(self, value: Float[Tensor, "pos width"], component: Component) -> None:
        """Replace a component in its clean value, which ends at the last position."""
        new = self._replacements.of(component)[-len(value) :]
        own = slice(None)
        if component.kind is Kind.HEAD:
            d_head, head = self._shape.d_head, component.index or 0
            own = slice(head * d_head, (head + 1) * d_head)
        value[-len(new) :, own] = new


def _whole_rows(
    model: LoadedModel,
    clean: Run,
    components: Sequence[Component],
    replacements: Replacements,
    metric: Measure,
    listener: Listener,
) -> Float[Tensor, " component"]:
    """The same effects from whole forwards, a clean row in each batch: slow, and true of any family."""
    positions = tuple(range(replacements.start, clean.n_positions))
    at_once = max(1, predictions_at_once(model) // clean.n_positions)
    effects = []
    for at in range(0, len(components), at_once):
        some = components[at : at + at_once]
        edits = [
            Edit(row, component, positions, scale=0.0, offset=replacements.of(component))
            for row, component in enumerate(some, start=1)
        ]
        prompts = clean.ids.expand(1 + len(some), -1)
        values = metric(forward(model, Rows(prompts, copies=0), edits)[:, -1])
        effects.append(values[1:] - values[0])
        listener.progress("sweep", at + len(some), len(components))
        listener.pause()
    return torch.cat(effects)
