"""The runs that a circuit is read off, and the metric that they are asked about.

A gradient costs a forward and a backward pass, and of a short prompt both mostly read weights: what several
scans take gradients of are rows of one batch. Rows know nothing of each other, so the gradient of the sum of
their metrics has in each row that row's own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.circuits import CircuitMethod, CircuitScan
from neural_mri.contract.problems import Problem
from worker.scanner.attribution import Differentiated, StraightPath, differentiate, slope
from worker.scanner.circuit_questions import Prompts, Question
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.runs import Run, record

__all__ = ("CircuitRuns", "run_alone", "run_together")


class CircuitRuns(NamedTuple):
    """Clean and corrupt run of one scan, and where the metric's gradients are taken."""

    clean: Run
    corrupt: Run | None
    metric: Metric
    path: Sequence[Differentiated] | StraightPath | None
    """None where the method takes no gradients."""


def run_alone(
    model: LoadedModel,
    request: CircuitScan,
    prompts: Prompts,
    question: Question,
    listener: Listener,
) -> CircuitRuns:
    """A scan's runs by whatever method.

    Raises `Unprocessable` where there is nothing to ask, `Cancelled` when the listener stops it.
    """
    method, ids = request.method, prompts.ids
    along_path = method is CircuitMethod.INTEGRATED_GRADIENTS
    exact_only = method is CircuitMethod.ABLATION and not request.edges
    if not (along_path or exact_only or method is CircuitMethod.DIRECT):
        [found] = run_together(model, [(prompts, question)], listener)
        if isinstance(found, Problem):
            raise found
        return found
    on_layer = _telling(model, listener)
    runs = record(model, ids, on_layer=on_layer)
    metric = question.metric(runs.logits[0])
    path = None
    if along_path:
        path = StraightPath(
            model, ids[:1], ids[1:], metric, request.steps, on_layer, listener.checkpoint
        )
    corrupt = runs.row(1) if len(ids) > 1 else None
    return CircuitRuns(runs.row(0), corrupt, metric, path)


def run_together(
    model: LoadedModel, asked: Sequence[tuple[Prompts, Question]], listener: Listener
) -> list[CircuitRuns | Problem]:
    """Runs of scans by one gradient each, of prompts of one length, in one forward and one backward pass.

    Gives in a scan's place why it cannot be asked. Raises `Cancelled` when the listener stops them.
    """
    metrics: list[Metric | Problem] = []

    def scalar(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, ""]:
        # Taken apart at once: taken one by one, each would have a gradient as large as all.
        rows = logits[: len(asked)].unbind()
        metrics.extend(
            _metric(question, row) for (_, question), row in zip(asked, rows, strict=True)
        )
        slopes = [
            slope(metric, row)
            for metric, row in zip(metrics, rows, strict=True)
            if isinstance(metric, Metric)
        ]
        if not slopes:
            raise _NothingAsked
        return torch.stack(slopes).sum()

    # Gradients go back along the first rows alone: the clean ones.
    clean, corrupt = ([one.ids[at : at + 1] for one, _ in asked] for at in (0, 1))
    ids = torch.cat([*clean, *corrupt])
    try:
        both = differentiate(
            model,
            ids,
            scalar,
            rows=len(asked),
            on_layer=_telling(model, listener),
            on_layer_back=listener.checkpoint,
        )
    except _NothingAsked:
        return [metric for metric in metrics if isinstance(metric, Problem)]
    found: list[CircuitRuns | Problem] = []
    at = len(asked)
    for row, (metric, of_corrupt) in enumerate(zip(metrics, corrupt, strict=True)):
        if isinstance(metric, Metric):
            own = both.row(row)
            beside = both.run.row(at) if len(of_corrupt) else None
            found.append(CircuitRuns(own.run, beside, metric, [own]))
        else:
            found.append(metric)
        at += len(of_corrupt)
    return found


class _NothingAsked(Exception):
    """None of the scans can be asked: there is nothing to go back from."""


def _telling(model: LoadedModel, listener: Listener) -> Callable[[int], None]:
    def on_layer(layer: int) -> None:
        listener.progress("forward", layer + 1, model.architecture.n_layers)
        listener.checkpoint()

    return on_layer


def _metric(question: Question, logits: Float[Tensor, " d_vocab"]) -> Metric | Problem:
    try:
        return question.metric(logits.detach())
    except Problem as problem:
        return problem
