"""Dropout of hidden states on a CPU: right in expectation, the same backwards, of one draw, and in every student."""

import gc
import weakref

import pytest
import torch
from torch import nn

from minilm.model.kernels.dropout import Decisions, Dropout, drop, install


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_drops_by_the_decisions_of_its_seed_and_the_same_ones_backwards(dtype):
    x = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    torch.manual_seed(3)
    output = drop(x, 0.3)
    torch.manual_seed(3)
    decisions = Decisions(0.3, int(torch.randint(1 << 62, ())), torch.float64)
    kept = decisions.draw(x.shape)
    expected = (x.detach() / decisions.rate) * kept.to(dtype)
    assert torch.equal(output, expected) and 0 < (output == 0).sum() < x.numel()
    upstream = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    output.backward(upstream)
    assert torch.equal(x.grad, (upstream / decisions.rate) * kept.to(dtype))


def test_gradcheck_and_rows_that_are_not_contiguous():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(1)
        return drop(x.t(), 0.4)

    assert torch.autograd.gradcheck(run, (x,))
    torch.manual_seed(1)
    again = drop(x.t().contiguous(), 0.4)
    assert torch.equal(run(x), again)


def test_the_mean_stays():
    torch.manual_seed(0)
    output = drop(torch.ones(1_000_000), 0.1)
    assert (output == 0).double().mean().item() == pytest.approx(0.1, abs=0.002)
    assert output.mean().item() == pytest.approx(1, abs=0.002)


def test_takes_the_place_of_every_dropout_and_leaves_modes_rates_and_eval_alone():
    inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2))
    model = nn.Sequential(inner, nn.Dropout(0.5)).eval()
    inner.train()
    install(model)
    assert isinstance(inner[1], Dropout) and inner[1].p == 0.2 and inner[1].training
    assert isinstance(model[1], Dropout) and model[1].p == 0.5 and not model[1].training
    x = torch.ones(2, 3)
    assert torch.equal(model[1](x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert (Dropout(0.5).train()(torch.ones(1000)) == 0).any()


def test_keeps_no_mask_for_the_backward():
    x = torch.ones(3, requires_grad=True)
    alive = weakref.ref(x)
    output = drop(x, 0.5)
    del x
    gc.collect()
    assert output.grad_fn is not None and alive() is not None  # its leaf, for the gradient; nothing else
    assert not output.grad_fn.saved_tensors
