"""Whether a model's parts mean what we say they mean. Checked on every model as it is loaded.

A family that TransformerLens maps wrongly, or that computes a block in another way than ours, is refused
here by name, instead of giving pictures of something else.
"""

import numbers
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import UnsupportedModel
from worker.scanner import sites
from worker.scanner.hooks import hooked, tensor_in, tensor_out

__all__ = ("verify",)

_TOKENS = 6

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference, as a share of the largest value: attention kernels differ in the last digits."""


@torch.inference_mode()
def verify(
    plain: PreTrainedModel,
    bridge: TransformerBridge,
    modules: sites.PlainModules,
    architecture: Architecture,
) -> float:
    """Run both twins on a few tokens and compare. Raises `UnsupportedModel` with the first that fails.

    Every attention row sums to 1; what attention and MLP write adds up to what the block changed, by
    TransformerLens's hooks and by our own; both twins predict the same; and that is what the unembedding
    reads of the last residual. Returns what the model multiplies that by (Cohere, Granite): 1 mostly.
    """
    try:
        return _compare(plain, bridge, modules, architecture)
    except _NoNumbers as reason:
        raise UnsupportedModel(f"{reason}: {_whence(plain)}") from None


def _compare(
    plain: PreTrainedModel,
    bridge: TransformerBridge,
    modules: sites.PlainModules,
    architecture: Architecture,
) -> float:
    ids = torch.arange(_TOKENS, device=plain.device) * (architecture.d_vocab // _TOKENS)
    ids = ids.unsqueeze(0)
    family = type(plain).__name__
    bridged, logits = _bridge_values(bridge, ids, architecture)
    for layer in range(architecture.n_layers):
        pattern = bridged[sites.attention_pattern(layer)]
        _require(
            pattern.sum(-1),
            torch.ones_like(pattern[..., 0]),
            f"{family}: attention of layer {layer}",
        )
        before, attn, mlp, after = (
            bridged[sites.site(Component(kind, layer)).hook]
            for kind in (Kind.RESID_PRE, Kind.ATTN, Kind.MLP, Kind.RESID_POST)
        )
        _require(before + attn + mlp, after, f"{family}: hooks of block {layer}")
    seen = _plain_values(plain, ids, modules)
    for layer, (before, attn, mlp, after) in enumerate(seen.blocks):
        _require(before + attn + mlp, after, f"{family}: modules of block {layer}")
    _require(logits, seen.logits, f"{family}: logits of the bridge")
    unscaled = modules.unembed(modules.final_norm(seen.final))
    readings = {
        scale: _capped(unscaled * scale, architecture.final_softcap)
        for scale in _stated_scales(plain)
    }
    scale = min(readings, key=lambda by: (readings[by] - seen.logits).abs().max().item())
    _require(readings[scale], seen.logits, f"{family}: what its unembedding reads")
    return scale


def _stated_scales(plain: PreTrainedModel) -> Iterator[float]:
    """What a model may multiply its logits by: nothing, or what its configuration says."""
    yield 1.0
    by, over = (getattr(plain.config, name, None) for name in ("logit_scale", "logits_scaling"))
    if isinstance(by, numbers.Real):
        yield float(by)
    if isinstance(over, numbers.Real) and over:
        yield 1 / float(over)


def _capped(logits: Float[Tensor, "*rows d_vocab"], cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _NoNumbers(Exception):
    """What is compared is infinite or NaN."""


def _whence(plain: PreTrainedModel) -> str:
    """Why a model computes no numbers."""
    broken = [name for name, weight in plain.named_parameters() if not weight.isfinite().all()]
    if not broken:
        return f"the weights are finite, and what is computed of them in {plain.dtype} is not"
    more = f" and {len(broken) - 1} more" if broken[1:] else ""
    return f"the checkpoint's weights are infinite or NaN in {broken[0]}{more}"


def _require(found: Tensor, expected: Tensor, what: str) -> None:
    if not (found.isfinite().all() and expected.isfinite().all()):
        raise _NoNumbers(f"{what} are infinite or NaN")
    scale = expected.abs().max().item()
    worst = (found.float() - expected.float()).abs().max().item()
    if not worst <= _TOLERANCE[expected.dtype] * max(scale, 1.0):
        raise UnsupportedModel(
            f"{what} is off by {worst:.3g} where values reach {scale:.3g}: this family's parts do not "
            "mean what their names say"
        )


def _bridge_values(
    bridge: TransformerBridge, ids: Tensor, architecture: Architecture
) -> tuple[dict[str, Tensor], Tensor]:
    kinds = (Kind.RESID_PRE, Kind.ATTN, Kind.MLP, Kind.RESID_POST)
    names = [sites.attention_pattern(layer) for layer in range(architecture.n_layers)] + [
        sites.site(Component(kind, layer)).hook
        for layer in range(architecture.n_layers)
        for kind in kinds
    ]
    values: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def read(value: Tensor, hook: object) -> None:  # noqa: ARG001  TransformerLens names it
            values[name] = value

        return read

    logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, keep(name)) for name in names])
    missing = [name for name in names if name not in values]
    if missing:
        raise UnsupportedModel(f"{type(bridge.original_model).__name__} has no hook {missing[0]}")
    return values, logits


class _PlainValues(NamedTuple):
    blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    """What entered each block, what its attention and its MLP wrote, and what left it."""
    final: Tensor
    """What the final norm read."""
    logits: Tensor


def _plain_values(plain: PreTrainedModel, ids: Tensor, modules: sites.PlainModules) -> _PlainValues:
    writes: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    final: list[Tensor] = []

    def write(_module: Any, _args: Any, output: Any) -> None:
        writes.append(tensor_out(output))

    def block(_module: Any, args: Any, output: Any) -> None:
        first, second = writes
        writes.clear()
        seen.append((tensor_in(args), first, second, tensor_out(output)))

    def end(_module: Any, args: Any) -> None:
        final.append(tensor_in(args))

    with hooked(
        *((part, write) for b in modules.blocks for part in (b.attn_write, b.mlp_write)),
        *((b.block, block) for b in modules.blocks),
        before=[(modules.final_norm, end)],
    ):
        logits = plain(input_ids=ids, use_cache=False).logits
    return _PlainValues(seen, final[-1], logits)
