"""Attention with dropout in tiles: the same numbers as whole maps with the same decisions, forward and backward."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from minilm.model.encoder import tile_size
from minilm.model.encoder.attention import attend, dropout_attention
from minilm.model.kernels.dropout import Decisions


def parts(tokens=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 4, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def masks(tokens=11):
    keys = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    keys[0, ..., 7:] = False
    return {
        "none": None,
        "keys": keys.expand(2, 1, tokens, tokens),
        "added": torch.randn(1, 3, tokens, tokens, generator=torch.Generator().manual_seed(1)).double(),
    }


def decisions(seed, rate, shape):
    """The dropout factor of every score, drawn as the tiles draw it: one tile here."""
    dropout = Decisions(rate, seed, torch.float64)
    return dropout.draw(torch.Size(shape)) / dropout.rate


@pytest.mark.parametrize("mask", ["none", "keys", "added"])
def test_equals_whole_maps_with_the_same_decisions(mask):
    seen = masks()[mask]
    torch.manual_seed(4)
    q, k, v = parts()
    output = dropout_attention(q, k, v, seen, 0.3)
    torch.manual_seed(4)
    factor = decisions(int(torch.randint(1 << 62, ())), 0.3, (2, 3, 11, 11))
    scores = q @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    expected = (scores.softmax(-1) * factor) @ v
    torch.testing.assert_close(output, expected)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad(output, (q, k, v), upstream)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("tile", [20, 1 << 19])
@pytest.mark.parametrize("mask", ["none", "keys", "added"])
def test_bfloat16_differs_from_exact_whole_maps_by_its_rounding_only(monkeypatch, mask, tile):
    monkeypatch.setitem(tile_size.TILE, "cpu", tile)
    seen = masks(64)[mask]
    exact = [part.detach().bfloat16().double().requires_grad_() for part in parts(64)]
    rough = [part.detach().bfloat16().requires_grad_() for part in exact]
    upstream = torch.randn(2, 3, 64, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for given in (exact, rough):
        torch.manual_seed(4)
        output = dropout_attention(*given, seen, 0.3)
        results.append((output, *torch.autograd.grad(output, given, upstream.to(output.dtype))))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - expected).norm() / expected.norm()
        assert error < 2**-6, error  # other decisions, or a lost mask, give 0.3 and more


def test_gradients_of_many_bfloat16_tiles_add_up_in_float32(monkeypatch):
    monkeypatch.setitem(tile_size.TILE, "cpu", 1)  # a tile a query: 512 of them add to each key
    q, k, v = (torch.ones(1, 1, 512, 4, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    torch.manual_seed(0)
    output = dropout_attention(q, k, v, None, 1e-9)  # rounds to nothing dropped
    (gradient,) = torch.autograd.grad(output, v, torch.ones_like(output))
    assert torch.equal(
        gradient, torch.ones_like(gradient)
    )  # 512 summands of 1/512; in bfloat16 they stop short


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decisions_do_not_depend_on_the_dtype(dtype):
    shape = torch.Size((3, 5, 7))
    exact = Decisions(0.4, 9, torch.float64)
    other = Decisions(0.4, 9, dtype)
    for _ in range(2):
        dropped = other.apply_(torch.ones(shape, dtype=dtype), other.draw(shape))
        assert torch.equal(dropped.double(), exact.draw(shape))


@pytest.mark.parametrize("tile", [1, 20, 200])
def test_gradcheck_for_every_tile(monkeypatch, tile):
    monkeypatch.setitem(tile_size.TILE, "cpu", tile)

    def run(q, k, v):
        torch.manual_seed(7)
        return dropout_attention(q, k, v, masks(3)["added"], 0.2)

    assert torch.autograd.gradcheck(run, tuple(parts(3)))


@pytest.mark.parametrize("dropped", [1, 6554, 65535])
def test_of_all_decisions_just_as_many_drop_as_the_rate_says(dropped):
    dropout = Decisions(dropped / 65536, 0, torch.float64)
    every = np.arange(65536, dtype=np.uint16).view(np.uint64)
    dropout._bits = SimpleNamespace(random_raw=lambda count: every[:count].copy())
    kept = dropout.draw(torch.Size((65536,)))
    assert kept.sum() == 65536 - dropped == 65536 * dropout.rate


def test_the_share_that_is_kept_is_right_at_every_place():
    kept = Decisions(0.1, 3, torch.float64).draw(torch.Size((4_000_000,)))
    for place in range(4):  # four decisions come from one 64-bit draw
        share = kept[place::4].mean().item()
        assert share == pytest.approx(0.9, abs=4 * (0.09 / 1_000_000) ** 0.5)
    neighbours = (kept[0::4] * kept[1::4]).mean().item()
    assert neighbours == pytest.approx(0.81, abs=0.002)


def test_the_expectation_is_attention_without_dropout():
    q, k, v = (part.detach() for part in parts())
    mean = sum(dropout_attention(q, k, v, None, 0.1) for _ in range(3000)) / 3000
    plain = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert (mean - plain).abs().max() < 0.08


def test_it_takes_one_draw_of_the_global_generator_and_nothing_else():
    q, k, v = parts()
    torch.manual_seed(1)
    first = dropout_attention(q, k, v, None, 0.5)
    after = torch.get_rng_state()
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(1)
    torch.randint(1 << 62, ())
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(1)
    assert torch.equal(dropout_attention(q, k, v, None, 0.5), first)
    assert not torch.equal(dropout_attention(q, k, v, None, 0.5), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_dropout_pytorchs_own_attention_runs(dtype):
    q, k, v = (part.detach().to(dtype) for part in parts())
    output, _ = attend(nn.Module(), q, k, v, masks()["keys"], is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masks()["keys"])
    assert torch.equal(output, expected.transpose(1, 2))


@pytest.mark.parametrize("mask", [None, "seen", "added"])
def test_training_in_bfloat16_without_dropout_rounds_its_inputs_and_its_output_only(mask):
    q, k, v = (torch.randn(2, 3, 8, 4, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    if mask is not None:
        seen = torch.rand(2, 1, 8, 8) > 0.3
        mask = seen if mask == "seen" else torch.zeros(seen.shape).masked_fill(~seen, -9.0).bfloat16()
    upstream = torch.randn(2, 8, 3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = attend(nn.Module(), q, k, v, mask, is_causal=False)
    assert ours.dtype == torch.bfloat16
    exact = [side.detach().float().requires_grad_() for side in (q, k, v)]
    theirs = nn.functional.scaled_dot_product_attention(
        *exact, mask.float() if mask is not None and mask.dtype != torch.bool else mask
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0)
    gradients = torch.autograd.grad(ours, (q, k, v), upstream)
    for found, expected in zip(gradients, torch.autograd.grad(theirs, exact, upstream.float()), strict=True):
        torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


def test_grouped_keys_and_the_scale():
    q, k, v = (part.detach() for part in parts())
    q = torch.cat([q, q], dim=1)  # six query heads on three key heads
    module = nn.Module()
    module.num_key_value_groups = 2
    torch.manual_seed(0)
    output, _ = attend(module, q, k, v, None, dropout=1e-9, is_causal=False)  # rounds to nothing dropped
    expected = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_nothing_is_left_in_a_cycle():
    """An output kept as an attribute of its own graph would live until the garbage collector comes."""
    gc.collect()
    gc.disable()
    try:
        output = dropout_attention(*parts(), None, 0.1)
        alive = weakref.ref(output)
        del output
        assert alive() is None
    finally:
        gc.enable()
