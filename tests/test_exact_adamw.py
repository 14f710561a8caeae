"""Small steps of half-precision weights add up, and the optimizer follows weights that shrink."""

import pytest
import torch

from compresso.exact_adamw import ExactAdamW


def stepped(parameter, optimizer, gradients):
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_adamw_in_float32(dtype):
    torch.manual_seed(0)
    start = torch.randn(6, 4).to(dtype)
    gradients = torch.randn(40, 6, 4).bfloat16().float()
    parameter, reference = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizer = ExactAdamW([parameter], 1e-5)  # far below what a step of bfloat16 near 1 can be
    stepped(parameter, optimizer, gradients)
    stepped(reference, torch.optim.AdamW([reference], lr=1e-5, weight_decay=0.0), gradients)
    torch.testing.assert_close(parameter.detach(), reference.detach().to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.param_groups[0]["params"][0].detach(), reference.detach())
    assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_shrink_go_on_as_their_part_of_the_whole(dtype):
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(6, 4).to(dtype))
    gradients = torch.randn(8, 6, 4)
    cut = torch.nn.Parameter(whole.detach().clone())
    places = torch.tensor([0, 2, 5])
    stepped(whole, ExactAdamW([whole], 1e-3), gradients)
    optimizer = ExactAdamW([cut], 1e-3)
    stepped(cut, optimizer, gradients[:4])
    smaller = torch.nn.Parameter(cut.detach()[places].clone())
    optimizer.exchange(cut, smaller, 0, places)
    stepped(smaller, optimizer, gradients[4:, places])
    torch.testing.assert_close(smaller.detach(), whole.detach()[places], rtol=0, atol=0)
