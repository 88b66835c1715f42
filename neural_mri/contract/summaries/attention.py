"""Attention patterns in short: where each layer's are."""

import msgspec

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.summaries.base import Stored, SummaryBase, Tensor

__all__ = ("AttentionLayer", "AttentionSummary", "attention_summary", "patterns")


class AttentionLayer(msgspec.Struct, frozen=True, kw_only=True, tag="attention"):
    """Where one layer's patterns are."""

    num_heads: int
    attention_patterns: Tensor


class AttentionSummary(SummaryBase, frozen=True, kw_only=True, tag="attention"):
    """Attention patterns, by URL."""

    data: dict[str, AttentionLayer]


def attention_summary(stored: Stored) -> AttentionSummary:
    """From any layer's table: they are all alike."""
    layers = sorted(set(stored.manifest.request["layers"]))
    return AttentionSummary(
        **stored.shared(next(iter(stored.tables.values()))),
        data={
            str(Component(Kind.ATTN, layer)): AttentionLayer(
                num_heads=stored.architecture.n_heads,
                attention_patterns=patterns(stored, layer),
            )
            for layer in layers
        },
    )


def patterns(stored: Stored, layer: int | None) -> Tensor:
    """The patterns of a layer on the prompt of the scan, measured or not: they are made when asked for."""
    n_tokens = len(stored.manifest.prompt_tokens)
    return Tensor(
        shape=(stored.architecture.n_heads, n_tokens, n_tokens),
        data_url=f"{stored.job_url}/attention/{layer}",
    )
