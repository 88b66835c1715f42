"""What is done at a component's site is done to that component."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from neural_mri.contract.components import Component
from tests import models
from worker.scanner.loading import LoadedModel
from worker.scanner.sites import site

IDS = torch.tensor([models.prompt(7).ids])


def zeroed(model: LoadedModel, address: str) -> Tensor:
    """Logits with the component zeroed through TransformerLens."""
    place = site(Component.parse(address))

    def zero(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        changed[place.where] = 0
        return changed

    with torch.inference_mode():
        logits: Tensor = model.bridge.run_with_hooks(IDS, fwd_hooks=[(place.hook, zero)])
    return logits


def severed(family: str, module: str, change: Callable[[Tensor], None]) -> Tensor:
    """Logits of a plain model of the same weights, one of them changed."""
    model = models.build(family)
    weight = model.get_parameter(f"{module}.weight")
    with torch.inference_mode():
        # GPT-2 keeps the transpose: rows here are always what the module reads.
        change(weight.data if family == "gpt2" else weight.data.T)
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def test_zeroing_a_head_is_severing_it_from_the_residual_stream(
    tiny_model: LoadedModel, family: str
) -> None:
    names, d_head = models.NAMES[family], tiny_model.architecture.d_head

    def sever(w_o: Tensor) -> None:
        w_o[2 * d_head : 3 * d_head] = 0

    expected = severed(family, f"{names.blocks}.1.{names.w_o}", sever)
    found = zeroed(tiny_model, "blocks.1.attn.head_2")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_zeroing_a_neuron_is_severing_it_from_the_residual_stream(
    tiny_model: LoadedModel, family: str
) -> None:
    names = models.NAMES[family]

    def sever(w_out: Tensor) -> None:
        w_out[17] = 0

    expected = severed(family, f"{names.blocks}.1.{names.w_out}", sever)
    found = zeroed(tiny_model, "blocks.1.mlp.neuron_17")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("address", ["blocks.1.resid_post", "unembed"])
def test_zeroing_the_end_of_the_residual_stream_leaves_one_prediction_for_all(
    tiny_model: LoadedModel, address: str
) -> None:
    last = f"blocks.{tiny_model.architecture.n_layers - 1}.resid_post"
    logits = zeroed(tiny_model, last if address != "unembed" else address)[0]
    np.testing.assert_allclose(logits, logits[:1].expand_as(logits), rtol=1e-5, atol=1e-5)


def test_zeroing_the_embedding_is_zeroing_learned_positions_too(
    tiny_models: dict[str, LoadedModel],
) -> None:
    logits = zeroed(tiny_models["gpt2"], "embed")[0]
    np.testing.assert_allclose(logits, logits[:1].expand_as(logits), rtol=1e-5, atol=1e-5)
