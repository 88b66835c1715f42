"""Stimulation: a prompt read clean and perturbed, as rows of one batch, and what that changed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from neural_mri.contract.results import build, component_columns, positions_column
from neural_mri.contract.scans import ActivationScan, reporting_order, resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner import activation_tables as tables
from worker.scanner.hooks import Reader, hooked, tensor_in, tensor_out
from worker.scanner.interventions import CLEAN, Edit, Rows, forward, width
from worker.scanner.layer_summaries import LayerTensors, Part, Summaries
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
    before, after = logits[CLEAN], logits[list(plan.perturbed)]
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
            return _injection(model, edit, torch.tensor(values), mode)
        case Patch(source_prompt=source):
            return edit._replace(scale=0.0, source_row=1 + sources.index(source))


def _injection(model: LoadedModel, edit: Edit, values: Tensor, mode: InjectMode) -> Edit:
    kind, shape = edit.component.kind, model.architecture
    adds = mode is InjectMode.ADD
    expected = shape.d_model if adds and kind is Kind.HEAD else width(kind, shape)
    if len(values) != expected:
        raise Unprocessable(
            f"inject has {len(values)} values for {edit.component}: expected {expected} where the mode "
            f"is {mode.value}",
            component=str(edit.component),
            expected=expected,
        )
    if adds and kind is Kind.HEAD:
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


def _comparison_tables(
    model: LoadedModel,
    request: PerturbationScan,
    before: Float[Tensor, "pos d_vocab"],
    after: Float[Tensor, "draw pos d_vocab"],
    position: int,
    answer_id: int | None,
    foil_id: int | None,
) -> dict[str, pa.Table]:
    log_p = before.float().log_softmax(-1)
    log_q = after.float().log_softmax(-1)
    p = log_p.exp()
    kl = _spread((p * (log_p - log_q)).sum(-1))
    entropy_before = -(p * log_p).sum(-1)
    entropy_after = _spread(-(log_q.exp() * log_q).sum(-1))
    n_positions = len(before)
    everywhere = tuple(range(n_positions))
    shift = build(
        "shift",
        {
            "position": pa.array(everywhere, pa.int32()),
            "kl": _floats(kl.mean),
            "kl_sd": _floats(kl.sd),
            "entropy_before": _floats(entropy_before),
            "entropy_after": _floats(entropy_after.mean),
        },
    )
    answer = int(before[position].argmax()) if answer_id is None else answer_id
    # The distribution that draws from the perturbed model would show.
    mixed = (
        after[0] if len(after) == 1 else log_q.logsumexp(0) - torch.log(torch.tensor(len(after)))
    )
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
        "predictions_after": tables.predictions_table(model, as_scan, mixed, everywhere),
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
    """What components write in the clean and in the perturbed rows, and the length of the difference."""

    def __init__(self, model: LoadedModel, n_tokens: int, perturbed: range) -> None:
        self._model = model
        self._perturbed = perturbed
        self._request = ActivationScan(prompt="-", top_neurons=0)
        self._components = reporting_order(model.architecture)
        self._n_tokens = n_tokens
        self._clean = self._summaries()
        self._after = [self._summaries() for _ in perturbed]
        self._change = [self._summaries() for _ in perturbed]
        self._running: dict[Part, Tensor] = {}

    def _summaries(self) -> Summaries:
        return Summaries(
            self._request,
            self._components,
            self._model.architecture,
            self._model.output_maps,
            n_positions=self._n_tokens,
            kept=None,
            device=self._model.device,
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Read the next forward."""
        readers: list[tuple[Any, Reader]] = []
        post_norms = self._model.output_maps.gain is not None
        for layer, block in enumerate(self._model.modules.blocks):
            readers.append((block.w_o, self._hold_w_o if post_norms else self._hold_z))
            readers.append((block.attn_write, self._holder(Part.ATTN)))
            readers.append((block.mlp_write, self._holder(Part.MLP)))
            readers.append((block.block, self._end_of(layer)))
        readers.append((self._model.modules.final_norm, self._end))
        with hooked(*readers):
            yield

    def _hold_z(self, _module: Any, args: tuple[Any, ...], _output: Any) -> None:
        self._running[Part.Z] = tensor_in(args)

    def _hold_w_o(self, _module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._running[Part.Z] = tensor_in(args)
        self._running[Part.PROJECTED] = tensor_out(output)

    def _holder(self, part: Part) -> Reader:
        def hold(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
            self._running[part] = tensor_out(output)

        return hold

    def _end_of(self, layer: int) -> Reader:
        def end(_module: Any, args: tuple[Any, ...], output: Any) -> None:
            parts, self._running = self._running, {}
            parts[Part.BEFORE], parts[Part.AFTER] = tensor_in(args), tensor_out(output)
            if layer == 0:
                self._add_embedding(parts[Part.BEFORE])
            self._add(layer, parts)

        return end

    def _end(self, _module: Any, _args: tuple[Any, ...], output: Any) -> None:
        clean, others = self._rows(tensor_out(output))
        self._clean.add_unembedding(clean)
        for after, change, other in zip(self._after, self._change, others, strict=True):
            after.add_unembedding(other)
            change.add_unembedding(other - clean)

    def _add_embedding(self, value: Tensor) -> None:
        clean, others = self._rows(value)
        self._clean.add_embedding(clean)
        for after, change, other in zip(self._after, self._change, others, strict=True):
            after.add_embedding(other)
            change.add_embedding(other - clean)

    def _rows(self, value: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The clean row and the perturbed ones, which equal it while the batch has not grown."""
        clean = value[CLEAN]
        return clean, [value[row] if row < len(value) else clean for row in self._perturbed]

    def _add(self, layer: int, parts: Mapping[Part, Tensor]) -> None:
        rows = {part: self._rows(value) for part, value in parts.items()}
        clean = {part: row for part, (row, _) in rows.items()}
        self._clean.add_layers([LayerTensors(layer, clean)])
        for draw, (after, change) in enumerate(zip(self._after, self._change, strict=True)):
            other = {part: others[draw] for part, (_, others) in rows.items()}
            after.add_layers([LayerTensors(layer, other)])
            change.add_layers([LayerTensors(layer, self._difference(layer, clean, other))])

    def _difference(
        self, layer: int, clean: Mapping[Part, Tensor], other: Mapping[Part, Tensor]
    ) -> dict[Part, Tensor]:
        difference = {part: other[part] - clean[part] for part in clean}
        if Part.PROJECTED in difference:
            # Each run has its own post-norm scale: it goes into z, so that none is left to apply.
            del difference[Part.PROJECTED]
            difference[Part.Z] = self._scaled_z(layer, other) - self._scaled_z(layer, clean)
        return difference

    def _scaled_z(self, layer: int, parts: Mapping[Part, Tensor]) -> Tensor:
        span = slice(layer, layer + 1)
        projected, written = parts[Part.PROJECTED][None], parts[Part.ATTN][None]
        scale = self._model.output_maps.scale(span, projected, written)[0]
        return parts[Part.Z].float() * scale.unsqueeze(-1)

    def tables(self, tokens: Tokens) -> dict[str, pa.Table]:
        """`tokens`, `activations`, `activations_after`, `change`."""
        positions = tuple(range(self._n_tokens))

        def table(values: Tensor, of: str) -> pa.Table:
            columns = component_columns(self._components)
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
            "tokens": tables.tokens_table(tokens, self._clean.sinks()),
            "activations": table(self._clean.values(), "clean"),
            "activations_after": table(_mean(self._after), "perturbed"),
            "change": table(_mean(self._change), "perturbed - clean"),
        }


def _mean(summaries: Sequence[Summaries]) -> Float[Tensor, "component pos"]:
    return torch.stack([one.values() for one in summaries]).mean(0)
