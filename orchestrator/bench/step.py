"""A whole training step, ours against one written by hand.

By hand means two transformers models with eager attention and `output_attentions=True`, whole maps, the KL of
their softmaxes, AdamW over all parameters. Both ways take the same rows, sizes, dropout and fused optimiser, one
after the other in one process. FLOP: those that the objective needs with nothing computed after the tap, the same
figure for both ways, so that fractions of the peak can be compared.
"""

import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective
from minilm.orchestrator.bench.loss import Row, matmul_peak, measure


@dataclass(frozen=True)
class Size:
    """An encoder's size, written 6x384."""

    layers: int
    hidden: int

    @staticmethod
    def parse(text: str) -> "Size":
        """ "6x384" -> Size(6, 384)."""
        try:
            layers, hidden = (int(part) for part in text.split("x"))
        except ValueError:
            raise ModelError(f"{text!r} is no encoder size; write layers x hidden, as in 6x384") from None
        return Size(layers, hidden)

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}"


def bench_step(
    *,
    teacher: Size = Size(12, 768),
    students: Sequence[Size] = (Size(6, 384),),
    micro_batches: int = 1,
    batch: int = 8,
    tokens: int = 512,
    heads: int = 12,
    ways: Sequence[str] = ("by-hand", "ours"),
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vocabulary: int = 30522,
) -> list[Row]:
    """A whole training step: teacher, students, loss, gradients, update; float32 weights, `dtype` by autocast.

    A step is `micro_batches` of `batch` rows, then one update. ways: "by-hand" and "ours" for every student alone;
    "ours-compiled" with compiled blocks. With several students a last row trains all of them on one teacher pass.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (micro_batches, batch, tokens), generator=generator).to(device)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=vocabulary,
        num_hidden_layers=teacher.layers,
        hidden_size=teacher.hidden,
        num_attention_heads=heads,
        intermediate_size=4 * teacher.hidden,
        max_position_embeddings=max(512, tokens),
    )
    if unknown := [way for way in ways if way not in _STEPS]:
        raise ModelError(f"way {unknown[0]!r} is not known; use {', '.join(_STEPS)}")
    peak = matmul_peak(device, dtype)
    groups = [[size] for size in students] + ([list(students)] if len(students) > 1 else [])
    rows = []
    for group in groups:
        flop = step_flop(teacher, group, micro_batches * batch, tokens)
        rows_text = f"{batch}x{tokens}" if micro_batches == 1 else f"{micro_batches} of {batch}x{tokens}"
        shape = f"{teacher} to {' + '.join(map(str, group))}, {rows_text}"
        for way in ways:
            if way == "by-hand" and len(group) > 1:
                continue
            step, held = _STEPS[way](copy.deepcopy(config), group, ids, dtype)  # a model keeps its config
            rows.append(measure("step", way, shape, step, held, ids.numel(), flop, peak, repeats))
            del step, held
            gc.collect()
    return rows


def step_flop(teacher: Size, students: Iterable[Size], batch: int, tokens: int) -> float:
    """Floating-point operations of a step: two per multiplication, and a backward counts twice its forward."""

    def forward(size: Size) -> float:
        layer = 2 * 12 * size.hidden**2 + 4 * tokens * size.hidden
        return (size.layers - 1) * layer + 2 * 3 * size.hidden**2

    def relations(size: Size) -> float:
        return 2 * 2 * tokens * (teacher.hidden + 3 * size.hidden)

    a_token = forward(teacher) + sum(3 * forward(size) + relations(size) for size in students)
    return batch * tokens * a_token


def _autocast(ids: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)


def _step_of_ours(
    config: Any, sizes: Sequence[Size], ids: Tensor, dtype: torch.dtype, *, compiled: bool = False
) -> tuple[Callable[[], None], list[Any]]:
    teacher = TappedEncoder(
        AutoModel.from_config(config, attn_implementation="sdpa"), config.num_hidden_layers
    )
    students = {}
    for i, size in enumerate(sizes):
        student = build_student(config, layers=size.layers, hidden=size.hidden, seed=i)
        students[f"{i}-{size}"] = TappedEncoder(student, size.layers)
    distiller = Distiller(teacher, students, Objective.named("minilm")).to(ids.device)
    distiller.train()
    if dtype != torch.float32:
        teacher.compute_in(dtype)
    if compiled:
        for encoder in (teacher, *students.values()):
            encoder.compile_blocks()
    optimizers = {name: _adamw(distiller.trained_parameters(name).values()) for name in students}

    def step() -> None:
        for rows in ids:
            with _autocast(ids, dtype):
                teacher_output = distiller.teacher_forward(rows, None)
            for name in optimizers:
                with _autocast(ids, dtype):
                    sums = distiller.term_sums(name, teacher_output, rows, None)
                (sums.sum() / ids[..., 0].numel()).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    return step, [distiller, teacher, *optimizers.values(), ids]


def _step_compiled(*arguments: Any) -> tuple[Callable[[], None], list[Any]]:
    return _step_of_ours(*arguments, compiled=True)


def _step_by_hand(
    config: Any, sizes: Sequence[Size], ids: Tensor, dtype: torch.dtype
) -> tuple[Callable[[], None], list[Any]]:
    size = sizes[0]
    teacher = AutoModel.from_config(config, attn_implementation="eager").eval().to(ids.device)
    shape = build_student(config, layers=size.layers, hidden=size.hidden, seed=0).config
    student = AutoModel.from_config(shape, attn_implementation="eager").train().to(ids.device)
    optimizer = _adamw(student.parameters())

    def outputs(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        out = model(rows, output_attentions=True, output_hidden_states=True)
        attention = model.encoder.layer[-1].attention.self
        value = (
            attention.value(out.hidden_states[-2])
            .unflatten(-1, (config.num_attention_heads, -1))
            .transpose(1, 2)
        )
        return out.attentions[-1], (value @ value.transpose(-1, -2) / value.shape[-1] ** 0.5).softmax(-1)

    def divergence(student_map: Tensor, teacher_map: Tensor) -> Tensor:
        logs = student_map.float().clamp(min=1e-9).log()
        return functional.kl_div(logs, teacher_map.float(), reduction="none").sum(-1).mean()

    def step() -> None:
        for rows in ids:
            with _autocast(ids, dtype):
                with torch.no_grad():
                    teacher_maps = outputs(teacher, rows)
                student_maps = outputs(student, rows)
            pairs = zip(student_maps, teacher_maps, strict=True)
            torch.stack([divergence(*pair) for pair in pairs]).sum().div(len(ids)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step, [student, teacher, optimizer, ids]


_STEPS: dict[str, Callable[..., tuple[Callable[[], None], list[Any]]]] = {
    "ours": _step_of_ours,
    "ours-compiled": _step_compiled,
    "by-hand": _step_by_hand,
}
