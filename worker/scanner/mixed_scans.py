"""Scans of different kinds, or that ask otherwise, of prompts of one length: one forward for them all.

Whoever asks the same is read together. A prompt that several ask about is run once, whoever they are: what
fMRI and FLAIR read of it stands in the same forward.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import torch
from jaxtyping import Int
from torch import Tensor

from neural_mri.contract.scans import ActivationScan, AnomalyScan
from neural_mri.contract.tokens import Tokens
from worker.scanner.activations import ActivationRows
from worker.scanner.anomalies import AnomalyRows
from worker.scanner.calibration import Calibration
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.prompts import token_ids
from worker.scanner.shared_forward import (
    AskedOf,
    Company,
    Outcome,
    nobody_waits,
    read_forward,
)

__all__ = ("Asked", "ReadingScan", "scan_together")

ReadingScan = ActivationScan | AnomalyScan
"""Scans that read the plain model and change nothing in it."""


class Asked(NamedTuple):
    """One scan among others."""

    request: ReadingScan
    tokens: Tokens
    listener: Listener
    calibration: Calibration | None = None
    answer_id: int | None = None
    foil_id: int | None = None


@torch.inference_mode()
def scan_together(
    model: LoadedModel,
    asked: Sequence[Asked],
    ready: Callable[[Mapping[int, Outcome]], None] = nobody_waits,
) -> list[Outcome]:
    """What became of each scan: what it would give alone, to the last digits but one.

    `ready` is given outcomes, by index, that stand while others have still to be measured: fMRI needs not
    much more than the forward, and does not wait for a lens. The forward goes on while anybody waits for it.
    Raises what concerns them all: a prompt or request that the model cannot do, and `Cancelled` when nobody
    waits any more.
    """
    groups = sorted(_alike(asked), key=lambda group: _is_long(asked[group[0]]))
    batch = _Batch.of(model, asked, groups)
    # In the order of their rows: what lies side by side is read without being copied.
    groups = [sorted(group, key=lambda index: batch.row_of(asked[index])) for group in groups]
    parts = [_rows(model, [asked[index] for index in group], batch) for group in groups]
    read = read_forward(model, batch.ids, parts, Company([one.listener for one in asked]))
    outcomes: dict[int, Outcome] = {}
    for group, part, logits in zip(groups, parts, read.logits, strict=True):
        found: Sequence[Outcome] = part.outcomes(logits, read.seconds / len(asked))
        of_group = dict(zip(group, found, strict=True))
        if len(outcomes) + len(of_group) < len(asked):
            ready(of_group)
        outcomes |= of_group
    return [outcomes[index] for index in range(len(asked))]


def _is_long(one: Asked) -> bool:
    """Whether most of a scan comes after its forward."""
    return isinstance(one.request, AnomalyScan)


def _alike(asked: Sequence[Asked]) -> list[list[int]]:
    """Which of them ask the same of their prompts, against the same calibration."""
    groups: defaultdict[tuple[ReadingScan, int], list[int]] = defaultdict(list)
    for index, one in enumerate(asked):
        question = msgspec.structs.replace(one.request, prompt="-", model=None)
        if isinstance(question, AnomalyScan):
            # Their ids are known, each prompt's own.
            question = msgspec.structs.replace(question, answer=None, foil=None)
        groups[question, id(one.calibration)].append(index)
    return list(groups.values())


class _Batch(NamedTuple):
    """Every prompt once."""

    ids: Int[Tensor, "row pos"]
    rows: Mapping[tuple[int, ...], int]

    @classmethod
    def of(
        cls, model: LoadedModel, asked: Sequence[Asked], groups: Sequence[Sequence[int]]
    ) -> "_Batch":
        """Prompts of one group lie side by side, and between two groups those of both."""
        groups_of: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        tokens = {}
        for number, group in enumerate(groups):
            for index in group:
                ids = asked[index].tokens.ids
                groups_of[ids].append(number)
                tokens[ids] = asked[index].tokens
        order = sorted(groups_of, key=lambda ids: (groups_of[ids][0], groups_of[ids][-1]))
        return cls(
            torch.cat([token_ids(model, tokens[ids]) for ids in order]),
            {ids: row for row, ids in enumerate(order)},
        )

    def row_of(self, one: Asked) -> int:
        """Where a scan's prompt is."""
        return self.rows[one.tokens.ids]


def _rows(
    model: LoadedModel, alike: Sequence[Asked], batch: _Batch
) -> ActivationRows | AnomalyRows:
    """The rows of scans that ask the same."""
    request, calibration = alike[0].request, alike[0].calibration
    rows, n_rows = [batch.row_of(one) for one in alike], len(batch.ids)
    match request:
        case ActivationScan():
            prompts, listeners = [one.tokens for one in alike], [one.listener for one in alike]
            return ActivationRows(model, request, prompts, listeners, calibration, rows, n_rows)
        case AnomalyScan():
            asked = [AskedOf(one.tokens, one.listener, one.answer_id, one.foil_id) for one in alike]
            return AnomalyRows(model, request, asked, calibration, rows, n_rows)
