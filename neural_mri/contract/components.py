"""Addresses of the places inside a model.

One canonical spelling a place, in the words of the field (Elhage et al. 2021; TransformerLens):

    embed                        the token (and learned position) embedding
    blocks.3.resid_pre           the residual stream entering block 3
    blocks.3.attn                what block 3's attention layer writes to the residual stream
    blocks.3.attn.head_7         what one head of it writes
    blocks.3.resid_mid           the residual stream between attention and MLP
    blocks.3.mlp                 what block 3's MLP writes
    blocks.3.mlp.neuron_1247     one coordinate of the MLP's hidden activation
    blocks.3.resid_post          the residual stream leaving block 3
    unembed                      the final norm and the unembedding

`blocks.3.attn.h7` and `blocks.3.mlp.n1247` are read as well, and printed back in the canonical form.
"""

import re
from enum import StrEnum
from typing import Self

import msgspec

from neural_mri.contract.problems import InvalidAddress

__all__ = ("EMBED", "UNEMBED", "Component", "Kind")


class Kind(StrEnum):
    """What sort of place an address names."""

    EMBED = "embed"
    RESID_PRE = "resid_pre"
    ATTN = "attn"
    HEAD = "head"
    RESID_MID = "resid_mid"
    MLP = "mlp"
    NEURON = "neuron"
    RESID_POST = "resid_post"
    UNEMBED = "unembed"

    @property
    def is_residual(self) -> bool:
        """Whether this is the residual stream itself, rather than something that writes to it."""
        return self in (Kind.RESID_PRE, Kind.RESID_MID, Kind.RESID_POST)


_ADDRESS = re.compile(
    r"""blocks\.(?P<layer>0|[1-9]\d{0,5})\.(?:
        (?P<plain>attn|mlp|resid_pre|resid_mid|resid_post)
      | attn\.(?:head_|h)(?P<head>0|[1-9]\d{0,6})
      | mlp\.(?:neuron_|n)(?P<neuron>0|[1-9]\d{0,8})
    )""",
    re.VERBOSE,
)

_EXPECTED = (
    "expected one of embed, unembed, blocks.L.attn, blocks.L.attn.head_H, blocks.L.mlp, "
    "blocks.L.mlp.neuron_N, blocks.L.resid_pre, blocks.L.resid_mid, blocks.L.resid_post"
)


class Component(msgspec.Struct, frozen=True, order=True):
    """One place inside a model. `str()` gives its address, `label` what a person calls it."""

    kind: Kind
    layer: int | None = None
    index: int | None = None
    """The head's or neuron's number, counted from 0; None for every other kind."""

    @classmethod
    def parse(cls, address: str) -> Self:
        """Read an address. Raises `InvalidAddress`, naming it, when it is none."""
        if address in (Kind.EMBED, Kind.UNEMBED):
            return cls(Kind(address))
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise InvalidAddress(f"{address!r} is not an address: {_EXPECTED}", component=address)
        layer = int(match["layer"])
        if match["head"] is not None:
            return cls(Kind.HEAD, layer, int(match["head"]))
        if match["neuron"] is not None:
            return cls(Kind.NEURON, layer, int(match["neuron"]))
        return cls(Kind(match["plain"]), layer)

    @classmethod
    def head(cls, layer: int, head: int) -> Self:
        """Head number `head` of block `layer`."""
        return cls(Kind.HEAD, layer, head)

    @classmethod
    def neuron(cls, layer: int, neuron: int) -> Self:
        """Coordinate `neuron` of the hidden activation of block `layer`'s MLP."""
        return cls(Kind.NEURON, layer, neuron)

    def __str__(self) -> str:
        match self.kind:
            case Kind.EMBED | Kind.UNEMBED:
                return self.kind.value
            case Kind.HEAD:
                return f"blocks.{self.layer}.attn.head_{self.index}"
            case Kind.NEURON:
                return f"blocks.{self.layer}.mlp.neuron_{self.index}"
            case _:
                return f"blocks.{self.layer}.{self.kind.value}"

    @property
    def label(self) -> str:
        """Short name for a picture: `L3H7`, `L3 MLP`, `L3N1247`, `Embed`."""
        match self.kind:
            case Kind.EMBED:
                return "Embed"
            case Kind.UNEMBED:
                return "Unembed"
            case Kind.HEAD:
                return f"L{self.layer}H{self.index}"
            case Kind.NEURON:
                return f"L{self.layer}N{self.index}"
            case Kind.ATTN:
                return f"L{self.layer} Attn"
            case Kind.MLP:
                return f"L{self.layer} MLP"
            case _:
                return f"L{self.layer} {self.kind.value}"


EMBED = Component(Kind.EMBED)
UNEMBED = Component(Kind.UNEMBED)
