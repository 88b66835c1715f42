"""Token frames: a scan's values, told one token at a time."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.events import ActivationFrame, FrameLayer
from neural_mri.contract.tokens import Tokens
from worker.scanner.listening import Listener

__all__ = ("MOST_FRAMES", "send_frames")

MOST_FRAMES = 512
"""Positions told as frames. The tables have all of them; a stream of more is no picture."""

_TYPES = {Kind.EMBED: "embedding", Kind.HEAD: "attention", Kind.MLP: "mlp"}


class _Part(NamedTuple):
    """One sublayer's rows of the activations table."""

    layer_id: str
    type: str
    rows: slice


def send_frames(
    listener: Listener,
    components: Sequence[Component],
    values: Float[Tensor, "component pos"],
    *,
    positions: tuple[int, ...],
    tokens: Tokens,
    unit: str,
) -> None:
    """Send a frame for each reported position, in order: exactly the stored floats."""

    def made() -> list[ActivationFrame]:
        parts = _parts(tuple(components))
        return [
            ActivationFrame(
                token_idx=position,
                token=tokens.texts[position],
                layers=tuple(
                    [
                        FrameLayer(layer_id=layer_id, type=kind, activations=tuple(column[rows]))
                        for layer_id, kind, rows in parts
                    ]
                ),
                unit=unit,
            )
            for position, column in zip(positions, values[:, :MOST_FRAMES].T.tolist(), strict=False)
        ]

    listener.frames(made)


@lru_cache(maxsize=8)
def _parts(components: tuple[Component, ...]) -> list[_Part]:
    """The embedding, each layer's heads together, each MLP."""
    parts = []
    shown = [(row, c) for row, c in enumerate(components) if c.kind in _TYPES]
    for (kind, layer), group in groupby(shown, key=lambda item: (item[1].kind, item[1].layer)):
        rows = [row for row, _ in group]
        named = Component(Kind.ATTN if kind is Kind.HEAD else kind, layer)
        parts.append(_Part(str(named), _TYPES[kind], slice(rows[0], rows[-1] + 1)))
    return parts
