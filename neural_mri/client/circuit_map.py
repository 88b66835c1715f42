"""A DTI scan's tables as values: effects of components on an answer, and the paths between components."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from neural_mri.client.activation_map import Grid, by_layer
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.results import has_foil, provenance_of

__all__ = ("CircuitMap", "Edge", "Effect", "Question")

_SUBLAYERS = (Kind.HEAD, Kind.ATTN, Kind.MLP)


class Effect(NamedTuple):
    """What replacing one component does to the metric. NaN: not known."""

    component: Component
    value: float
    exact: bool
    """Measured; else a first-order estimate."""
    estimate: float
    direct: float
    """The component's own term of the logits."""


class Edge(NamedTuple):
    """A path from what one component writes straight to what another reads."""

    source: Component
    target: Component
    strength: float


class Question(NamedTuple):
    """The next token asked about, and what the runs answer. NaN where there is no corrupted run."""

    position: int
    answer: str
    foil: str | None
    clean: float
    corrupted: float
    probability_clean: float
    probability_corrupted: float

    @property
    def metric(self) -> str:
        """The metric in words."""
        return "log p(answer)" if self.foil is None else "logit(answer) - logit(foil)"


class CircuitMap(NamedTuple):
    """Effects in the order of the table; edges strongest first."""

    effects: tuple[Effect, ...]
    question: Question
    edges: tuple[Edge, ...]
    unit: str
    """Of effects. Direct terms and edges are in logits."""
    method: str
    ablation: str | None
    """What components were replaced by; None where nothing was."""

    @classmethod
    def of(cls, effects: pa.Table, metric: pa.Table, edges: pa.Table | None) -> "CircuitMap":
        """From a DTI result's tables."""
        provenance = provenance_of(effects)
        asked: dict[str, Any] = metric.to_pylist()[0]
        return cls(
            effects=tuple(
                Effect(
                    Component.parse(row["component"]),
                    row["effect"],
                    row["exact"],
                    row["estimate"],
                    row["direct"],
                )
                for row in effects.to_pylist()
            ),
            question=Question(
                position=asked["position"],
                answer=asked["answer"],
                foil=asked["foil"] if has_foil(metric) else None,
                clean=asked["clean"],
                corrupted=asked["corrupted"],
                probability_clean=asked["probability_clean"],
                probability_corrupted=asked["probability_corrupted"],
            ),
            edges=tuple(
                Edge(
                    Component.parse(row["source"]), Component.parse(row["target"]), row["strength"]
                )
                for row in ([] if edges is None else edges.to_pylist())
            ),
            unit=provenance.unit,
            method=provenance.method.rpartition("; ")[2],
            ablation=provenance.parameters.get("ablation"),
        )

    @property
    def is_direct(self) -> bool:
        """Whether nothing was replaced: there are direct terms alone, above 0 where they help."""
        return self.ablation is None

    def value(self, effect: Effect) -> float:
        """The effect, or where nothing was replaced the direct term."""
        return effect.direct if self.is_direct else effect.value

    def strongest(self, count: int) -> tuple[Effect, ...]:
        """The heads, attention layers and MLPs with the largest effects either way, largest first.

        The embedding is passed over: everything hangs on it.
        """
        known = [
            effect
            for effect in self.effects
            if effect.component.kind in _SUBLAYERS and np.isfinite(self.value(effect))
        ]
        known.sort(key=lambda effect: -abs(self.value(effect)))
        return tuple(known[:count])

    def grid(self) -> Grid:
        """Effects by layer: a row a head, and last the MLPs."""
        return self._laid_out([self.value(effect) for effect in self.effects])

    def exact_grid(self) -> Grid:
        """1 where the effect was measured, 0 where it is an estimate."""
        return self._laid_out([float(effect.exact) for effect in self.effects])

    def _laid_out(self, values: list[float]) -> Grid:
        components = tuple(effect.component for effect in self.effects)
        return by_layer(components, np.array(values, dtype=np.float32), _SUBLAYERS)
