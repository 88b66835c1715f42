"""Stimulation: a prompt read clean and perturbed, as rows of one batch, and what that changed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import log
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.perturbations import (
    Amplify,
    Inject,
    InjectMode,
    Invert,
    MeanAblation,
    Noise,
    Patch,
    Perturbation,
    PerturbationScan,
    ZeroAblation,
)
from neural_mri.contract.problems import Conflict, Unprocessable
from neural_mri.contract.results import build, positions_column
from neural_mri.contract.scans import ActivationScan, reporting_order, resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner import activation_tables as tables
from worker.scanner.hooks import Reader, hooked, tensor_in, tensor_out
from worker.scanner.interventions import Edit, Joining, Rows, first_layer, forward, width
from worker.scanner.layer_reading import GATHERED_BYTES
from worker.scanner.layer_summaries import LayerTensors, Part, Summaries, sinks
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.prompts import ScanOutput, finished, token_ids
from worker.scanner.references import ReferenceMeans
from worker.scanner.shared_forward import AskedOf, Company

__all__ = ("Perturbing", "scan_perturbation", "scan_perturbation_together")


def scan_perturbation(
    model: LoadedModel,
    request: PerturbationScan,
    tokens: Tokens,
    listener: Listener,
    *,
    sources: Mapping[str, Tokens],
    answer_id: int | None = None,
    foil_id: int | None = None,
    means: ReferenceMeans | None = None,
) -> ScanOutput:
    """Both runs' predictions and what lies between them.

    Tables `comparison`, `shift`, `predictions`, `predictions_after`, and with `perturbed_scan` also
    `tokens`, `activations`, `activations_after` and `change`.

    Noise runs as several rows; what is reported of the perturbed run is then the mean over them, and
    its spread where there is a column for it.

    Args:
        model: The model.
        request: What is done, and what is asked about.
        tokens: The prompt.
        listener: Hears each layer, and may stop the scan.
        sources: Tokens of each `Patch`'s source prompt, by its text.
        answer_id: The next token asked about; the clean run's likeliest where None.
        foil_id: The token it is compared with.
        means: What `MeanAblation` puts in a component's place.

    Raises:
        Problem: The request asks for what the model, the prompt or a source does not have.
        Cancelled: The listener stopped it. The model is as it was.
    """
    asked = AskedOf(tokens, listener, answer_id, foil_id)
    [output] = scan_perturbation_together(
        model, [Perturbing(request, asked, sources=sources, means=means)]
    )
    return output


class Perturbing(NamedTuple):
    """One scan among others: what is done, to which prompt."""

    request: PerturbationScan
    asked: AskedOf
    sources: Mapping[str, Tokens]
    means: ReferenceMeans | None = None


@torch.inference_mode()
def scan_perturbation_together(
    model: LoadedModel, perturbing: Sequence[Perturbing]
) -> list[ScanOutput]:
    """Clean and perturbed rows of several scans, of prompts of one length, as rows of one batch.

    What each scan would give, to the last digits but one: matrices of other shapes are summed in another
    order. It goes on while anybody waits for it. Raises as `scan_perturbation` does.
    """
    if len(perturbing) > 1 and any(one.request.canonical for one in perturbing):
        raise ValueError("a canonical scan has its forward to itself")
    for one in perturbing:
        one.request.check(model.architecture)
    n_tokens, n_layers = len(perturbing[0].asked.tokens), model.architecture.n_layers
    company = Company([one.asked.listener for one in perturbing])
    plan = _Plan.of(model, perturbing, company.checkpoint)
    shown = [at for at, one in enumerate(perturbing) if one.request.perturbed_scan]
    reading = None
    if shown:
        reading = _PairReading(model, n_tokens, [plan.pairs[at] for at in shown])

    def on_layer(layer: int) -> None:
        company.progress("forward", layer + 1, n_layers)
        company.checkpoint()

    started = time.perf_counter()
    logits = forward(
        model,
        plan.rows,
        plan.edits,
        readers=None if reading is None else reading.listening,
        on_layer=on_layer,
        checkpoint=company.checkpoint,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = (time.perf_counter() - started) / len(perturbing)
    made = [_comparison_tables(model, pair, logits) for pair in plan.pairs]
    if reading is not None:
        for at, tables_of_pair in zip(shown, reading.tables(), strict=True):
            made[at] |= tables_of_pair
    return [ScanOutput(tables_of_one, seconds) for tables_of_one in made]


class _Pair(NamedTuple):
    """Rows of one scan."""

    one: Perturbing
    clean: int
    perturbed: range
    """The edited rows: one a draw."""


class _Plan(NamedTuple):
    """The rows of the batch and what is done to them."""

    rows: Rows
    pairs: tuple[_Pair, ...]
    edits: tuple[Edit, ...]

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        perturbing: Sequence[Perturbing],
        checkpoint: Callable[[], None],
    ) -> "_Plan":
        """Clean prompts, each once, then what patches are taken from, then perturbed rows as they join.

        `checkpoint` is called for each perturbation, and may raise to stop. Raises `Problem` for an operand
        that does not fit.
        """
        row_of: dict[tuple[int, ...], int] = {}
        for one in perturbing:
            row_of.setdefault(one.asked.tokens.ids, len(row_of))
        tokens_of = {one.asked.tokens.ids: one.asked.tokens for one in perturbing}
        prompts = [token_ids(model, tokens_of[ids]) for ids in row_of]
        clean = [row_of[one.asked.tokens.ids] for one in perturbing]
        edits_of: list[list[Edit]] = []
        for one, row in zip(perturbing, clean, strict=True):
            edits_of.append(_edits(model, one, checkpoint, clean=row, first_source=len(prompts)))
            prompts += _source_rows(model, one)
        first_edit = [first_layer(edits) for edits in edits_of]
        joining, edits, pairs = list[Joining](), list[Edit](), dict[int, _Pair]()
        for index in sorted(range(len(perturbing)), key=first_edit.__getitem__):
            one, start = perturbing[index], len(prompts) + len(joining)
            perturbed = range(start, start + one.request.n_draws)
            joining += [Joining(clean[index], first_edit[index])] * len(perturbed)
            edits += [edit._replace(row=perturbed[edit.row]) for edit in edits_of[index]]
            pairs[index] = _Pair(one, clean[index], perturbed)
        rows = Rows(
            torch.cat(prompts),
            copies=len(joining),
            joining=tuple(joining) if len(perturbing) > 1 else None,
        )
        return cls(rows, tuple(pairs[index] for index in range(len(pairs))), tuple(edits))


def _source_rows(model: LoadedModel, one: Perturbing) -> Iterator[Int[Tensor, "one pos"]]:
    tokens = one.asked.tokens
    for text in one.request.other_prompts:
        source = one.sources[text]
        if len(source) != len(tokens):
            raise Unprocessable(
                f"the source prompt has {len(source)} tokens and the prompt {len(tokens)}: "
                "expected as many, or positions would not correspond",
                n_tokens=len(tokens),
                n_source_tokens=len(source),
            )
        yield token_ids(model, source)


def _edits(
    model: LoadedModel,
    one: Perturbing,
    checkpoint: Callable[[], None],
    *,
    clean: int,
    first_source: int,
) -> list[Edit]:
    """What is done to each draw: their rows counted from the first."""
    source_rows = {
        text: first_source + index for index, text in enumerate(one.request.other_prompts)
    }
    n_tokens = len(one.asked.tokens)
    edits_of: list[list[Edit]] = []
    for order, perturbation in enumerate(one.request.perturbations):
        checkpoint()
        edits_of.append(
            [
                _edit(model, perturbation, order, draw, n_tokens, source_rows, one.means)._replace(
                    clean_row=clean
                )
                for draw in range(one.request.n_draws)
            ]
        )
    _follow_heads(one.request.perturbations, edits_of, n_tokens)
    return [edit for edits in edits_of for edit in edits]


def _follow_heads(
    perturbations: Sequence[Perturbation], edits_of: list[list[Edit]], n_tokens: int
) -> None:
    """Have what is added to a head's output scaled as that head's later edits scale it.

    They change its value before W_O, where the sum can no longer be met. W_O is linear: a head's value scaled is
    its output scaled.
    """
    later: dict[Component, Float[Tensor, "pos 1"]] = {}
    for order in reversed(range(len(perturbations))):
        head = Component.parse(perturbations[order].component)
        if head.kind is not Kind.HEAD:
            continue
        edits, at = edits_of[order], list(edits_of[order][0].positions)
        if edits[0].component == head:
            scale = later.setdefault(head, torch.ones(n_tokens, 1))
            scale[at] *= edits[0].scale
        elif head in later and edits[0].offset is not None:
            offset = edits[0].offset * later[head][at]
            edits_of[order] = [edit._replace(offset=offset) for edit in edits]


def _edit(
    model: LoadedModel,
    perturbation: Perturbation,
    order: int,
    draw: int,
    n_tokens: int,
    source_rows: Mapping[str, int],
    means: ReferenceMeans | None,
) -> Edit:
    component = Component.parse(perturbation.component)
    positions = resolve_positions(perturbation.token_positions, n_tokens)
    edit = Edit(draw, component, positions)
    match perturbation:
        case ZeroAblation():
            return edit._replace(scale=0.0)
        case Amplify(factor=factor):
            return edit._replace(scale=factor)
        case Invert():
            return edit._replace(scale=-1.0)
        case Noise(sigma=sigma, seed=seed):
            # The same request draws the same noise, whatever else is in the batch.
            generator = torch.Generator().manual_seed((seed * 1_000_003 + draw) * 257 + order)
            numbers = width(component.kind, model.architecture)
            noise = torch.randn(len(positions), numbers, generator=generator)
            return edit._replace(noise=sigma * noise)
        case MeanAblation():
            if means is None:
                raise Conflict(
                    "mean ablation needs the model's calibration, which has not been run"
                )
            return edit._replace(scale=0.0, offset=means.of(component))
        case Inject(values=values, mode=mode):
            return _injection(edit, torch.tensor(values), mode)
        case Patch(source_prompt=source):
            return edit._replace(scale=0.0, source_row=source_rows[source])


def _injection(edit: Edit, values: Tensor, mode: InjectMode) -> Edit:
    adds = mode is InjectMode.ADD
    if adds and edit.component.kind is Kind.HEAD:
        # What a head writes is added to what its layer writes.
        edit = edit._replace(component=Component(Kind.ATTN, edit.component.layer))
    return edit._replace(scale=float(adds), offset=values)


class _Spread(NamedTuple):
    """Mean and sample standard deviation over draws; a single draw has no spread."""

    mean: Tensor
    sd: Tensor


def _spread(draws: Float[Tensor, "draw *rest"]) -> _Spread:
    if len(draws) == 1:
        return _Spread(draws[0], torch.full_like(draws[0], torch.nan))
    return _Spread(draws.mean(0), draws.std(0))


class _Shift(NamedTuple):
    """What lies between the clean and the perturbed next-token distributions, in nats."""

    kl: Float[Tensor, "draw pos"]
    entropy_before: Float[Tensor, " pos"]
    entropy_after: Float[Tensor, "draw pos"]
    mixed: Float[Tensor, "pos d_vocab"]
    """Logits of the distribution that draws from the perturbed model would show."""

    @classmethod
    def between(
        cls, before: Float[Tensor, "pos d_vocab"], after: Float[Tensor, "draw pos d_vocab"]
    ) -> "_Shift":
        """A few positions at a time: their logits then stay in the processor's cache."""
        n_draws, _, d_vocab = after.shape
        at_once = max(1, tables.CACHED_BYTES[before.device.type] // (4 * d_vocab))
        kl, entropy_before, entropy_after, mixed = [], [], [], []
        for clean, others in zip(
            torch.split(before, at_once), torch.split(after, at_once, 1), strict=True
        ):
            log_p, log_q = clean.float().log_softmax(-1), others.float().log_softmax(-1)
            p = log_p.exp()
            kl.append(torch.linalg.vecdot(p.expand_as(log_q), log_p - log_q))
            entropy_before.append(-torch.linalg.vecdot(p, log_p))
            entropy_after.append(-torch.linalg.vecdot(log_q.exp(), log_q))
            if n_draws > 1:
                mixed.append(log_q.logsumexp(0) - log(n_draws))
        return cls(
            torch.cat(kl, 1),
            torch.cat(entropy_before),
            torch.cat(entropy_after, 1),
            torch.cat(mixed) if mixed else after[0],
        )


def _comparison_tables(
    model: LoadedModel, pair: _Pair, logits: Float[Tensor, "row pos d_vocab"]
) -> dict[str, pa.Table]:
    request, (tokens, _, answer_id, foil_id) = pair.one.request, pair.one.asked
    before, after = logits[pair.clean], logits[pair.perturbed.start : pair.perturbed.stop]
    position = resolve_positions((request.target_token_idx,), len(tokens))[0]
    found = _Shift.between(before, after)
    kl = _spread(found.kl)
    everywhere = tuple(range(len(before)))
    shift = build(
        "shift",
        {
            "position": pa.array(everywhere, pa.int32()),
            "kl": _floats(kl.mean),
            "kl_sd": _floats(kl.sd),
            "entropy_before": _floats(found.entropy_before),
            "entropy_after": _floats(found.entropy_after.mean(0)),
        },
    )
    answer = int(before[position].argmax()) if answer_id is None else answer_id
    as_scan = ActivationScan(prompt=request.prompt, top_predictions=request.top_predictions)
    return {
        "comparison": _comparison(
            model, before[position].float(), after[:, position].float(), answer, foil_id, position
        ),
        "shift": finished(
            shift,
            "shift",
            unit="nats",
            method="kl: D_KL(clean ‖ perturbed) of next-token distributions, from logits in float32",
            draws=len(after),
        ),
        "predictions": tables.predictions_table(
            model, tables.predictions(as_scan, before), everywhere
        ),
        "predictions_after": tables.predictions_table(
            model, tables.predictions(as_scan, found.mixed), everywhere
        ),
    }


def _comparison(
    model: LoadedModel,
    before: Float[Tensor, " d_vocab"],
    after: Float[Tensor, "draw d_vocab"],
    answer: int,
    foil: int | None,
    position: int,
) -> pa.Table:
    def measured(logits: Float[Tensor, "*draw d_vocab"]) -> Float[Tensor, "*draw"]:
        if foil is None:
            return logits.log_softmax(-1)[..., answer]
        return logits[..., answer] - logits[..., foil]

    metric = _spread(measured(after))
    columns = {
        "position": pa.array([position], pa.int32()),
        "answer_id": pa.array([answer], pa.int32()),
        "answer": pa.array([model.text(answer)], pa.string()),
        "foil_id": pa.array([-1 if foil is None else foil], pa.int32()),
        "metric_before": _floats(measured(before)),
        "metric_after": _floats(metric.mean),
        "metric_sd": _floats(metric.sd),
        "logit_before": _floats(before[answer]),
        "logit_after": _floats(after[:, answer].mean()),
        "probability_before": _floats(before.softmax(-1)[answer]),
        "probability_after": _floats(after.softmax(-1)[:, answer].mean()),
    }
    return finished(
        build("comparison", columns),
        "comparison",
        unit="nats" if foil is None else "logits",
        method="metric: log-probability of the answer" if foil is None else "metric: answer - foil",
        draws=len(after),
    )


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.reshape(-1).float().cpu().numpy(), pa.float32())


class _PairReading:
    """What components write in clean and perturbed rows, and the length of the difference.

    Summarised together, as if clean runs, perturbed runs and differences were one long prompt.
    """

    def __init__(self, model: LoadedModel, n_tokens: int, pairs: Sequence[_Pair]) -> None:
        self._modules = model.modules
        self._maps = model.output_maps
        self._n_layers = model.architecture.n_layers
        self._pairs = pairs
        self._clean = [pair.clean for pair in pairs]
        self._perturbed = [(pair.clean, row) for pair in pairs for row in pair.perturbed]
        self._components = reporting_order(model.architecture)
        self._n_tokens = n_tokens
        self._summaries = Summaries(
            ActivationScan(prompt="-", top_neurons=0),
            self._components,
            model.architecture,
            model.output_maps,
            n_positions=(len(self._clean) + 2 * len(self._perturbed)) * n_tokens,
            kept=None,
            device=model.device,
        )
        self._running: dict[Part, Tensor] = {}
        self._gathered: list[LayerTensors] = []
        self._gathered_bytes = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Read the next forward."""
        readers: list[tuple[Any, Reader]] = []
        for layer, block in enumerate(self._modules.blocks):
            if block.attn_write is block.w_o:
                readers.append((block.w_o, self._holder(Part.Z, Part.ATTN)))
            else:
                readers.append((block.w_o, self._holder(Part.Z, Part.PROJECTED)))
                readers.append((block.attn_write, self._holder(None, Part.ATTN)))
            readers.append((block.mlp_write, self._holder(None, Part.MLP)))
            readers.append((block.block, partial(self._end_layer, layer)))
        readers.append((self._modules.final_norm, self._end))
        with hooked(*readers):
            yield

    def _holder(self, taken: Part | None, given: Part) -> Reader:
        running = self._running

        def hold(_module: Any, args: tuple[Any, ...], output: Any) -> None:
            if taken is not None:
                running[taken] = tensor_in(args)
            running[given] = tensor_out(output)

        return hold

    def _end_layer(self, layer: int, _module: Any, args: tuple[Any, ...], output: Any) -> None:
        parts = self._running.copy()
        self._running.clear()
        parts[Part.BEFORE], parts[Part.AFTER] = tensor_in(args), tensor_out(output)
        if layer == 0:
            (embedding,) = self._compared(parts[Part.BEFORE][None])
            self._summaries.add_embedding(embedding)
        if self._gathered and len(self._gathered[-1].parts[Part.AFTER]) < len(parts[Part.AFTER]):
            self._summarise()
        self._gathered.append(LayerTensors(layer, parts))
        self._gathered_bytes += sum(value.nbytes for value in parts.values())
        if self._gathered_bytes >= GATHERED_BYTES or layer == self._n_layers - 1:
            self._summarise()

    def _end(self, _module: Any, _args: tuple[Any, ...], output: Any) -> None:
        (normed,) = self._compared(tensor_out(output)[None])
        self._summaries.add_unembedding(normed)

    def _summarise(self) -> None:
        layers = [gathered.layer for gathered in self._gathered]
        parts = {
            part: torch.stack([gathered.parts[part] for gathered in self._gathered])
            for part in self._gathered[0].parts
        }
        if Part.PROJECTED in parts:
            # Each run has its own post-norm scale: it goes into z, so that differences need none.
            written = parts[Part.ATTN]
            scale = self._maps.scale(
                slice(layers[0], layers[-1] + 1),
                parts.pop(Part.PROJECTED).flatten(1, 2),
                written.flatten(1, 2),
            )
            parts[Part.Z] = parts[Part.Z].float() * scale.view(*written.shape[:3], 1)
        compared = {part: self._compared(value) for part, value in parts.items()}
        self._summaries.add_layers(
            [
                LayerTensors(layer, {part: value[offset] for part, value in compared.items()})
                for offset, layer in enumerate(layers)
            ]
        )
        self._gathered, self._gathered_bytes = [], 0

    def _compared(
        self, value: Float[Tensor, "layer row pos width"]
    ) -> Float[Tensor, "layer all width"]:
        """Clean rows, perturbed rows (which equal theirs until they join the batch), differences."""
        n_rows = value.shape[1]
        own = [row if row < n_rows else clean for clean, row in self._perturbed]
        others = value[:, own].float()
        differences = others - value[:, [clean for clean, _ in self._perturbed]].float()
        return torch.cat([value[:, self._clean].float(), others, differences], dim=1).flatten(1, 2)

    def tables(self) -> Iterator[dict[str, pa.Table]]:
        """Of each pair `tokens`, `activations`, `activations_after`, `change`."""
        n_clean, n_perturbed = len(self._clean), len(self._perturbed)
        values = self._summaries.values().view(len(self._components), -1, self._n_tokens)
        clean, after, change = torch.split(values, [n_clean, n_perturbed, n_perturbed], 1)
        draws = [len(pair.perturbed) for pair in self._pairs]
        for at, (pair, own_after, own_change) in enumerate(
            zip(
                self._pairs,
                torch.split(after, draws, 1),
                torch.split(change, draws, 1),
                strict=True,
            )
        ):
            tokens = pair.one.asked.tokens
            yield self._tables(tokens, clean[:, at], own_after.mean(1), own_change.mean(1))

    def _tables(
        self,
        tokens: Tokens,
        clean: Float[Tensor, "component pos"],
        after: Float[Tensor, "component pos"],
        change: Float[Tensor, "component pos"],
    ) -> dict[str, pa.Table]:
        positions = tuple(range(self._n_tokens))
        ends = [row for row, c in enumerate(self._components) if c.kind is Kind.RESID_POST]
        columns = tables.columns_of(self._components)

        def table(values: Float[Tensor, "component pos"], of: str) -> pa.Table:
            value = positions_column(_floats(values), self._n_tokens)
            return finished(
                build("activations", columns, value),
                "activations",
                unit="L2 norm",
                method=f"length of what each component writes to the residual stream, {of}",
                positions=positions,
                of=of,
            )

        return {
            "tokens": tables.tokens_table(tokens, sinks(clean[ends])),
            "activations": table(clean, "clean"),
            "activations_after": table(after, "perturbed"),
            "change": table(change, "perturbed - clean"),
        }
