"""The fast implementations against float64 truth: error at most twice the readable one's in the same dtype.

Triton runs in its interpreter here; on a GPU `pytest -m gpu` compiles it for the same tests.
"""

import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from minilm.model.distiller import Distiller
from minilm.model.encoder import tile_size
from minilm.model.encoder.build import build_student
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.loss.dispatch import choose
from minilm.model.loss.objective import Objective
from minilm.model.loss.relations import relation_kl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
FAST = [
    ("tiled", "cpu"),
    pytest.param(
        ("triton", "cpu"),
        marks=[NEEDS_TRITON, pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles it")],
    ),
    pytest.param(("tiled", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), marks=[NEEDS_TRITON, pytest.mark.gpu]),
]
NAMES = ("student_x", "student_y")


def inputs(batch, heads, tokens, teacher_size, student_size, dtype) -> dict[str, Tensor]:
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
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def ragged(batch: int, tokens: int) -> Tensor:
    """Random holes, and of several sequences one of padding only."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens)) > 0.3
    if batch > 1:
        mask[-1] = False
    return mask


def bias_for(heads: int, tokens: int) -> Tensor:
    return torch.randn(1, heads, tokens, tokens, generator=torch.Generator().manual_seed(9))


def loss_and_gradients(implementation, tensors, mask, dtype, **options):
    sides = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    for name in NAMES:
        sides[name].requires_grad_()
    loss = relation_kl(**sides, mask=mask, implementation=implementation, **options)
    upstream = torch.randn((), generator=torch.Generator().manual_seed(sides["student_x"].numel()))
    loss.backward(upstream.to(loss))
    return [loss.detach(), *(sides[name].grad for name in NAMES)]


def error(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [(a.double() - b).abs().max().item() for a, b in zip(got, truth, strict=True)]


def hold_against_reference(implementation, tensors, mask, dtype, **options):
    implementation, device = implementation
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
    mask = None if mask is None else mask.to(device)
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
    (1, 48, 5, 16, 16),
    (2, 1, 127, 32, 128),
    (1, 1, 512, 64, 32),
    (2, 1, 513, 16, 24),
]


@pytest.mark.parametrize("implementation", FAST, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_odd_shapes(implementation, shape, padded):
    batch, _, tokens, *_ = shape
    mask = ragged(batch, tokens) if padded else None
    hold_against_reference(implementation, inputs(*shape, torch.float32), mask, torch.float32)


@pytest.mark.parametrize("implementation", FAST, ids="-".join)
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


@pytest.mark.parametrize("implementation", FAST, ids="-".join)
@pytest.mark.parametrize("side", ["teacher_bias", "student_bias"])
def test_a_bias_beyond_one_block(implementation, side):
    tensors = inputs(2, 2, 131, 32, 16, torch.float32)
    hold_against_reference(implementation, tensors, ragged(2, 131), torch.float32, **{side: bias_for(2, 131)})


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes_in_bfloat16(implementation, shape):
    batch, heads, tokens, *_ = shape
    for side in ("teacher_bias", "student_bias"):
        bias = {side: bias_for(heads, tokens)}
        tensors = inputs(*shape, torch.bfloat16)
        hold_against_reference(
            (implementation, "cuda"), tensors, ragged(batch, tokens), torch.bfloat16, **bias
        )


@pytest.mark.parametrize("implementation", FAST, ids="-".join)
def test_bfloat16_inputs(implementation):
    tensors = inputs(2, 3, 40, 64, 32, torch.bfloat16)
    hold_against_reference(implementation, tensors, ragged(2, 40), torch.bfloat16)


@pytest.mark.parametrize("implementation", FAST, ids="-".join)
def test_strides_of_a_split_hidden_state(implementation):
    """What an encoder hands out: heads are a transposed view, one projection may hold q, k and v."""
    generator = torch.Generator().manual_seed(3)
    fused = [torch.randn(2, 21, 3, 4, 16, generator=generator) for _ in range(2)]
    views = [fused[side][:, :, part].transpose(1, 2) for side in (0, 1) for part in (0, 1)]
    tensors = dict(zip(("teacher_x", "teacher_y", *NAMES), views, strict=True))
    assert not tensors["student_x"].is_contiguous()
    hold_against_reference(implementation, tensors, ragged(2, 21), torch.float32)


@pytest.mark.parametrize("implementation", FAST, ids="-".join)
def test_a_part_with_itself(implementation):
    """x and y are one tensor (values): both gradients add up in it."""
    implementation, device = implementation
    tensors = {name: tensor.to(device) for name, tensor in inputs(2, 3, 17, 16, 16, torch.float32).items()}
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
    monkeypatch.setitem(tile_size.TILE, "cpu", tile)
    tensors = inputs(3, 2, 11, 8, 4, torch.float64)
    options = {"teacher_bias": bias_for(2, 11), "student_bias": bias_for(1, 11)}
    got = loss_and_gradients("tiled", tensors, ragged(3, 11), torch.float64, **options)
    truth = loss_and_gradients("reference", tensors, ragged(3, 11), torch.float64, **options)
    assert max(error(got, truth)) < 1e-14


@NEEDS_TRITON
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU `tune` tries them")
@pytest.mark.parametrize(("forward", "backward"), [((16, 32), (32, 16)), ((64, 16), (16, 64))])
def test_triton_is_the_same_for_every_launch(monkeypatch, forward, backward):
    from minilm.model.kernels.fused import LAUNCH, Launch

    for which, (M, N) in (("forward", forward), ("backward", backward)):
        monkeypatch.setitem(LAUNCH, (which, torch.float32), Launch(M, N, 4, 2))
    hold_against_reference(
        ("triton", "cpu"), inputs(1, 2, 50, 16, 16, torch.float32), ragged(1, 50), torch.float32
    )


@NEEDS_TRITON
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU it is run by hand")
def test_tuning_times_both_passes_and_leaves_the_table_as_it_was():
    from minilm.model.kernels.fused import LAUNCH, Launch
    from minilm.orchestrator.bench.tune_kernels import tune

    before = dict(LAUNCH)
    candidates = [Launch(16, 16, 4, 2), Launch(32, 16, 4, 2)]
    shape = {"rows": 1, "heads": 1, "tokens": 33, "head_sizes": (16, 16), "dtype": torch.float32}
    found = tune(**shape, device="cpu", candidates=candidates, repeats=1)
    assert {which: sorted(launch for _, launch in timed) for which, timed in found.items()} == {
        "forward": candidates,
        "backward": candidates,
    }
    assert all(timed == sorted(timed) for timed in found.values())
    assert before == LAUNCH


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
    monkeypatch.setitem(tile_size.TILE, "cpu", 4096)
    tensors = inputs(2, 4, 128, 16, 16, torch.float32)
    largest = {}
    for which in ("tiled", "reference"):
        with Largest() as seen:
            loss_and_gradients(which, tensors, None, torch.float32)
        largest[which] = seen.elements
    assert largest["reference"] == 2 * 4 * 128 * 128
    assert largest["tiled"] == 2 * 4 * 128 * 16  # an input, not a map


class Precisions(torch.utils._python_dispatch.TorchDispatchMode):
    """What float32 products of matrices were rounded to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return function(*args, **(kwargs or {}))


def test_tiled_takes_the_units_for_bfloat16_where_all_inputs_are_of_it():
    usual = torch.backends.mkldnn.matmul.fp32_precision
    for dtype, wanted in ((torch.bfloat16, "bf16"), (torch.float32, usual)):
        with Precisions() as products:
            loss_and_gradients("tiled", inputs(1, 2, 8, 4, 4, dtype), None, dtype)
        assert products.seen == {wanted}
        assert torch.backends.mkldnn.matmul.fp32_precision == usual


@pytest.mark.parametrize("implementation", FAST, ids="-".join)
def test_fifty_steps_of_a_distillation_give_the_same_losses(implementation):
    implementation, device = implementation
    losses = {which: distil(which, device) for which in ("reference", implementation)}
    assert losses["reference"][-1] < 0.5 * losses["reference"][0]
    assert losses[implementation] == pytest.approx(losses["reference"], rel=1e-4)


def distil(implementation: str, device: str) -> list[float]:
    """A one-layer student learns from two layers by plain gradient descent, which hides no wrong scale."""
    config = AutoConfig.for_model(
        "bert",
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    teacher = TappedEncoder(build_student(config, layers=2, hidden=32, dropout=0.0, seed=0), 2)
    student = TappedEncoder(build_student(config, layers=2, hidden=16, dropout=0.0, seed=1), 2)
    distiller = Distiller(teacher, {"s": student}, Objective.named("minilm", implementation=implementation))
    distiller.to(device).train()
    ids = torch.randint(0, 30, (1, 11), generator=torch.Generator().manual_seed(2)).to(device)
    mask = (torch.arange(11) < torch.tensor([[8]])).to(device)
    taught = distiller.teacher_forward(ids, mask)
    optimizer = torch.optim.SGD(distiller.trained_parameters("s").values(), lr=0.03)
    losses = []
    for _ in range(50):
        loss = distiller.term_sums("s", taught, ids, mask).sum() / distiller.count(mask, ids.shape)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- Which one runs. ----


@NEEDS_TRITON
def test_auto_takes_tiles_on_a_cpu_and_triton_on_a_gpu(caplog):
    cpu = torch.zeros(1, 1, 2, 16)
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 1, 2, 16))
    wide = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(1, 1, 2, 256))
    assert choose("auto", cpu, cpu, None).__name__ == "tiled_sum"
    assert choose("auto", gpu, gpu, None).__name__ == "fused_sum"
    for _ in range(3):
        assert choose("auto", wide, gpu, None).__name__ == "tiled_sum"
    assert caplog.messages == [
        "relation_kl falls back from triton to tiled: it takes head sizes up to 128, not 256"
    ]


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"implementation": "flash"},
            "implementation 'flash' is not known; use one of auto, reference, tiled, triton",
        ),
        (
            {"dtype": torch.float64},
            "the triton implementation does not apply: it takes float32 and bfloat16, not torch.float64;"
            " use tiled or auto",
        ),
        (
            {"bias": True},
            "the triton implementation does not apply: it gives no gradient to a student's learned position bias;"
            " use tiled or auto",
        ),
        (
            {"environment": "0"},
            "the triton implementation does not apply: it needs a GPU, or TRITON_INTERPRET=1; use tiled or auto",
        ),
    ],
)
def test_what_does_not_apply_is_refused(monkeypatch, options, message):
    monkeypatch.setenv("TRITON_INTERPRET", options.get("environment", "1"))
    x = torch.zeros(1, 1, 2, 16, dtype=options.get("dtype", torch.float32))
    bias = torch.zeros(2, 2, requires_grad=True) if "bias" in options else None
    with pytest.raises(ModelError) as caught:
        relation_kl(
            x, x, x, x, None, student_bias=bias, implementation=options.get("implementation", "triton")
        )
    assert str(caught.value) == message
