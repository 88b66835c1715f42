"""Activation patching: at which places the difference between two prompts' runs is carried.

Each patched run is one of the two runs with one value of the other's in it: a component's, at one layer and
one position. How much of the difference in the metric that value carries is its recovery.
"""

from collections.abc import Iterator
from typing import Any

import torch

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.perturbations import Direction, PatchingScan, PatchSite
from neural_mri.contract.scans import resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner.circuit_questions import Question, paired_ids
from worker.scanner.listening import Listener, Timed
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import recovery
from worker.scanner.patched_runs import PatchedRun, Runs, changes
from worker.scanner.patching_tables import contrast_table, map_table, read_tokens_table
from worker.scanner.prompts import ScanOutput, read_until
from worker.scanner.runs import record

__all__ = ("scan_patching",)

_CLEAN, _CORRUPT = 0, 1

_ORDER = (PatchSite.RESIDUAL, PatchSite.ATTENTION, PatchSite.HEAD, PatchSite.MLP)
"""A layer's attention before the heads that it is made of, as everywhere."""


@torch.inference_mode()
def scan_patching(
    model: LoadedModel,
    request: PatchingScan,
    tokens: Tokens,
    corrupt: Tokens,
    listener: Listener,
    *,
    answer_id: int | None = None,
    foil_id: int | None = None,
) -> ScanOutput:
    """The tables `recovery`, `patched`, `contrast`, `tokens` and `corrupt_tokens`.

    Prompts are read up to the position whose next token is asked about: what follows is not seen.

    Args:
        model: The model.
        request: What is asked.
        tokens: The prompt.
        corrupt: The corrupt prompt.
        listener: Hears how far the scan is, and may stop it.
        answer_id: The next token asked about; the clean run's likeliest where None.
        foil_id: The token it is compared with.

    Raises:
        Problem: The request asks for what the model or the prompts do not have.
        Cancelled: The listener stopped it. The model is as it was, hooks and all.
    """
    shape = model.architecture
    request.check(shape)
    position = resolve_positions((request.target_token_idx,), len(tokens))[0]
    ids = paired_ids(model, tokens, corrupt)[:, : read_until(model, position, len(tokens))]
    question = Question.of(model, answer_id, foil_id)

    def on_layer(layer: int) -> None:
        listener.progress("forward", layer + 1, shape.n_layers)
        listener.checkpoint()

    timed = Timed(listener)
    recorded = record(model, ids, on_layer=on_layer)
    metric = question.metric(recorded.logits[_CLEAN])
    source, base = _CLEAN, _CORRUPT
    if request.direction is Direction.NOISING:
        source, base = base, source
    components = tuple(_places(request, shape))
    patches = [
        PatchedRun(base, component, at) for component in components for at in range(position + 1)
    ]
    found = changes(model, Runs(recorded, source), patches, metric, timed, stage="patching")
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    forward_seconds = timed.own_seconds

    clean, corrupted = metric(recorded.logits).cpu()
    unpatched = clean if base == _CLEAN else corrupted
    patched = unpatched + found.values.view(len(components), position + 1)
    how: dict[str, Any] = {
        "direction": request.direction,
        "position": position,
        "runs": found.method,
    }
    made = {
        "recovery": map_table(
            "recovery",
            components,
            recovery(clean=clean, corrupted=corrupted, patched=patched),
            unit="share of the gap",
            method=f"(patched - corrupted) / (clean - corrupted) of the {metric.formula}",
            **how,
        ),
        "patched": map_table(
            "patched",
            components,
            patched,
            unit=metric.unit,
            method=f"{metric.formula} of the patched run",
            **how,
        ),
        "contrast": contrast_table(model, metric, recorded.logits, position),
        "tokens": read_tokens_table(tokens, recorded, _CLEAN),
        "corrupt_tokens": read_tokens_table(corrupt, recorded, _CORRUPT),
    }
    return ScanOutput(made, forward_seconds)


def _places(request: PatchingScan, shape: Architecture) -> Iterator[Component]:
    """The components patched, layer by layer."""
    for layer in range(shape.n_layers):
        for site in _ORDER:
            if site not in request.sites:
                continue
            if site is PatchSite.HEAD:
                yield from (Component.head(layer, head) for head in range(shape.n_heads))
            else:
                yield Component(Kind(site.value), layer)
