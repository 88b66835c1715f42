"""What takes a component's place when it is ablated, and from which position on."""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from worker.scanner.references import ReferenceMeans
from worker.scanner.runs import Run

__all__ = ("Replacements",)


class Replacements(NamedTuple):
    """Values for every component, at positions `start` and later. Tuples have an entry a layer."""

    z: tuple[Float[Tensor, "pos heads_by_d_head"], ...]
    attn: tuple[Float[Tensor, "pos d_model"], ...]
    mlp: tuple[Float[Tensor, "pos d_model"], ...]
    embed: Float[Tensor, "pos d_model"]
    """Of the residual that enters block 0."""
    start: int
    """Before it, a run with a component replaced is the clean run."""
    d_head: int

    def of(self, component: Component) -> Float[Tensor, "pos width"]:
        """A component's values, where it is edited: before W_O for a head."""
        layer, index = component.layer or 0, component.index or 0
        match component.kind:
            case Kind.EMBED:
                return self.embed
            case Kind.HEAD:
                return self.z[layer][:, index * self.d_head : (index + 1) * self.d_head]
            case Kind.ATTN:
                return self.attn[layer]
            case Kind.MLP:
                return self.mlp[layer]
            case _:
                raise ValueError(f"{component} is no component that a circuit is made of")

    @classmethod
    def zero(cls, clean: Run, shape: Architecture, *, start: int) -> Self:
        """Nothing in the component's place."""
        nothing = clean.final.new_zeros(())
        z = nothing.expand(clean.n_positions - start, shape.n_heads * shape.d_head)
        written = nothing.expand(clean.n_positions - start, shape.d_model)
        layers = range(shape.n_layers)
        return cls(
            z=tuple(z for _ in layers),
            attn=tuple(written for _ in layers),
            mlp=tuple(written for _ in layers),
            embed=written,
            start=start,
            d_head=shape.d_head,
        )

    @classmethod
    def mean(cls, means: ReferenceMeans, clean: Run, shape: Architecture, *, start: int) -> Self:
        """The component's mean over reference text."""

        def everywhere(value: Float[Tensor, " width"]) -> Float[Tensor, "pos width"]:
            return value.to(clean.final).expand(clean.n_positions - start, -1)

        return cls(
            z=tuple(everywhere(layer.flatten()) for layer in means.z),
            attn=tuple(everywhere(layer) for layer in means.attn),
            mlp=tuple(everywhere(layer) for layer in means.mlp),
            embed=everywhere(means.resid_pre[0]),
            start=start,
            d_head=shape.d_head,
        )

    @classmethod
    def resample(cls, corrupt: Run, clean: Run, shape: Architecture, *, start: int) -> Self:
        """The component's values in the run of another prompt of as many tokens.

        Where the two prompts begin alike, so do their runs: `start` moves to the first token in which
        they differ.
        """
        if corrupt.n_positions != clean.n_positions:
            raise ValueError(
                f"the corrupt run has {corrupt.n_positions} positions and the clean one "
                f"{clean.n_positions}: expected as many"
            )
        differ = torch.nonzero(corrupt.ids[0] != clean.ids[0]).flatten().tolist()
        first = differ[0] if differ else clean.n_positions - 1
        start = max(start, first)
        return cls(
            z=tuple(layer[0, start:] for layer in corrupt.z),
            attn=tuple(layer[0, start:] for layer in corrupt.attn),
            mlp=tuple(layer[0, start:] for layer in corrupt.mlp),
            embed=corrupt.resid_pre[0][0, start:],
            start=start,
            d_head=shape.d_head,
        )
