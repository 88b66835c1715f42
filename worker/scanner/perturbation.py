"""Stimulation: a prompt read clean and perturbed, as rows of one batch, and what that changed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import log
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
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
from worker.scanner.interventions import CLEAN, Edit, Rows, forward, width
from worker.scanner.layer_reading import GATHERED_BYTES
from worker.scanner.layer_summaries import LayerTensors, Part, Summaries, sinks
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.prompts import ScanOutput, finished, token_ids
from worker.scanner.references import ReferenceMeans

__all__ = ("scan_perturbation",)


@torch.inference_mode()
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
    request.check(model.architecture)
    position = resolve_positions((request.target_token_idx,), len(tokens))[0]
    plan = _Plan.of(model, request, tokens, sources, means)
    reading = _PairReading(model, len(tokens), plan.perturbed) if request.perturbed_scan else None

    def on_layer(layer: int) -> None:
        listener.progress("forward", layer + 1, model.architecture.n_layers)
        listener.checkpoint()

    started = time.perf_counter()
    logits = forward(
        model,
        plan.rows,
        plan.edits,
        readers=None if reading is None else reading.listening,
        on_layer=on_layer,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    forward_seconds = time.perf_counter() - started
    before, after = logits[CLEAN], logits[plan.perturbed.start :]
    made = _comparison_tables(model, request, before, after, position, answer_id, foil_id)
    if reading is not None:
        made |= reading.tables(tokens)
    return ScanOutput(made, forward_seconds)


class _Plan(NamedTuple):
    """The rows of the batch and what is done to them."""

    rows: Rows
    perturbed: range
    """The edited rows: one a draw."""
    edits: tuple[Edit, ...]

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        request: PerturbationScan,
        tokens: Tokens,
        sources: Mapping[str, Tokens],
        means: ReferenceMeans | None,
    ) -> "_Plan":
        """Raises `Problem` for an operand that does not fit."""
        used = list(
            dict.fromkeys(p.source_prompt for p in request.perturbations if isinstance(p, Patch))
        )
        prompts = [token_ids(model, tokens)]
        for text in used:
            if len(sources[text]) != len(tokens):
                raise Unprocessable(
                    f"the source prompt has {len(sources[text])} tokens and the prompt {len(tokens)}: "
                    "expected as many, or positions would not correspond",
                    n_tokens=len(tokens),
                    n_source_tokens=len(sources[text]),
                )
            prompts.append(token_ids(model, sources[text]))
        draws = max((p.draws for p in request.perturbations if isinstance(p, Noise)), default=1)
        rows = Rows(torch.cat(prompts), copies=draws)
        perturbed = range(len(prompts), rows.total)
        edits = tuple(
            _edit(model, perturbation, order, row, draw, len(tokens), used, means)
            for order, perturbation in enumerate(request.perturbations)
            for draw, row in enumerate(perturbed)
        )
        return cls(rows, perturbed, edits)


def _edit(
    model: LoadedModel,
    perturbation: Perturbation,
    order: int,
    row: int,
    draw: int,
    n_tokens: int,
    sources: Sequence[str],
    means: ReferenceMeans | None,
) -> Edit:
    component = Component.parse(perturbation.component)
    positions = resolve_positions(perturbation.token_positions, n_tokens)
    edit = Edit(row, component, positions)
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
            return edit._replace(scale=0.0, source_row=1 + sources.index(source))


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
    model: LoadedModel,
    request: PerturbationScan,
    before: Float[Tensor, "pos d_vocab"],
    after: Float[Tensor, "draw pos d_vocab"],
    position: int,
    answer_id: int | None,
    foil_id: int | None,
) -> dict[str, pa.Table]:
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
        "predictions": tables.predictions_table(model, as_scan, before, everywhere),
        "predictions_after": tables.predictions_table(model, as_scan, found.mixed, everywhere),
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
    """What components write in the clean and in the perturbed rows, and the length of the difference.

    Summarised together, as if clean run, perturbed runs and differences were one long prompt.
    """

    def __init__(self, model: LoadedModel, n_tokens: int, perturbed: range) -> None:
        self._modules = model.modules
        self._maps = model.output_maps
        self._n_layers = model.architecture.n_layers
        self._first, self._n_draws = perturbed.start, len(perturbed)
        self._components = reporting_order(model.architecture)
        self._n_tokens = n_tokens
        self._summaries = Summaries(
            ActivationScan(prompt="-", top_neurons=0),
            self._components,
            model.architecture,
            model.output_maps,
            n_positions=(1 + 2 * self._n_draws) * n_tokens,
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
        """Clean row, perturbed rows (which equal it while the batch has not grown), differences."""
        clean = value[:, CLEAN : CLEAN + 1].float()
        if value.shape[1] > self._first:
            others = value[:, self._first :].float()
            differences = others - clean
        else:
            others = clean.expand(-1, self._n_draws, -1, -1)
            differences = torch.zeros_like(others)
        return torch.cat([clean, others, differences], dim=1).flatten(1, 2)

    def tables(self, tokens: Tokens) -> dict[str, pa.Table]:
        """`tokens`, `activations`, `activations_after`, `change`."""
        positions = tuple(range(self._n_tokens))
        values = self._summaries.values().view(len(self._components), -1, self._n_tokens)
        clean = values[:, 0]
        after, change = torch.split(values[:, 1:], self._n_draws, 1)
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
            "activations_after": table(after.mean(1), "perturbed"),
            "change": table(change.mean(1), "perturbed - clean"),
        }
