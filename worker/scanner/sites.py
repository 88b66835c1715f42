"""Where each component lives: TransformerLens's hook points, and the plain model's own modules.

The one module that knows either. Which module plays which part is TransformerLens's knowledge, taken
from its description of the family (`bridging.adapter`); that the parts mean what we say is checked on
every model as it is loaded (`verification`).
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.problems import UnsupportedModel

__all__ = (
    "BlockModules",
    "BlockPaths",
    "ModulePaths",
    "Owner",
    "PlainModules",
    "Site",
    "attention_pattern",
    "modules",
    "owner",
    "owners",
    "paths",
    "site",
)


class Site(NamedTuple):
    """Where TransformerLens exposes a component, for reading and for intervening alike."""

    hook: str
    where: tuple[slice | int, ...]
    """What of the hook's `[batch, pos, ...]` value is the component's own."""


_WHOLE = (slice(None), slice(None))


def site(component: Component) -> Site:
    """The hook point of a component, and its slice there.

    A head is found before W_O (`hook_z`, `[batch pos head d_head]`), where heads are still apart: what is
    done to it there, W_O carries into the residual stream. The embedding is the residual entering block
    0, so that learned positions belong to it.
    """
    layer, index = component.layer, component.index
    match component.kind:
        case Kind.EMBED:
            return Site("blocks.0.hook_resid_pre", _WHOLE)
        case Kind.RESID_PRE | Kind.RESID_MID | Kind.RESID_POST:
            return Site(f"blocks.{layer}.hook_{component.kind}", _WHOLE)
        case Kind.ATTN:
            return Site(f"blocks.{layer}.hook_attn_out", _WHOLE)
        case Kind.HEAD:
            return Site(f"blocks.{layer}.attn.hook_z", (*_WHOLE, index or 0))
        case Kind.MLP:
            return Site(f"blocks.{layer}.hook_mlp_out", _WHOLE)
        case Kind.NEURON:
            return Site(f"blocks.{layer}.mlp.out.hook_in", (*_WHOLE, index or 0))
        case Kind.UNEMBED:
            return Site("ln_final.hook_out", _WHOLE)


def attention_pattern(layer: int) -> str:
    """The hook point of a layer's attention pattern, `[batch head query_pos key_pos]`."""
    return f"blocks.{layer}.attn.hook_pattern"


class BlockPaths(NamedTuple):
    """Dotted names of one block's modules in the plain model; None for a part the family lacks."""

    block: str
    attn_norm: str | None
    """The norm that feeds attention (OLMo-2 has none)."""
    attn: str
    w_o: str
    attn_post_norm: str | None
    """The norm between attention and the residual stream (Gemma-2/3, OLMo-2)."""
    mlp_norm: str | None
    mlp: str
    w_out: str
    mlp_post_norm: str | None


class ModulePaths(NamedTuple):
    """Dotted names of the plain model's modules."""

    embed: str
    pos_embed: str | None
    blocks: tuple[BlockPaths, ...]
    final_norm: str
    unembed: str


def paths(adapter: Any, n_layers: int) -> ModulePaths:
    """The names that TransformerLens's description of a family gives to the plain model's modules.

    Raises `UnsupportedModel` for a family whose blocks are not one attention and one dense MLP.
    """
    parts = adapter.component_mapping
    family = adapter.cfg.architecture

    def required(mapping: Any, name: str) -> Any:
        part = (mapping or {}).get(name)
        if part is None or part.name is None:
            raise UnsupportedModel(
                f"{family} has no {name!r} where decoder-only transformers have one: blocks of one "
                "attention and one dense MLP are expected"
            )
        return part

    blocks = required(parts, "blocks")
    attn = required(blocks.submodules, "attn")
    mlp = required(blocks.submodules, "mlp")
    w_o, w_out = required(attn.submodules, "o"), required(mlp.submodules, "out")

    def block(layer: int) -> BlockPaths:
        prefix = f"{blocks.name}.{layer}"

        def norm(name: str) -> str | None:
            part = blocks.submodules.get(name)
            return None if part is None else f"{prefix}.{part.name}"

        return BlockPaths(
            block=prefix,
            attn_norm=norm("ln1"),
            attn=f"{prefix}.{attn.name}",
            w_o=f"{prefix}.{attn.name}.{w_o.name}",
            attn_post_norm=norm("ln1_post"),
            mlp_norm=norm("ln2"),
            mlp=f"{prefix}.{mlp.name}",
            w_out=f"{prefix}.{mlp.name}.{w_out.name}",
            mlp_post_norm=norm("ln2_post"),
        )

    position = parts.get("pos_embed")
    return ModulePaths(
        embed=required(parts, "embed").name,
        pos_embed=None if position is None else position.name,
        blocks=tuple(block(layer) for layer in range(n_layers)),
        final_norm=required(parts, "ln_final").name,
        unembed=required(parts, "unembed").name,
    )


class Owner(NamedTuple):
    """Whose a parameter is, and what part it plays there."""

    component: Component
    role: str
    """`W_Q`, `W_O.bias`, `norm`, ...; the module's own name where the field has no word for it."""


_ATTENTION_ROLES = {"q": "W_Q", "k": "W_K", "v": "W_V", "o": "W_O", "qkv": "W_QKV"}
_MLP_ROLES = {"gate": "W_gate", "in": "W_in", "out": "W_out"}


def owners(adapter: Any, names: ModulePaths) -> dict[str, Owner]:
    """The owner of each module of the plain model; a module not named here is its parent's.

    A norm belongs to the sublayer that it feeds or follows, the final norm to the unembedding.
    """
    parts = adapter.component_mapping["blocks"].submodules
    owned = {
        names.embed: Owner(EMBED, "W_E"),
        names.final_norm: Owner(UNEMBED, "norm"),
        names.unembed: Owner(UNEMBED, "W_U"),
    }
    if names.pos_embed is not None:
        owned[names.pos_embed] = Owner(EMBED, "W_pos")
    for layer, block in enumerate(names.blocks):
        attn, mlp = Component(Kind.ATTN, layer), Component(Kind.MLP, layer)
        for component, path, part, roles, norms in (
            (attn, block.attn, "attn", _ATTENTION_ROLES, (block.attn_norm, block.attn_post_norm)),
            (mlp, block.mlp, "mlp", _MLP_ROLES, (block.mlp_norm, block.mlp_post_norm)),
        ):
            owned[path] = Owner(component, "")
            for name, submodule in parts[part].submodules.items():
                owned[f"{path}.{submodule.name}"] = Owner(component, roles.get(name, "norm"))
            owned.update({norm: Owner(component, "norm") for norm in norms if norm is not None})
    return owned


def owner(parameter: str, owned: Mapping[str, Owner]) -> Owner:
    """Whose the parameter of that dotted name is.

    Raises `UnsupportedModel` for one that lies in no component: then the family has a part that no
    picture would show.
    """
    module, _, tensor = parameter.rpartition(".")
    path = module
    while path:
        found = owned.get(path)
        if found is not None:
            role = found.role if path == module else module.rpartition(".")[2]
            return found._replace(role=role if tensor == "weight" else f"{role}.{tensor}")
        path = path.rpartition(".")[0]
    raise UnsupportedModel(f"parameter {parameter} belongs to no component of a transformer")


class BlockModules(NamedTuple):
    """One block's modules in the plain model."""

    block: nn.Module
    """In: `resid_pre`. Out: `resid_post`."""
    w_o: nn.Module
    """In: every head's z side by side, `[batch pos (head d_head)]`."""
    attn_write: nn.Module
    """Out: what attention adds to the residual stream."""
    w_out: nn.Module
    """In: the MLP's hidden activation, `[batch pos d_mlp]`."""
    mlp_write: nn.Module
    """Out: what the MLP adds to the residual stream."""
    attn_norm: nn.Module
    """In: the residual that attention reads. The identity where the family has no such norm."""
    attn: nn.Module
    attn_post_norm: nn.Module
    """Between attention and the residual stream; the identity where nothing is."""
    mlp_norm: nn.Module
    """In: the residual that the MLP reads. The identity where the family has no such norm, and `attn_norm`
    itself where both sublayers of a parallel block read what one norm gave (Phi-2, GPT-J)."""
    mlp: nn.Module
    mlp_post_norm: nn.Module
    """Between the MLP and the residual stream; the identity where nothing is."""
    mlp_adds_residual: bool
    """Whether the MLP is given the residual as well, and gives it back with its write added (MPT)."""


class PlainModules(NamedTuple):
    """The plain model's modules that a scan reads."""

    blocks: tuple[BlockModules, ...]
    final_norm: nn.Module
    """Out: the normed residual that the unembedding reads."""
    embed: nn.Module
    """Out: the token embedding, learned positions not included."""
    unembed: nn.Module
    """Out: logits, before they are scaled and soft-capped."""


def modules(model: PreTrainedModel, names: ModulePaths, *, parallel_blocks: bool) -> PlainModules:
    """The modules themselves."""

    def norm(path: str | None) -> nn.Module:
        return nn.Identity() if path is None else model.get_submodule(path)

    def block(name: BlockPaths) -> BlockModules:
        shared = parallel_blocks and name.mlp_norm is None
        mlp = model.get_submodule(name.mlp)
        return BlockModules(
            block=model.get_submodule(name.block),
            w_o=model.get_submodule(name.w_o),
            attn_write=model.get_submodule(name.attn_post_norm or name.w_o),
            w_out=model.get_submodule(name.w_out),
            mlp_write=model.get_submodule(name.mlp_post_norm or name.w_out),
            attn_norm=norm(name.attn_norm),
            attn=model.get_submodule(name.attn),
            attn_post_norm=norm(name.attn_post_norm),
            mlp_norm=norm(name.attn_norm if shared else name.mlp_norm),
            mlp=mlp,
            mlp_post_norm=norm(name.mlp_post_norm),
            mlp_adds_residual="residual" in inspect.signature(type(mlp).forward).parameters,
        )

    return PlainModules(
        blocks=tuple(block(name) for name in names.blocks),
        final_norm=model.get_submodule(names.final_norm),
        embed=model.get_submodule(names.embed),
        unembed=model.get_submodule(names.unembed),
    )
