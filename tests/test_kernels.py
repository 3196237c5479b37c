"""The fast implementations against float64 truth: error at most twice the readable one's in the same dtype.

Triton runs in its interpreter here; `pytest -m gpu` compiles the same tests on a GPU (test_kernels_gpu.py).
"""

import pytest
import torch
from torch import Tensor

import model.tiled
from model.relations import IMPLEMENTATIONS, relation_kl

FAST = sorted(set(IMPLEMENTATIONS) - {"reference"})
NAMES = ("student_x", "student_y")


def inputs(batch, heads, tokens, teacher_size, student_size, dtype, device="cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 131 + heads)
    made = {
        name: torch.randn(batch, heads, tokens, size, generator=generator)
        for name, size in (
            ("teacher_x", teacher_size),
            ("teacher_y", teacher_size),
            ("student_x", student_size),
            ("student_y", student_size),
        )
    }
    return {name: tensor.to(device, dtype) for name, tensor in made.items()}


def ragged(batch: int, tokens: int, device="cpu") -> Tensor:
    """Random holes, and one sequence of padding only."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens)) > 0.3
    mask[-1] = False
    return mask.to(device)


def bias_for(heads: int, tokens: int, device="cpu") -> Tensor:
    return torch.randn(1, heads, tokens, tokens, generator=torch.Generator().manual_seed(9)).to(device)


def loss_and_gradients(implementation, tensors, mask, dtype, upstream=0.37, **options):
    sides = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    for name in NAMES:
        sides[name].requires_grad_()
    loss = relation_kl(**sides, mask=mask, implementation=implementation, **options)
    (loss * upstream).backward()
    return [loss.detach(), *(sides[name].grad for name in NAMES)]


def error(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [(a.double() - b).abs().max().item() for a, b in zip(got, truth, strict=True)]


def hold_against_reference(implementation, tensors, mask, dtype, **options):
    truth = loss_and_gradients("reference", tensors, mask, torch.float64, **options)
    plain = loss_and_gradients("reference", tensors, mask, dtype, **options)
    fast = loss_and_gradients(implementation, tensors, mask, dtype, **options)
    assert fast[0].dtype == plain[0].dtype and [g.dtype for g in fast[1:]] == [dtype, dtype]
    for mine, theirs in zip(error(fast, truth), error(plain, truth), strict=True):
        assert mine <= 2 * theirs + 1e-6
    if mask is not None:
        for gradient in fast[1:]:
            assert torch.count_nonzero(gradient * ~mask[:, None, :, None]) == 0
            assert gradient.isfinite().all()


# batch, heads, tokens, teacher head size, student head size
SHAPES = [
    (2, 1, 1, 16, 16),
    (2, 12, 2, 64, 32),
    (3, 2, 127, 32, 128),
    (2, 1, 512, 64, 32),
    (2, 1, 513, 16, 24),
]
SMALL = [(2, 3, 33, 64, 32), (2, 48, 5, 16, 16)]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", SHAPES + SMALL, ids=str)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_odd_shapes(implementation, shape, padded):
    batch, _, tokens, *_ = shape
    mask = ragged(batch, tokens) if padded else None
    hold_against_reference(implementation, inputs(*shape, torch.float32), mask, torch.float32)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("reduction", ["sequence", "token", "sequence_sum", "token_sum"])
@pytest.mark.parametrize("side", ["teacher_bias", "student_bias"])
def test_reductions_and_a_bias_on_one_side(implementation, reduction, side):
    shape = (3, 2, 19, 32, 16)
    hold_against_reference(
        implementation,
        inputs(*shape, torch.float32),
        ragged(3, 19),
        torch.float32,
        reduction=reduction,
        **{side: bias_for(2, 19)},
    )


@pytest.mark.parametrize("implementation", FAST)
def test_bfloat16_inputs(implementation):
    tensors = inputs(2, 3, 40, 64, 32, torch.bfloat16)
    hold_against_reference(implementation, tensors, ragged(2, 40), torch.bfloat16)


@pytest.mark.parametrize("implementation", FAST)
def test_strides_of_a_split_hidden_state(implementation):
    """What an encoder hands out: heads are a transposed view, one projection may hold q, k and v."""
    generator = torch.Generator().manual_seed(3)
    fused = [torch.randn(2, 21, 3, 4, 16, generator=generator) for _ in range(2)]
    views = [fused[side][:, :, part].transpose(1, 2) for side in (0, 1) for part in (0, 1)]
    tensors = dict(zip(("teacher_x", "teacher_y", *NAMES), views, strict=True))
    assert not tensors["student_x"].is_contiguous()
    hold_against_reference(implementation, tensors, ragged(2, 21), torch.float32)


@pytest.mark.parametrize("implementation", FAST)
def test_a_part_with_itself(implementation):
    """x and y are one tensor (values): both gradients add up in it."""
    tensors = inputs(2, 3, 17, 16, 16, torch.float32)
    gradients = []
    for which in ("reference", implementation):
        value = tensors["student_x"].clone().requires_grad_()
        relation_kl(
            tensors["teacher_x"], tensors["teacher_x"], value, value, None, implementation=which
        ).backward()
        gradients.append(value.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 1, 1, 9), (9, 9), (1, 2, 9, 9), (2, 1, 9)], ids=str)
def test_tiled_gives_the_gradient_of_a_learned_bias(shape):
    tensors = inputs(3, 2, 9, 8, 4, torch.float64)
    gradients = []
    for which in ("reference", "tiled"):
        bias = torch.randn(
            shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
        ).requires_grad_()
        relation_kl(**tensors, mask=ragged(3, 9), student_bias=bias, implementation=which).backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_tiled_gradcheck():
    tensors = inputs(2, 2, 5, 4, 3, torch.float64)
    mask = ragged(2, 5)

    def loss(x, y):
        return relation_kl(
            tensors["teacher_x"], tensors["teacher_y"], x, y, mask, implementation="tiled", reduction="token"
        )

    assert torch.autograd.gradcheck(loss, tuple(tensors[name].requires_grad_() for name in NAMES))


@pytest.mark.parametrize("tile", [1, 40, 150, 700, 1 << 20])
def test_tiled_is_the_same_for_every_tile(monkeypatch, tile):
    monkeypatch.setitem(model.tiled.TILE, "cpu", tile)
    tensors = inputs(3, 2, 11, 8, 4, torch.float64)
    options = {"teacher_bias": bias_for(2, 11), "student_bias": bias_for(1, 11)}
    got = loss_and_gradients("tiled", tensors, ragged(3, 11), torch.float64, **options)
    truth = loss_and_gradients("reference", tensors, ragged(3, 11), torch.float64, **options)
    assert max(error(got, truth)) < 1e-14


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_tiled_never_holds_a_whole_map(monkeypatch):
    monkeypatch.setitem(model.tiled.TILE, "cpu", 4096)
    tensors = inputs(2, 4, 128, 16, 16, torch.float32)
    largest = {}
    for which in ("tiled", "reference"):
        with Largest() as seen:
            loss_and_gradients(which, tensors, None, torch.float32)
        largest[which] = seen.elements
    assert largest["reference"] == 2 * 4 * 128 * 128
    assert largest["tiled"] == 2 * 4 * 128 * 16  # an input, not a map


@pytest.mark.parametrize("implementation", FAST)
def test_fifty_steps_give_the_same_losses(implementation):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 12, 8, generator=generator)
    teacher = [torch.randn(8, 32, generator=generator) for _ in range(2)]
    mask = ragged(4, 12)
    losses = {}
    for which in ("reference", implementation):
        start = torch.Generator().manual_seed(1)
        weights = [torch.randn(8, 32, generator=start).mul_(0.3).requires_grad_() for _ in range(2)]
        optimizer = torch.optim.SGD(weights, lr=1.0)
        losses[which] = []
        for _ in range(50):
            split = [(tokens @ w).view(4, 12, 2, 16).transpose(1, 2) for w in (*teacher, *weights)]
            loss = relation_kl(*split, mask, implementation=which)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[which].append(loss.item())
    assert losses["reference"][-1] < 0.7 * losses["reference"][0]
    assert losses[implementation] == pytest.approx(losses["reference"], rel=1e-4)
