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
from worker.scanner.blocks import ACTIVATION_BYTES, Block, causal_mask, rows_at_once
from worker.scanner.interventions import Edit, Rows, forward
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run

__all__ = ("Swept", "sweep")

_ROWS_BYTES = 1 << 30
"""Residuals of one pass; more components than that take another pass over the weights."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far row 0 may be from the clean run, as a share of the largest logit: kernels differ in the last
digits between a whole prompt and its end."""


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
    metric: Metric,
    listener: Listener,
) -> Swept:
    """The effect of each component: heads, attention layers and MLPs, in any order.

    Tells how far it is as stage `sweep`, in rows times blocks. Raises `Cancelled` when the listener
    stops it.
    """
    if not components:
        return Swept(torch.empty(0), "nothing was replaced")
    order = sorted(range(len(components)), key=lambda index: components[index].layer or 0)
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


class _GrowingBatch:
    """One sweep's state."""

    def __init__(
        self,
        model: LoadedModel,
        clean: Run,
        replacements: Replacements,
        metric: Metric,
        listener: Listener,
    ) -> None:
        self._model = model
        self._clean = clean
        self._replacements = replacements
        self._metric = metric
        self._listener = listener
        self._shape = model.architecture
        n_positions = clean.n_positions
        self._kept = slice(replacements.start, n_positions)
        self._last = slice(n_positions - 1, n_positions)
        width = n_positions - replacements.start
        self._rows_at_once = rows_at_once(model, width)
        self._rows_at_most = max(
            2, _ROWS_BYTES // (width * self._shape.d_model * clean.final.element_size())
        )
        self._done = self._total = 0

    def run(self, components: Sequence[Component]) -> Float[Tensor, " component"] | None:
        """Effects of components in the order of their layers; None where row 0 went astray."""
        if self._replacements.start and any(call.keys is None for call in self._clean.calls):
            return None
        step = self._rows_at_most - 1
        passes = [components[i : i + step] for i in range(0, len(components), step)]
        self._total = sum(self._work(part) for part in passes)
        effects = []
        for part in passes:
            values = self._measured(self._grown(part))
            if values is None:
                return None
            effects.append(values[1:] - values[0])
        return torch.cat(effects)

    def _work(self, components: Sequence[Component]) -> int:
        """Rows times blocks of one pass."""
        n_layers = self._shape.n_layers
        first = components[0].layer or 0
        return n_layers - first + sum(n_layers - (c.layer or 0) for c in components)

    def _grown(self, components: Sequence[Component]) -> Float[Tensor, "row d_model"]:
        """The last position's final residual in every row; row 0 is the clean one."""
        first = components[0].layer or 0
        joining = {
            layer: list(group) for layer, group in groupby(components, key=lambda c: c.layer or 0)
        }
        begun = self._clean.resid_pre[first][:, self._kept]
        rows = begun.new_empty(1 + len(components), *begun.shape[1:])
        rows[0] = begun[0]
        present = 1
        for layer in range(first, self._shape.n_layers):
            block = self._block(layer)
            last = layer == self._shape.n_layers - 1
            for some in torch.split(rows[:present], self._rows_at_once):
                self._advance(block, some, last=last)
            for some in self._newcomers(layer, block, joining.get(layer, []), last=last):
                rows[present : present + len(some), -some.shape[1] :] = some
                present += len(some)
            self._done += present
            self._listener.progress("sweep", self._done, self._total)
        return rows[:, -1]

    def _block(self, layer: int) -> Block:
        call = self._clean.calls[layer]
        return Block.of(
            self._model.modules.blocks[layer],
            call,
            parallel=self._shape.parallel_blocks,
            start=self._replacements.start,
            causal=causal_mask(self._clean.n_positions, self._clean.final),
        )

    def _advance(self, block: Block, rows: Float[Tensor, "row pos d_model"], *, last: bool) -> None:
        """Run rows through the block, in place; through the last block's MLP only where it is read."""
        self._listener.checkpoint()
        written = block.attn(rows)
        after = rows[:, -1:] if last else rows
        if block.parallel:
            by_mlp = block.mlp(after)
            rows += written
        else:
            rows += written
            by_mlp = block.mlp(after)
        after += by_mlp

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
                self._listener.checkpoint()
                some = replaced[at : at + self._rows_at_once]
                if kind is Kind.MLP:
                    yield before + attn + self._given(some, here)
                    continue
                if kind is Kind.HEAD:
                    z = self._edited_z(layer, some, here)
                    written = block.post_norm(block.modules.w_o(z))
                else:
                    written = self._given(some, here)
                rows = before + written
                rows += mlp if block.parallel else block.mlp(rows)
                yield rows

    def _given(
        self, components: Sequence[Component], here: slice
    ) -> Float[Tensor, "row pos d_model"]:
        return torch.stack([self._replacement(component, here) for component in components])

    def _replacement(self, component: Component, here: slice) -> Float[Tensor, "pos width"]:
        start = self._replacements.start
        return self._replacements.of(component)[here.start - start : here.stop - start]

    def _edited_z(
        self, layer: int, heads: Sequence[Component], here: slice
    ) -> Float[Tensor, "row pos heads_by_d_head"]:
        z = self._clean.z[layer][:, here].repeat(len(heads), 1, 1)
        by_head = z.view(*z.shape[:2], self._shape.n_heads, self._shape.d_head)
        for row, component in enumerate(heads):
            by_head[row, :, component.index or 0] = self._replacement(component, here)
        return z

    def _measured(self, final: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"] | None:
        """The metric of every row; None where row 0 is not the clean run."""
        values: list[Tensor] = []
        for some in torch.split(final, _predictions_at_once(self._model)):
            logits = self._logits(some)
            if not values and not self._is_clean(logits[0]):
                return None
            values.append(self._metric(logits))
        return torch.cat(values)

    def _logits(self, final: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        modules, cap = self._model.modules, self._shape.final_softcap
        logits: Tensor = modules.unembed(modules.final_norm(final))
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _is_clean(self, logits: Float[Tensor, " d_vocab"]) -> bool:
        expected = self._clean.logits[0].float()
        worst = (logits.float() - expected).abs().max().item()
        scale = max(expected.abs().max().item(), 1.0)
        return worst <= _TOLERANCE[self._clean.logits.dtype] * scale


def _predictions_at_once(model: LoadedModel) -> int:
    """Rows of logits that are measured together."""
    return max(1, 8 * ACTIVATION_BYTES[model.device.type] // (4 * model.architecture.d_vocab))


def _whole_rows(
    model: LoadedModel,
    clean: Run,
    components: Sequence[Component],
    replacements: Replacements,
    metric: Metric,
    listener: Listener,
) -> Float[Tensor, " component"]:
    """The same effects from whole forwards, a clean row in each batch: slow, and true of any family."""
    positions = tuple(range(replacements.start, clean.n_positions))
    at_once = max(1, _predictions_at_once(model) // clean.n_positions)
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
        listener.checkpoint()
    return torch.cat(effects)
