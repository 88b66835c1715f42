"""Runs with another run's values put into them, each at one place, all in one pass over the weights.

The growing batch of `sweep`, for patches at one position each. Two things make most of the work
unnecessary. A patched run is the run it was made from until the block of its patch: it joins after that
block. And a token is seen by no token before it: a run patched at position p holds no position before p,
but finds the keys and values of those in the recorded run. So runs are grouped by the position of their
patch, and every group goes through a block before the next block is begun.

    position            0     1     2     3
    group of 0          *     o     o     o      * patched, o changed by it
    group of 1                *     o     o
    group of 2                      *     o
    group of 3                            *

A patch at one position changes what leaves its block at that position alone, so a joining run costs one
position's MLP. Patches that go on for several layers are put in again wherever their run passes.

Each group begins with unpatched runs. They must arrive at the logits of the runs that were recorded; in a
family whose blocks compute something else than `Block` does they would not, and then every run is made
whole, by hooks.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neural_mri.contract.components import EMBED, Component, Kind
from neural_mri.contract.models import Architecture
from worker.scanner.blocks import Block, causal_mask, rows_at_once
from worker.scanner.final_residuals import Known, Measure, measured, predictions_at_once
from worker.scanner.halving import portion
from worker.scanner.interventions import Edit, Rows, forward
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.runs import AttentionCall, Run

__all__ = ("Changes", "PatchedRun", "Runs", "changes", "whole_changes")

_ROWS_BYTES = 1 << 30
"""Residuals of one pass; more runs than that take another pass over the weights."""

_RESIDUAL = (Kind.RESID_PRE, Kind.RESID_POST)


class PatchedRun(NamedTuple):
    """A run with a component's value at one position taken from another run."""

    base: int
    """The recorded run that is patched."""
    component: Component
    """`resid_pre`, `resid_post`, `attn`, `mlp` or a head."""
    position: int
    layers: int = 1
    """The component's layer and those that follow it: more than one for `attn` and `mlp` alone."""

    @property
    def joins(self) -> int:
        """Blocks after which the patched run differs."""
        layer = self.component.layer or 0
        return layer if self.component.kind is Kind.RESID_PRE else layer + 1

    @property
    def window(self) -> range:
        """The layers patched."""
        layer = self.component.layer or 0
        return range(layer, layer + self.layers)


class Runs(NamedTuple):
    """What is patched into what."""

    recorded: Run
    """A batch: the source and every run that is patched."""
    source: int
    """The run of the batch that values are taken from."""


class Changes(NamedTuple):
    """What came of patching."""

    values: Float[Tensor, " patched"]
    """Measure of each patched run, minus that of its base."""
    method: str
    """How the runs were made."""


@torch.inference_mode()
def changes(
    model: LoadedModel,
    runs: Runs,
    patched: Sequence[PatchedRun],
    measure: Measure,
    listener: Listener,
    *,
    stage: str,
) -> Changes:
    """What each patch changes of the measure, after the last position of the recorded runs.

    Tells how far it is as `stage`. Raises `Cancelled` when the listener stops it.
    """
    values = torch.zeros(len(patched))
    felt = _felt(runs, patched)
    found, method = None, "runs that join after the block of their patch, in one pass"
    if all(call.keys is not None for call in runs.recorded.calls):
        growing = _GrowingGroups(model, runs, measure, listener, stage)
        found = growing.run([patched[index] for index in felt])
    if found is None:
        some = [patched[index] for index in felt]
        found = whole_changes(model, runs, some, measure, listener, stage=stage)
        method = "runs made whole"
    values[felt] = found.float().cpu()
    return Changes(values, method)


def _felt(runs: Runs, patched: Sequence[PatchedRun]) -> list[int]:
    """The patches that can change the last prediction at all, by their place in the sequence.

    Before the first position where two runs read something else they are the same. And what leaves the
    last block is read at the last position alone.
    """
    embedded = runs.recorded.resid_pre[0]
    differ = (embedded != embedded[runs.source]).any(-1).cpu()
    n_positions, n_layers = differ.shape[1], len(runs.recorded.calls)
    # The cumulative sum is 0 as long as nothing has differed.
    first = (differ.cumsum(-1) == 0).sum(-1).tolist()
    return [
        index
        for index, run in enumerate(patched)
        if run.position >= first[run.base]
        and (run.joins < n_layers or run.position == n_positions - 1)
    ]


class _Group:
    """Runs that are patched at one position. The first are their bases, unpatched."""

    def __init__(self, patched: Sequence[PatchedRun], recorded: Run) -> None:
        """`patched` in the order in which they join."""
        self.patched = patched
        self.position = patched[0].position
        self.begins = patched[0].joins
        self.bases = sorted({run.base for run in patched})
        self.base_of_row = torch.tensor([*self.bases, *(run.base for run in patched)])
        like = recorded.final
        width = like.shape[1] - self.position
        self.rows = like.new_empty(len(self.base_of_row), width, like.shape[2])
        self.present = 0
        """Rows that have joined."""
        self._rewritten = {
            kind: torch.tensor(self._rewritten_layers(kind), device=like.device)
            for kind in {run.component.kind for run in patched if run.layers > 1}
        }

    @property
    def width(self) -> int:
        """Positions that the rows hold."""
        return self.rows.shape[1]

    def _rewritten_layers(self, kind: Kind) -> list[tuple[int, int]]:
        """From which layer to which each row is patched again after it has joined."""
        of_patched = (
            (run.joins, run.joins + run.layers - 1) if run.component.kind is kind else (0, 0)
            for run in self.patched
        )
        return [*((0, 0) for _ in self.bases), *of_patched]

    def rewritten(self, kind: Kind, layer: int) -> Bool[Tensor, "row 1"] | None:
        """Which rows are patched again in this layer; None where none ever is."""
        layers = self._rewritten.get(kind)
        if layers is None:
            return None
        return ((layers[:, 0] <= layer) & (layer < layers[:, 1])).unsqueeze(-1)


class _Joining(NamedTuple):
    """A run that joins."""

    run: PatchedRun
    group: _Group


class _GrowingGroups:
    """One set of patched runs, made together."""

    def __init__(
        self, model: LoadedModel, runs: Runs, measure: Measure, listener: Listener, stage: str
    ) -> None:
        self._model = model
        self._run, self._source = runs
        self._measure = measure
        self._listener = listener
        self._stage = stage
        self._shape = model.architecture
        self._blocks = [
            Block(modules, self._shape.parallel_blocks, (), {}) for modules in model.modules.blocks
        ]
        """Good for what a position does alone: not for attention."""
        self._newcomers_at_once = rows_at_once(model, 1)
        self._causal = causal_mask(self._run.n_positions, self._run.final)
        self._done = self._total = 0

    def run(self, patched: Sequence[PatchedRun]) -> Float[Tensor, " patched"] | None:
        """The change of each, in the order given; None where an unpatched run went astray."""
        if not patched:
            return torch.empty(0)
        order = sorted(range(len(patched)), key=lambda i: (patched[i].position, patched[i].joins))
        passes = list(self._passes([patched[index] for index in order]))
        self._total = sum(self._width(run) * (self._shape.n_layers - run.joins) for run in patched)
        found = []
        for some in passes:
            values = self._changes(some)
            if values is None:
                return None
            found.append(values)
        # Sorting the order gives each one's place in it.
        return torch.cat(found).cpu()[torch.tensor(order).argsort()]

    def _width(self, run: PatchedRun) -> int:
        return self._run.n_positions - run.position

    def _passes(self, patched: Sequence[PatchedRun]) -> Iterator[list[PatchedRun]]:
        """Runs in the order of their positions, cut where memory would run out."""
        position_bytes = self._shape.d_model * self._run.final.element_size()
        held, some = 0, list[PatchedRun]()
        for run in patched:
            run_bytes = self._width(run) * position_bytes
            if some and held + run_bytes > portion(_ROWS_BYTES):
                yield some
                held, some = 0, []
            held += run_bytes
            some.append(run)
        yield some

    def _changes(self, patched: Sequence[PatchedRun]) -> Float[Tensor, " patched"] | None:
        """One pass over the weights."""
        groups = [
            _Group(list(runs), self._run)
            for _, runs in groupby(patched, key=lambda run: run.position)
        ]
        joining = defaultdict[int, list[_Joining]](list)
        for group in groups:
            for run in group.patched:
                joining[run.joins].append(_Joining(run, group))
        n_layers = self._shape.n_layers
        for layer in range(min(joining), n_layers + 1):
            if layer in joining:
                self._join(layer, joining[layer])
            if layer < n_layers:
                for group in groups:
                    self._advance(layer, group)
        return self._measured(groups)

    def _entering(self, layer: int) -> Float[Tensor, "run pos d_model"]:
        """The residual entering a layer; after the last, the one that the final norm reads."""
        return self._run.final if layer == self._shape.n_layers else self._run.resid_pre[layer]

    def _join(self, layer: int, joining: Sequence[_Joining]) -> None:
        """Add the runs that differ from this layer's entry on."""
        entering = self._entering(layer)
        patched = self._patched(layer, [joined.run for joined in joining])
        for group in dict.fromkeys(joined.group for joined in joining):
            here = [index for index, joined in enumerate(joining) if joined.group is group]
            begin = group.present
            group.present = max(begin, len(group.bases)) + len(here)
            bases = group.base_of_row[begin : group.present]
            group.rows[begin : group.present] = entering[bases, group.position :]
            group.rows[group.present - len(here) : group.present, 0] = patched[here]

    def _patched(self, layer: int, runs: Sequence[PatchedRun]) -> Float[Tensor, "patched d_model"]:
        """The residual entering a layer, in each run, at the position of its patch."""
        vectors = self._run.final.new_empty(len(runs), self._shape.d_model)
        for kind in {run.component.kind for run in runs}:
            of_kind = [index for index, run in enumerate(runs) if run.component.kind is kind]
            for at in range(0, len(of_kind), self._newcomers_at_once):
                self._listener.pause()
                some = of_kind[at : at + self._newcomers_at_once]
                vectors[some] = self._with_patch(layer, kind, [runs[index] for index in some])
        return vectors

    def _with_patch(
        self, layer: int, kind: Kind, runs: Sequence[PatchedRun]
    ) -> Float[Tensor, "patched d_model"]:
        position = [run.position for run in runs]
        own, theirs = ([run.base for run in runs], position), (self._source, position)
        if kind in _RESIDUAL:
            return self._entering(layer)[theirs]
        recorded, block = self._run, self._blocks[layer - 1]
        before = recorded.resid_pre[layer - 1][own]
        mlp = recorded.mlp[layer - 1]
        if kind is Kind.MLP:
            return before + recorded.attn[layer - 1][own] + mlp[theirs]
        if kind is Kind.HEAD:
            apart = (len(runs), self._shape.n_heads, self._shape.d_head)
            heads = (range(len(runs)), [run.component.index or 0 for run in runs])
            z = recorded.z[layer - 1][own].view(apart)
            z[heads] = recorded.z[layer - 1][theirs].view(apart)[heads]
            written = block.post_norm(block.modules.w_o(z.view(len(runs), 1, -1)))[:, 0]
        else:
            written = recorded.attn[layer - 1][theirs]
        after = before + written
        return after + (mlp[own] if block.parallel else block.mlp(after.unsqueeze(1))[:, 0])

    def _advance(self, layer: int, group: _Group) -> None:
        """Take a group's runs through a block."""
        last, step = layer == self._shape.n_layers - 1, rows_at_once(self._model, group.width)
        for at in range(0, group.present, step):
            self._listener.pause()
            some = slice(at, min(at + step, group.present))
            block = Block.of(
                self._model.modules.blocks[layer],
                self._call(layer, group, some),
                parallel=self._shape.parallel_blocks,
                start=group.position,
                causal=self._causal if group.width > 1 else None,
            )
            # The last block's patched position is read only where it is the last one.
            seen = not last or group.width == 1
            rewrite = partial(self._rewrite, layer, group, some) if seen else None
            block.advance(group.rows[some], last=last, rewrite=rewrite)
        if group.present:
            self._done += group.width * (group.present - len(group.bases))
            self._listener.progress(self._stage, self._done, self._total)

    def _call(self, layer: int, group: _Group, some: slice) -> AttentionCall:
        """How attention is called for some rows, each with the keys and values of its base."""
        recorded = self._run.calls[layer]
        call = recorded.row(0)
        if group.position == 0 or recorded.keys is None or recorded.values is None:
            return call
        # One base's are shared by all rows.
        bases = group.bases if len(group.bases) == 1 else group.base_of_row[some]
        return call._replace(keys=recorded.keys[bases], values=recorded.values[bases])

    def _rewrite(self, layer: int, group: _Group, some: slice, kind: Kind, written: Tensor) -> None:
        """Patch again what a sublayer writes, in the rows whose patch goes on through this layer."""
        rows = group.rewritten(kind, layer)
        if rows is not None:
            recorded = self._run.attn if kind is Kind.ATTN else self._run.mlp
            theirs = recorded[layer][self._source, group.position]
            written[:, 0] = torch.where(rows[some], theirs, written[:, 0])

    def _measured(self, groups: Sequence[_Group]) -> Float[Tensor, " patched"] | None:
        """The measure of each patched row minus its base's, group by group."""
        unpatched = [group.rows[: len(group.bases), -1] for group in groups]
        patched = [group.rows[len(group.bases) :, -1] for group in groups]
        bases = torch.tensor([base for group in groups for base in group.bases])
        values = measured(
            self._model,
            torch.cat(unpatched + patched),
            Known(self._run.logits, bases),
            self._measure,
        )
        if values is None:
            return None
        of_base: list[int] = []
        before = 0
        for group in groups:
            of_base += [before + group.bases.index(run.base) for run in group.patched]
            before += len(group.bases)
        return values[before:] - values[of_base]


@torch.inference_mode()
def whole_changes(
    model: LoadedModel,
    runs: Runs,
    patched: Sequence[PatchedRun],
    measure: Measure,
    listener: Listener,
    *,
    stage: str,
) -> Float[Tensor, " patched"]:
    """The same changes from whole forwards of the model: slow, and true of any family."""
    recorded, bases = runs.recorded, sorted({run.base for run in patched})
    everywhere = tuple(range(recorded.n_positions))
    made: list[tuple[int, PatchedRun | None]] = [
        *((base, None) for base in bases),
        *((run.base, run) for run in patched),
    ]
    at_once = max(1, predictions_at_once(model) // recorded.n_positions)
    values = []
    for at in range(0, len(made), at_once):
        some = made[at : at + at_once]
        edits = []
        for row, (base, run) in enumerate(some, start=1):
            edits.append(Edit(row, EMBED, everywhere, 0.0, offset=recorded.resid_pre[0][base]))
            edits += [] if run is None else _edits(row, run, runs, model.architecture)
        prompts = recorded.ids[:1].expand(1 + len(some), -1)
        logits = forward(
            model, Rows(prompts, copies=0), edits, on_layer=lambda _layer: listener.checkpoint()
        )
        values.append(measure(logits[1:, -1]))
        listener.progress(stage, at + len(some), len(made))
        listener.pause()
    found = torch.cat(values) if values else torch.empty(0)
    return found[len(bases) :] - found[[bases.index(run.base) for run in patched]]


def _edits(row: int, run: PatchedRun, runs: Runs, shape: Architecture) -> Iterator[Edit]:
    recorded, kind, head = runs.recorded, run.component.kind, run.component.index or 0
    for layer in run.window:
        match kind:
            case Kind.RESID_PRE:
                value = recorded.resid_pre[layer]
            case Kind.RESID_POST:
                value = (*recorded.resid_pre, recorded.final)[layer + 1]
            case Kind.ATTN:
                value = recorded.attn[layer]
            case Kind.MLP:
                value = recorded.mlp[layer]
            case _:
                own = slice(head * shape.d_head, (head + 1) * shape.d_head)
                value = recorded.z[layer][..., own]
        component = Component(kind, layer, run.component.index)
        offset = value[runs.source, run.position]
        yield Edit(row, component, (run.position,), 0.0, offset=offset)
