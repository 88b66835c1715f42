"""Requests for a T2 scan: what the published weights are like, with no model loaded."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.models import Architecture, ModelName
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scan_base import Address, ScanBase

__all__ = ("WeightScan", "weight_order")


class WeightScan(ScanBase, frozen=True, kw_only=True, tag="T2", tag_field="scan_mode"):
    """T2: statistics of every weight, as published: no norm is folded in, nothing is centred.

    Read from the weight files tensor by tensor. One scan of a revision serves everybody.
    """

    needs_loaded_model: ClassVar[bool] = False

    layers: Literal["all"] | Annotated[tuple[Address, ...], Meta(min_length=1, max_length=4096)] = (
        "all"
    )
    """Addresses to report. `blocks.L.attn` brings its heads; `all` is every component."""
    baseline: ModelName | None = None
    """A registered model of the same shape, such as the one this was fine-tuned from: what changed
    is reported as well, component by component."""
    histogram_bins: Annotated[int, Meta(ge=2, le=1024)] = 64
    """Bins of each tensor's histogram, of equal width from its smallest to its largest value."""
    outlier_sigma: Annotated[float, Meta(ge=1, le=1000)] = 6.0
    """A weight is an outlier when it lies more standard deviations than this from its tensor's mean.

    Of a Gaussian's values, 3 would mark one in 370, and 6 one in 500 million.
    """

    def check(self, architecture: Architecture) -> None:
        """Raises what `selected` does."""
        super().check(architecture)
        self.selected(architecture)

    def selected(self, architecture: Architecture) -> tuple[Component, ...]:
        """The components to report, in the order of `weight_order`, each once.

        Raises `InvalidAddress` or `UnknownComponent` naming the first bad one, and `Unprocessable` for
        a place that has no weights of its own.
        """
        order = tuple(weight_order(architecture))
        if self.layers == "all":
            return order
        wanted = {architecture.check(Component.parse(address)) for address in self.layers}
        for component in sorted(wanted, key=str):
            if component.kind is Kind.NEURON:
                raise Unprocessable(
                    f"{component} cannot be selected one by one: ask for its MLP and read the "
                    "strongest neurons",
                    component=str(component),
                )
            if component.kind.is_residual:
                raise Unprocessable(
                    f"{component} has no weights: expected embed, blocks.L.attn, "
                    "blocks.L.attn.head_H, blocks.L.mlp or unembed",
                    component=str(component),
                )
        return tuple(
            component
            for component in order
            if component in wanted
            or (component.kind is Kind.HEAD and Component(Kind.ATTN, component.layer) in wanted)
        )


def weight_order(architecture: Architecture) -> Iterator[Component]:
    """Every component that has weights, in reading order, each attention layer before its heads."""
    yield EMBED
    for layer in range(architecture.n_layers):
        yield Component(Kind.ATTN, layer)
        for head in range(architecture.n_heads):
            yield Component.head(layer, head)
        yield Component(Kind.MLP, layer)
    yield UNEMBED
