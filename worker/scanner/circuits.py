"""DTI: which components carry an answer, and along which paths.

The effect of a component is what replacing it does to the metric: its value taken from a corrupt prompt, from
ordinary text, or set to nothing. Effects are measured exactly in one pass (`sweep`) or estimated from
gradients (`attribution`); `fast` does both, estimates for the first picture and measurements for what matters
in it. What connects components is read off the same gradients (`edges`). Gradients of several scans are taken
together (`circuit_runs`); each is then measured for itself.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan, Granularity
from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.events import EffectsFrame
from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import Conflict, Problem
from neural_mri.contract.tokens import Tokens
from worker.scanner import circuit_tables as tables
from worker.scanner.attribution import estimates, in_metric
from worker.scanner.circuit_questions import Prompts, Question
from worker.scanner.circuit_runs import CircuitRuns, run_alone, run_together
from worker.scanner.direct_attribution import DirectAttribution, direct_attribution
from worker.scanner.edges import Edges, strongest_edges
from worker.scanner.listening import Cancelled, Listener, Timed
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import log_probability
from worker.scanner.prompts import ScanOutput
from worker.scanner.references import ReferenceMeans
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run
from worker.scanner.shared_forward import AskedOf, Company, Outcome, nobody_waits, outcome_of
from worker.scanner.sweep import sweep

__all__ = ("MOST_TOLD", "AskedCircuit", "scan_circuits", "scan_circuits_together")

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
    asked = AskedOf(tokens, listener, answer_id, foil_id)
    prompts, question = _understood(model, AskedCircuit(request, asked, corrupt))
    timed = Timed(listener)
    runs = run_alone(model, request, prompts, question, timed)
    circuit = _Circuit(model, request, runs, prompts.start, reference)
    circuit.estimate(timed)
    return _measured(circuit, timed, 0.0)


class AskedCircuit(NamedTuple):
    """A scan among others, and what it reads beside its prompt."""

    request: CircuitScan
    asked: AskedOf
    corrupt: Tokens | None = None
    means: ReferenceMeans | None = None


@torch.inference_mode(mode=False)
@torch.no_grad()
def scan_circuits_together(
    model: LoadedModel,
    circuits: Sequence[AskedCircuit],
    ready: Callable[[Mapping[int, Outcome]], None] = nobody_waits,
) -> list[Outcome]:
    """What became of each scan: what it would give alone, to the last digits but one.

    Their gradients are taken in one forward and backward pass, which goes on while anybody waits for it, and
    everybody hears estimates. Then they are measured one after another, those first that have least to measure;
    `ready` is given each, by its index, while others are still measured, and at once who has stopped. Raises what
    concerns them all, and `Cancelled` when nobody waits any more.
    """
    if any(not one.request.takes_one_gradient for one in circuits):
        raise ValueError("a scan by another method than one gradient has its forward to itself")
    if len(circuits) > 1 and any(one.request.shared_forward is None for one in circuits):
        raise ValueError("a canonical scan has its forward to itself")
    outcomes: dict[int, Outcome] = {}
    asked: dict[int, tuple[Prompts, Question]] = {}
    for index, one in enumerate(circuits):
        try:
            asked[index] = _understood(model, one)
        except Problem as problem:
            outcomes[index] = problem
    begun = _begun_together(model, circuits, asked, outcomes) if asked else {}
    for index in sorted(begun, key=lambda index: circuits[index].request.exact_at_most):
        if index in outcomes:
            continue
        circuit, seconds = begun[index]
        heard = Timed(circuits[index].asked.listener)
        outcomes[index] = outcome_of(partial(_measured, circuit, heard, seconds))
        known = {index: outcomes[index]}
        for other in begun.keys() - outcomes.keys():
            if (stopped := _stopped(circuits[other].asked.listener)) is not None:
                known[other] = outcomes[other] = stopped
        if begun.keys() - outcomes.keys():
            ready(known)
    return [outcomes[index] for index in range(len(circuits))]


def _begun_together(
    model: LoadedModel,
    circuits: Sequence[AskedCircuit],
    asked: Mapping[int, tuple[Prompts, Question]],
    outcomes: dict[int, Outcome],
) -> dict[int, tuple["_Circuit", float]]:
    """Scans whose estimates are told, and each one's seconds so far; what became of others is put in `outcomes`."""
    timed = Timed(Company([circuits[index].asked.listener for index in asked]))
    runs = run_together(model, [*asked.values()], timed)
    share = timed.own_seconds / len(asked)
    begun = {}
    for index, found in zip(asked, runs, strict=True):
        if isinstance(found, Problem):
            outcomes[index] = found
            continue
        one, heard = circuits[index], Timed(circuits[index].asked.listener)
        try:
            heard.checkpoint()
            circuit = _Circuit(model, one.request, found, asked[index][0].start, one.means)
            circuit.estimate(heard)
        except (Problem, Cancelled) as reason:
            outcomes[index] = reason
        else:
            begun[index] = (circuit, share + heard.own_seconds)
    return begun


def _stopped(listener: Listener) -> Cancelled | None:
    try:
        listener.checkpoint()
    except Cancelled as cancelled:
        return cancelled
    return None


def _understood(model: LoadedModel, one: AskedCircuit) -> tuple[Prompts, Question]:
    """Raises the `Problem` that keeps one scan from being made."""
    one.request.check(model.architecture)
    prompts = Prompts.of(model, one.request, one.asked.tokens, one.corrupt)
    return prompts, Question.of(model, one.asked.answer_id, one.asked.foil_id)


def _measured(circuit: "_Circuit", timed: Timed, seconds: float) -> ScanOutput:
    """A scan's tables, its estimates told; `seconds` have been spent on it before."""
    timed.checkpoint()
    return circuit.output(timed, lambda: seconds + timed.own_seconds)


class _Circuit:
    """One scan, its runs made."""

    def __init__(
        self,
        model: LoadedModel,
        request: CircuitScan,
        runs: CircuitRuns,
        start: int,
        reference: ReferenceMeans | None,
    ) -> None:
        self._model = model
        self._request = request
        self._clean, self._corrupt, self._metric, self._path = runs
        self._swept_by = ""
        self._replacements = self._replaced_by(reference, start)
        self._components = _components(model.architecture, request.granularity)
        self._estimate = _filled(len(self._components), (), torch.empty(0))

    def output(self, listener: Listener, seconds: Callable[[], float]) -> ScanOutput:
        """The tables; what is measured is told. `seconds` are asked for once everything is computed."""
        effects, edges = self._effects(listener), self._edges(listener)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        taken = seconds()
        made = {
            "effects": tables.effects_table(self._metric, effects, **self._provenance()),
            "metric": tables.metric_table(self._model, self._metric, self._measured()),
        }
        if edges is not None:
            made["edges"] = tables.edges_table(
                self._metric, effects.components, edges, **self._provenance()
            )
        return ScanOutput(made, taken)

    @cached_property
    def _direct(self) -> DirectAttribution:
        return direct_attribution(self._model, self._clean, self._metric)

    def _replaced_by(self, reference: ReferenceMeans | None, start: int) -> Replacements | None:
        shape = self._model.architecture
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

    def estimate(self, listener: Listener) -> None:
        """Take first-order estimates, and tell them; the method may take none."""
        if self._path is None or self._replacements is None:
            return
        components = self._components
        estimated = range(len(components) - 1)
        first_order = estimates(components[:-1], self._clean, self._replacements, self._path)
        values = in_metric(self._metric, self._clean.logits[0].cpu(), first_order)
        self._tell(listener, estimated, values, exact=False)
        self._estimate = _filled(len(components), estimated, values)

    def _effects(self, listener: Listener) -> tables.Effects:
        """Everything the method says of every component."""
        components = self._components
        measured = self._measured_effects(listener)
        exact = ~measured.isnan()
        return tables.Effects(
            components=components,
            effect=torch.where(exact, measured, self._estimate),
            exact=exact,
            estimate=self._estimate,
            direct=_filled(
                len(components), range(len(components) - 1), self._direct_terms(components)
            ),
        )

    def _direct_terms(self, components: Sequence[Component]) -> Float[Tensor, " component"]:
        return self._direct.of(components[:-1]).cpu()

    def _measured_effects(self, listener: Listener) -> Float[Tensor, " component"]:
        """Exact effects of what the method measures, told when they are known; NaN for the others."""
        components = self._components
        chosen = self._chosen(components, self._estimate)
        if self._replacements is None or not chosen:
            return _filled(len(components), (), torch.empty(0))
        swept = sweep(
            self._model,
            self._clean,
            [components[index] for index in chosen],
            self._replacements,
            self._metric,
            listener,
        )
        self._swept_by = swept.method
        self._tell(listener, chosen, swept.effects, exact=True)
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
        listener: Listener,
        indices: Sequence[int],
        values: Float[Tensor, " component"],
        *,
        exact: bool,
    ) -> None:
        strongest = values.abs().topk(min(MOST_TOLD, len(values))).indices.sort().values.tolist()
        listener.effects(
            EffectsFrame(
                exact=exact,
                components=tuple(str(self._components[indices[place]]) for place in strongest),
                effects=tuple(values[strongest].tolist()),
                unit=self._metric.unit,
            )
        )

    def _edges(self, listener: Listener) -> Edges | None:
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
            listener,
        )

    def _measured(self) -> tables.Measured:
        """What the two runs answer."""

        def answers(run: Run | None) -> tuple[float, float]:
            if run is None:
                return float("nan"), float("nan")
            logits = run.logits[0]
            probability = log_probability(logits, self._metric.answer_id).exp()
            return self._metric(logits).item(), probability.item()

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

    def _provenance(self) -> dict[str, Any]:
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
