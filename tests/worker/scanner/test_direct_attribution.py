"""Direct logit attribution on a tiny model of every family: a sum, and each of its terms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from tests import models
from tests.worker.scanner.by_hand import ByHand
from worker.scanner.direct_attribution import DirectAttribution, direct_attribution
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.runs import record

IDS = torch.tensor([models.prompt(7).ids])
PECULIAR = ("nemotron", "olmo", "cohere", "granite")
"""Norms of their own classes, and scaled logits."""
SCALES = {"cohere": 0.25, "granite": 0.25}


def attributed(model: LoadedModel, metric: Metric) -> DirectAttribution:
    with torch.no_grad():
        return direct_attribution(model, record(model, IDS), metric)


def before_softcap(model: LoadedModel, logits: Tensor) -> Tensor:
    cap = model.architecture.final_softcap
    return logits if cap is None else cap * torch.atanh(logits / cap)


def assert_terms_sum_to_logits(model: LoadedModel, family: str, metric: Metric) -> None:
    logits = before_softcap(model, ByHand(model, family).logits(IDS))
    other = logits.mean() if metric.foil_id is None else logits[metric.foil_id]
    found = attributed(model, metric)
    by_head = found.embed + found.heads.sum() + found.mlp.sum() + found.biases
    torch.testing.assert_close(by_head, logits[metric.answer_id] - other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("metric", [Metric(5, 9), Metric(5)])
def test_the_terms_and_the_biases_sum_to_the_logits(
    tiny_model: LoadedModel, family: str, metric: Metric
) -> None:
    assert_terms_sum_to_logits(tiny_model, family, metric)


@pytest.mark.parametrize("metric", [Metric(5, 9), Metric(5)])
@pytest.mark.parametrize("name", PECULIAR)
def test_they_sum_to_the_logits_whatever_the_norm_and_the_scale_of_logits(
    other_models: Callable[[str], LoadedModel], name: str, metric: Metric
) -> None:
    assert_terms_sum_to_logits(other_models(name), name, metric)


def frozen(norm: Any, read: Tensor, vector: Tensor, family: str) -> Tensor:
    """What the final norm makes of a part of what it reads, its scale that of the whole."""
    written = getattr(norm, "weight", None)
    weight = 1.0 if written is None else written
    if family.startswith("gemma") or family == "nemotron":
        weight = 1 + weight
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    if isinstance(norm, torch.nn.LayerNorm) or family in ("olmo", "cohere"):
        spread = (read.var(unbiased=False) + epsilon).sqrt()
        scaled: Tensor = (vector - vector.mean()) / spread * weight
        return scaled
    by_norm: Tensor = vector / (read.square().mean() + epsilon).sqrt() * weight
    return by_norm


def assert_terms_are_what_the_unembedding_reads(model: LoadedModel, family: str) -> None:
    hand, metric = ByHand(model, family), Metric(5, 9)
    found = attributed(model, metric)
    components = hand.components(by_head=False)
    writes = hand.values(IDS, components)
    norm, unembed = model.modules.final_norm, model.modules.unembed.get_parameter("weight")
    read = torch.stack([write[-1] for write in writes.values()]).sum(0)
    for component in components:
        normed = frozen(norm, read, writes[component][-1], family)
        expected = normed @ (unembed[5] - unembed[9]) * SCALES.get(family, 1.0)
        torch.testing.assert_close(
            found.of([component])[0], expected.detach(), rtol=1e-3, atol=1e-3, msg=str(component)
        )


def test_a_term_is_what_the_unembedding_reads_of_a_components_write(
    tiny_model: LoadedModel, family: str
) -> None:
    assert_terms_are_what_the_unembedding_reads(tiny_model, family)


@pytest.mark.parametrize("name", PECULIAR)
def test_a_term_is_that_whatever_the_norm_and_the_scale_of_logits(
    other_models: Callable[[str], LoadedModel], name: str
) -> None:
    assert_terms_are_what_the_unembedding_reads(other_models(name), name)


def test_a_head_has_the_part_of_its_layer_that_goes_through_its_rows_of_w_o(
    tiny_model: LoadedModel, family: str
) -> None:
    # Zeroing the head's z in the last layer takes its write out of what attention writes; where a norm
    # follows, its scale would change too: there only the sum can be told apart.
    found = attributed(tiny_model, Metric(5, 9))
    if models.NAMES[family].attn_post_norm is not None:
        torch.testing.assert_close(found.heads.sum(1), found.attn, rtol=1e-3, atol=1e-3)
        return
    hand, layer = ByHand(tiny_model, family), tiny_model.architecture.n_layers - 1
    attn, head = Component(Kind.ATTN, layer), Component.head(layer, 1)
    whole = hand.values(IDS, [attn])[attn][-1]
    with hand.replaced(head, 0.0, start=0):
        without = hand.values(IDS, [attn])[attn][-1]
    writes = hand.values(IDS, hand.components(by_head=False))
    read = torch.stack([write[-1] for write in writes.values()]).sum(0)
    unembed = tiny_model.modules.unembed.get_parameter("weight")
    normed = frozen(tiny_model.modules.final_norm, read, whole - without, family)
    expected = normed @ (unembed[5] - unembed[9])
    torch.testing.assert_close(found.of([head])[0], expected.detach(), rtol=1e-3, atol=1e-3)


def test_only_what_writes_to_the_stream_has_a_term(tiny_model: LoadedModel) -> None:
    found = attributed(tiny_model, Metric(5, 9))
    assert torch.equal(found.of([EMBED])[0], found.embed)
    with pytest.raises(ValueError, match="unembed is no component that a circuit is made of"):
        found.of([UNEMBED])
