"""T1: what a model is made of, exactly, from its configuration alone.

The modules are built on the meta device, so shapes and names are the model's own and nothing is loaded.
Each storage is counted once: a tied unembedding is the embedding, read again.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from transformers import PretrainedConfig, PreTrainedModel

from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.models import Architecture, NormPlacement
from neural_mri.contract.problems import UnsupportedModel
from neural_mri.contract.results import SCHEMAS, Provenance, build, component_columns, stamp
from worker.scanner import bridging, sites

__all__ = ("Anatomy", "architecture", "examine", "scan_topology")


class Anatomy(NamedTuple):
    """A model's shape, and which of its modules is what."""

    architecture: Architecture
    paths: sites.ModulePaths
    owners: dict[str, sites.Owner]


def examine(model: PreTrainedModel) -> Anatomy:
    """Read the shape of a model, loaded or on the meta device, off its modules and configuration.

    Raises `UnsupportedModel`, saying what is missing.
    """
    adapter = bridging.adapter(model)
    facts: Any = adapter.cfg
    paths = sites.paths(adapter, facts.n_layers)
    block = paths.blocks[0]
    embedding, unembedding, w_out = (
        model.get_parameter(f"{path}.weight") for path in (paths.embed, paths.unembed, block.w_out)
    )
    d_model = int(facts.d_model)
    # W_out is [d_model, d_mlp] as a Linear and [d_mlp, d_model] as GPT-2 keeps it.
    d_mlp = w_out.numel() // d_model
    mlp_weights = sum(
        p.numel() for p in model.get_submodule(block.mlp).parameters() if p.dim() == 2
    )
    if block.attn_norm is None:
        placement = NormPlacement.POST
    elif block.attn_post_norm is None:
        placement = NormPlacement.PRE
    else:
        placement = NormPlacement.PRE_AND_POST
    shape = Architecture(
        family=model.config.model_type,
        n_layers=facts.n_layers,
        n_heads=facts.n_heads,
        n_kv_heads=facts.n_key_value_heads or facts.n_heads,
        d_model=d_model,
        d_head=facts.d_head,
        d_mlp=d_mlp,
        d_vocab=embedding.shape[0],
        n_ctx=facts.n_ctx,
        activation=facts.act_fn,
        gated_mlp=mlp_weights == 3 * d_mlp * d_model,
        norm="rms" if facts.uses_rms_norm else "layer",
        norm_placement=placement,
        parallel_blocks=bool(facts.parallel_attn_mlp),
        tied_embeddings=unembedding is embedding,
        positions="learned" if paths.pos_embed else facts.positional_embedding_type,
        sliding_windows=_sliding_windows(model.config, facts.n_layers),
        attention_softcap=_cap(facts.attn_scores_soft_cap),
        final_softcap=_cap(facts.output_logits_soft_cap),
    )
    return Anatomy(shape, paths, sites.owners(adapter, paths))


def architecture(configuration: PretrainedConfig) -> Architecture:
    """The shape of the model that a configuration describes."""
    return examine(bridging.skeleton(configuration)).architecture


def _cap(value: float) -> float | None:
    """TransformerLens writes -1 where there is no soft-cap."""
    return value if value > 0 else None


def _sliding_windows(
    configuration: PretrainedConfig, n_layers: int
) -> tuple[int | None, ...] | None:
    # GPT-Neo has the same in words of its own.
    kinds = getattr(configuration, "attention_layers", None)
    window = getattr(configuration, "sliding_window" if kinds is None else "window_size", None)
    if window is None:
        return None
    kinds = kinds or getattr(configuration, "layer_types", None) or ["sliding_attention"] * n_layers
    windows = tuple(window if kind in ("sliding_attention", "local") else None for kind in kinds)
    return windows if any(windows) else None


class ParameterRow(NamedTuple):
    """One parameter tensor."""

    name: str
    owner: sites.Owner
    shape: tuple[int, ...]
    size: int
    tied_to: str
    """Name of the tensor that this one is; empty for one that stands for itself."""


def parameter_rows(model: PreTrainedModel, anatomy: Anatomy) -> list[ParameterRow]:
    """Every parameter tensor under every name it has, in the model's order.

    Raises `UnsupportedModel` where one belongs to no component.
    """
    first_name: dict[int, str] = {}
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first_name.setdefault(id(parameter), name)
        rows.append(
            ParameterRow(
                name,
                sites.owner(name, anatomy.owners),
                tuple(parameter.shape),
                parameter.numel(),
                "" if original == name else original,
            )
        )
    return rows


def scan_topology(source: Path | PretrainedConfig) -> dict[str, pa.Table]:
    """The tables `topology` and `parameters` of a model folder, or of a configuration.

    No weight file is opened. Raises `UnsupportedModel` for a family that cannot be shown.
    """
    configuration = bridging.read_configuration(source) if isinstance(source, Path) else source
    model = bridging.skeleton(configuration)
    anatomy = examine(model)
    rows = parameter_rows(model, anatomy)
    total = sum(row.size for row in rows if not row.tied_to)
    tables = {
        "topology": _topology_table(anatomy.architecture, rows),
        "parameters": _parameter_table(rows),
    }
    return {
        name: stamp(
            table,
            Provenance(
                table=name,
                version=str(SCHEMAS[name].version),
                unit="parameters",
                method="modules built from the configuration on the meta device; "
                "each storage counted once",
                parameters={"architecture": anatomy.architecture, "n_parameters": total},
            ),
        )
        for name, table in tables.items()
    }


def _parameter_table(rows: list[ParameterRow]) -> pa.Table:
    return build(
        "parameters",
        {
            "name": pa.array([row.name for row in rows], pa.string()),
            "component": pa.array([str(row.owner.component) for row in rows], pa.string()),
            "role": pa.array([row.owner.role for row in rows], pa.string()),
            "shape": pa.array(
                [row.shape for row in rows],
                pa.list_(pa.field("item", pa.int32(), nullable=False)),
            ),
            "parameters": pa.array([0 if row.tied_to else row.size for row in rows], pa.uint32()),
            "tied_to": pa.array([row.tied_to for row in rows], pa.string()),
        },
    )


class _HeadShare(NamedTuple):
    """How many elements of one attention tensor are one head's."""

    own: int
    shared: int


def _head_share(role: str, size: int, shape: Architecture) -> _HeadShare:
    """A head owns its rows of W_Q and columns of W_O, and its key-value head unless others read it.

    What attention adds as a whole (the bias of W_O, norms) is no head's.
    """
    queries, keys_values = shape.n_heads, 2 * shape.n_kv_heads
    match role.removesuffix(".bias"):
        case "W_Q":
            return _HeadShare(size // shape.n_heads, 0)
        case "W_O" if role == "W_O":
            return _HeadShare(size // shape.n_heads, 0)
        case "W_K" | "W_V":
            query, key_value = 0, size // shape.n_kv_heads
        case "W_QKV":
            query = size // (queries + keys_values)
            key_value = 2 * query
        case _:
            return _HeadShare(0, 0)
    if shape.n_kv_heads == shape.n_heads:
        return _HeadShare(query + key_value, 0)
    return _HeadShare(query, key_value)


def _topology_table(shape: Architecture, rows: list[ParameterRow]) -> pa.Table:
    """A row a component: embed, each layer's attention, heads and MLP, unembed."""
    own: dict[Component, int] = {}
    shared: dict[Component, int] = {}
    head_own = [0] * shape.n_layers
    head_shared = [0] * shape.n_layers
    for row in rows:
        component = row.owner.component
        if row.tied_to:
            shared[component] = shared.get(component, 0) + row.size
            continue
        share = _HeadShare(0, 0)
        if component.kind is Kind.ATTN and component.layer is not None:
            share = _head_share(row.owner.role, row.size, shape)
            head_own[component.layer] += share.own
            head_shared[component.layer] += share.shared
        own[component] = own.get(component, 0) + row.size - share.own * shape.n_heads
    components = [EMBED]
    for layer in range(shape.n_layers):
        components.append(Component(Kind.ATTN, layer))
        for head in range(shape.n_heads):
            component = Component.head(layer, head)
            components.append(component)
            own[component] = head_own[layer]
            shared[component] = head_shared[layer]
        components.append(Component(Kind.MLP, layer))
    components.append(UNEMBED)
    unshown = own.keys() - set(components)
    if unshown:
        raise UnsupportedModel(f"parameters of {min(map(str, unshown))} have no row to stand in")
    return build(
        "topology",
        {
            **component_columns(components),
            "kv_head": pa.array(
                [
                    shape.kv_head(component.index)
                    if component.kind is Kind.HEAD and component.index is not None
                    else -1
                    for component in components
                ],
                pa.int16(),
            ),
            "parameters": pa.array([own.get(c, 0) for c in components], pa.uint32()),
            "shared_parameters": pa.array([shared.get(c, 0) for c in components], pa.uint32()),
        },
    )
