"""Maps computed by oneDNN are the maps that PyTorch computes, and so are their gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests import models
from worker.scanner import linear_maps
from worker.scanner.loading import LoadedModel

D_IN, D_OUT = 576, 1536


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0))


def reads(*rows: int) -> Tensor:
    return torch.randn(*rows, D_IN, generator=torch.Generator().manual_seed(1))


def gradients(*rows: int) -> Tensor:
    return torch.randn(*rows, D_OUT, generator=torch.Generator().manual_seed(2))


def assert_near(found: Tensor, exact: Tensor) -> None:
    """To what float32 makes of a sum of 1,536 products, each about 1: up to 150, and rounded at every step."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=4e-4)


@pytest.mark.parametrize("rows", [(1,), (10,), (3, 7), (300,), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [None, torch.arange(D_OUT).float()])
def test_a_map_is_the_product(weight: Tensor, rows: tuple[int, ...], bias: Tensor | None) -> None:
    read = reads(*rows)
    exact = read.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_near(linear_maps.linear(read, weight, bias), exact)


def test_a_map_reads_rows_that_lie_apart(weight: Tensor) -> None:
    apart = reads(4, 9)[:, -1]
    assert not apart.is_contiguous()
    assert_near(linear_maps.linear(apart, weight), apart.double() @ weight.double().T)


def test_a_map_leads_back_as_it_should(weight: Tensor) -> None:
    read, gradient = reads(5, 4).requires_grad_(), gradients(5, 4)
    written = linear_maps.linear(read, weight)
    (found,) = torch.autograd.grad(written, read, gradient)
    assert_near(found, gradient.double() @ weight.double())


def test_a_map_leads_back_along_the_first_rows_alone(weight: Tensor) -> None:
    read, gradient = reads(5, 4).requires_grad_(), gradients(5, 4)
    written = linear_maps.linear(read, weight, back_along=2)
    (found,) = torch.autograd.grad(written, read, gradient)
    assert_near(found[:2], gradient[:2].double() @ weight.double())
    assert not found[2:].any()


def test_rows_that_are_alike_differ_in_their_gradients(weight: Tensor) -> None:
    read = reads(1, 4).repeat(6, 1, 1).requires_grad_()
    gradient = gradients(6, 4)
    written = linear_maps.linear(read, weight, alike=True)
    assert_near(written.detach(), read.detach().double() @ weight.double().T)
    (found,) = torch.autograd.grad(written, read, gradient)
    assert_near(found, gradient.double() @ weight.double())


def test_both_kinds_of_modules_are_taken_over_and_follow_their_weights() -> None:
    straight, small = nn.Linear(D_IN, D_OUT), nn.Linear(8, 8)
    transposed: nn.Module = Conv1D(D_OUT, D_IN)  # type: ignore[no-untyped-call]
    model = nn.ModuleList([straight, transposed, small]).requires_grad_(requires_grad=False)
    read = reads(10)
    expected = [straight(read), transposed(read)]
    linear_maps.take_over(model)
    assert ["forward" in vars(module) for module in model] == [True, True, False]
    for module, before in zip((straight, transposed), expected, strict=True):
        assert_near(module(read), before.double())
        module.get_parameter("weight").zero_()
        assert torch.equal(module(read), module.get_parameter("bias").expand(10, -1))


def test_maps_are_as_they_were_after_another_way_of_computing() -> None:
    taken, own = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT)
    linear_maps.take_over(taken)
    before = vars(taken)["forward"]
    with linear_maps.computing([taken, own], alike=True):
        assert vars(taken)["forward"] is not before
        assert "forward" in vars(own)
    assert vars(taken)["forward"] is before
    assert "forward" not in vars(own)


def test_half_precision_is_left_to_pytorch() -> None:
    half = nn.Linear(D_IN, D_OUT).bfloat16()
    linear_maps.take_over(half)
    assert "forward" not in vars(half)


def test_a_real_model_predicts_what_hugging_face_predicts(
    smollm2: LoadedModel, smollm2_folder: Path
) -> None:
    """Nothing of ours is in the other model, loaded from the same folder."""
    ids = torch.tensor([models.prompt(12).ids])
    published = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    with torch.inference_mode():
        theirs = published(input_ids=ids).logits
        ours = smollm2.plain(input_ids=ids).logits
    assert not torch.equal(ours, theirs), "expected other kernels: was anything taken over?"
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
