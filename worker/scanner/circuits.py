"""DTI: which components carry an answer, and along which paths.

The effect of a component is what replacing it does to the metric: its value taken from a corrupt prompt, from
ordinary text, or set to nothing. Effects are measured exactly in one pass (`sweep`) or estimated from
gradients (`attribution`); `fast` does both, estimates for the first picture and measurements for what matters
in it. What connects components is read off the same gradients (`edges`).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan, Granularity
from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.events import EffectsFrame
from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import Conflict
from neural_mri.contract.tokens import Tokens
from worker.scanner import circuit_tables as tables
from worker.scanner.attribution import (
    Differentiated,
    StraightPath,
    differentiate,
    estimates,
    in_metric,
    slope,
)
from worker.scanner.circuit_questions import Prompts, Question
from worker.scanner.direct_attribution import DirectAttribution, direct_attribution
from worker.scanner.edges import Edges, strongest_edges
from worker.scanner.listening import Listener, Timed
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric, log_probability
from worker.scanner.prompts import ScanOutput
from worker.scanner.references import ReferenceMeans
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run, record
from worker.scanner.sweep import sweep

__all__ = ("MOST_TOLD", "scan_circuits")

MOST_TOLD = 1024
"""Components told in one frame, the strongest. The table has all of them."""


@torch.inference_mode(mode=False)
@torch.no_grad()
def scan_circuits(
    model: LoadedModel,
    request: CircuitScan,
    tokens: Tokens,
    corrupt: Tokens | None,
    answer_id: int | None,
    foil_id: int | None,
    listener: Listener,
    reference: ReferenceMeans | None,
) -> ScanOutput:
    """The tables `effects` and `metric`, and where edges are asked for, `edges`.

    Args:
        model: The model.
        request: What is asked.
        tokens: The prompt.
        corrupt: The corrupt prompt, where there is one.
        answer_id: The next token asked about; the clean run's likeliest where None.
        foil_id: The token it is compared with.
        listener: Hears estimates as soon as there are any, then what is measured; may stop the scan.
        reference: What mean ablation puts in a component's place.

    Raises:
        Problem: The request asks for what the model or the prompts do not have.
        Cancelled: The listener stopped it. The model is as it was, hooks and all.
    """
    request.check(model.architecture)
    prompts = Prompts.of(model, request, tokens, corrupt)
    question = Question.of(model, answer_id, foil_id)
    timed = Timed(listener)
    circuit = _Circuit(model, request, prompts, question, timed, reference)
    effects = circuit.effects()
    edges = circuit.edges()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    forward_seconds = timed.own_seconds
    metric = circuit.metric
    made = {
        "effects": tables.effects_table(metric, effects, **circuit.provenance()),
        "metric": tables.metric_table(model, metric, circuit.measured()),
    }
    if edges is not None:
        made["edges"] = tables.edges_table(
            metric, effects.components, edges, **circuit.provenance()
        )
    return ScanOutput(made, forward_seconds)


class _Circuit:
    """One scan, its runs made."""

    metric: Metric

    def __init__(
        self,
        model: LoadedModel,
        request: CircuitScan,
        prompts: Prompts,
        question: Question,
        listener: Listener,
        reference: ReferenceMeans | None,
    ) -> None:
        self._model = model
        self._request = request
        self._prompts = prompts
        self._listener = listener
        self._path: Sequence[Differentiated] | StraightPath | None = None
        self._swept_by = ""
        runs = self._runs(question)
        self._clean = runs.row(0)
        self._corrupt = runs.row(1) if len(prompts.ids) > 1 else None
        self._replacements = self._replaced_by(reference)

    @cached_property
    def _direct(self) -> DirectAttribution:
        return direct_attribution(self._model, self._clean, self.metric)

    def _runs(self, question: Question) -> Run:
        """Clean and corrupt run, in one batch, and where gradients are to be taken."""
        method, ids = self._request.method, self._prompts.ids
        along_path = method is CircuitMethod.INTEGRATED_GRADIENTS
        exact_only = method is CircuitMethod.ABLATION and not self._request.edges
        if along_path or exact_only or method is CircuitMethod.DIRECT:
            runs = record(self._model, ids, on_layer=self._on_layer)
            self.metric = question.metric(runs.logits[0])
            if along_path:
                self._path = StraightPath(
                    self._model, ids[:1], ids[1:], self.metric, self._request.steps, self._on_layer
                )
            return runs

        def scalar(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, ""]:
            self.metric = question.metric(logits[0].detach())
            return slope(self.metric, logits[0])

        both = differentiate(self._model, ids, scalar, rows=1, on_layer=self._on_layer)
        self._path = [both.row(0)]
        return both.run

    def _on_layer(self, layer: int) -> None:
        self._listener.progress("forward", layer + 1, self._model.architecture.n_layers)
        self._listener.checkpoint()

    def _replaced_by(self, reference: ReferenceMeans | None) -> Replacements | None:
        shape, start = self._model.architecture, self._prompts.start
        if self._request.method is CircuitMethod.DIRECT:
            return None
        match self._request.effective_ablation:
            case Ablation.RESAMPLE:
                if self._corrupt is None:
                    raise ValueError(
                        "CircuitScan.check lets no resampling pass without a corrupt prompt"
                    )
                return Replacements.resample(self._corrupt, self._clean, shape, start=start)
            case Ablation.MEAN:
                if reference is None:
                    raise Conflict(
                        "mean ablation needs the model's calibration, which has not been run"
                    )
                return Replacements.mean(reference, self._clean, shape, start=start)
            case Ablation.ZERO:
                return Replacements.zero(self._clean, shape, start=start)

    def effects(self) -> tables.Effects:
        """Everything the method says of every component."""
        components = _components(self._model.architecture, self._request.granularity)
        estimate = self._estimates(components)
        measured = self._measured_effects(components, estimate)
        exact = ~measured.isnan()
        return tables.Effects(
            components=components,
            effect=torch.where(exact, measured, estimate),
            exact=exact,
            estimate=estimate,
            direct=_filled(
                len(components), range(len(components) - 1), self._direct_terms(components)
            ),
        )

    def _direct_terms(self, components: Sequence[Component]) -> Float[Tensor, " component"]:
        return self._direct.of(components[:-1]).cpu()

    def _estimates(self, components: Sequence[Component]) -> Float[Tensor, " component"]:
        """First-order estimates, told as soon as they are known; NaN where the method takes none."""
        if self._path is None or self._replacements is None:
            return _filled(len(components), (), torch.empty(0))
        estimated = range(len(components) - 1)
        first_order = estimates(components[:-1], self._clean, self._replacements, self._path)
        values = in_metric(self.metric, self._clean.logits[0].cpu(), first_order)
        self._tell(components, estimated, values, exact=False)
        return _filled(len(components), estimated, values)

    def _measured_effects(
        self, components: Sequence[Component], estimate: Float[Tensor, " component"]
    ) -> Float[Tensor, " component"]:
        """Exact effects of what the method measures, told when they are known; NaN for the others."""
        chosen = self._chosen(components, estimate)
        if self._replacements is None or not chosen:
            return _filled(len(components), (), torch.empty(0))
        swept = sweep(
            self._model,
            self._clean,
            [components[index] for index in chosen],
            self._replacements,
            self.metric,
            self._listener,
        )
        self._swept_by = swept.method
        self._tell(components, chosen, swept.effects, exact=True)
        return _filled(len(components), chosen, swept.effects)

    def _chosen(
        self, components: Sequence[Component], estimate: Float[Tensor, " component"]
    ) -> Sequence[int]:
        """Indices of the components to measure."""
        match self._request.method:
            case CircuitMethod.ABLATION:
                return range(len(components) - 1)
            case CircuitMethod.FAST if self._request.exact > 0:
                inner = range(1, len(components) - 1)
                count = min(self._request.exact, len(inner))
                strongest = estimate[1:-1].abs().topk(count).indices + 1
                chosen = set(strongest.tolist())
                # Means and zeros are far from an MLP's own values, and whatever the first MLP is given
                # is far from linear in everything above it: their estimates say little.
                resampled = self._request.effective_ablation is Ablation.RESAMPLE
                chosen.update(
                    index
                    for index in inner
                    if components[index].kind is Kind.MLP
                    and (components[index].layer == 0 or not resampled)
                )
                return sorted(chosen)
            case _:
                return ()

    def _tell(
        self,
        components: Sequence[Component],
        indices: Sequence[int],
        values: Float[Tensor, " component"],
        *,
        exact: bool,
    ) -> None:
        strongest = values.abs().topk(min(MOST_TOLD, len(values))).indices.sort().values.tolist()
        self._listener.effects(
            EffectsFrame(
                exact=exact,
                components=tuple(str(components[indices[place]]) for place in strongest),
                effects=tuple(values[strongest].tolist()),
                unit=self.metric.unit,
            )
        )

    def edges(self) -> Edges | None:
        """The strongest edges; None where none are asked for, or the method takes no gradients."""
        if self._path is None or self._replacements is None or not self._request.edges:
            return None
        return strongest_edges(
            self._model,
            self._clean,
            self._path,
            self._replacements,
            self._request.granularity,
            self._request.edges,
            self._listener,
        )

    def measured(self) -> tables.Measured:
        """What the two runs answer."""

        def answers(run: Run | None) -> tuple[float, float]:
            if run is None:
                return float("nan"), float("nan")
            logits = run.logits[0]
            probability = log_probability(logits, self.metric.answer_id).exp()
            return self.metric(logits).item(), probability.item()

        (clean, probability_clean) = answers(self._clean)
        (corrupted, probability_corrupted) = answers(self._corrupt)
        return tables.Measured(
            position=self._clean.n_positions - 1,
            clean=clean,
            corrupted=corrupted,
            probability_clean=probability_clean,
            probability_corrupted=probability_corrupted,
            direct_biases=self._direct.biases.item(),
        )

    def provenance(self) -> dict[str, Any]:
        """How the numbers came about: the tables' `method` and its parameters."""
        request = self._request
        parameters: dict[str, Any] = {
            "method": _METHODS[request.method],
            "granularity": request.granularity,
            "position": self._clean.n_positions - 1,
        }
        if self._replacements is not None:
            parameters["ablation"] = request.effective_ablation
            parameters["first_position"] = self._replacements.start
        if self._swept_by:
            parameters["sweep"] = self._swept_by
        return parameters


_METHODS = {
    CircuitMethod.FAST: "attribution patching of all, exact ablation of the strongest",
    CircuitMethod.ABLATION: "exact ablation; estimates by attribution patching",
    CircuitMethod.ATTRIBUTION_PATCHING: "attribution patching",
    CircuitMethod.INTEGRATED_GRADIENTS: "gradients averaged from corrupt to clean embeddings (EAP-IG)",
    CircuitMethod.DIRECT: "direct logit attribution only",
}


def _components(shape: Architecture, granularity: Granularity) -> tuple[Component, ...]:
    """Embedding, the components of each layer, unembedding."""
    if granularity is Granularity.HEADS:
        return tuple(shape.nodes())
    inner = (
        Component(kind, layer) for layer in range(shape.n_layers) for kind in (Kind.ATTN, Kind.MLP)
    )
    return (EMBED, *inner, UNEMBED)


def _filled(length: int, indices: Sequence[int], values: Tensor) -> Float[Tensor, " component"]:
    """The values at the indices, NaN, not known, elsewhere."""
    filled = torch.full((length,), torch.nan)
    filled[list(indices)] = values
    return filled
