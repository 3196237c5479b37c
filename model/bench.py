"""How fast and how large: the divergence by itself, and whole training steps against the way they are written
by hand.

By hand means: two transformers models with eager attention and `output_attentions=True`, whole maps, the KL
of their softmaxes, AdamW over all parameters. Both ways take the same rows, sizes, dropout and fused
optimiser, one after the other in one process.

Time: the median and the 20 % and 80 % quantiles of repeated steps after a warm-up. Memory: bytes of all
tensors alive at the peak of one step (weights, gradients and optimiser included), counted by the allocator.
FLOP: what the objective needs with nothing computed behind the tap, the same figure for either way, so that
shares compare.
"""

import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from model.distiller import Distiller
from model.encoder import TappedEncoder, build_student
from model.errors import ModelError
from model.objective import Objective
from model.relations import relation_kl


@dataclass(frozen=True)
class Row:
    """One line of a benchmark. Seconds and bytes; quantiles are of one step; share is of the measured matmul
    peak."""

    bench: str
    way: str
    shape: str
    device: str
    dtype: str
    threads: int
    torch: str
    transformers: str
    median_seconds: float
    low_seconds: float
    high_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    flop_per_second: float
    share_of_matmul_peak: float


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


def bench_loss(
    *,
    batch: int = 8,
    heads: int = 12,
    tokens: int = 512,
    teacher_size: int = 64,
    student_size: int = 32,
    implementations: Sequence[str] = ("reference", "tiled", "triton"),
    repeats: int = 10,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """One relation's divergence, forward and backward. Implementations that do not apply here are left
    out."""
    generator = torch.Generator().manual_seed(0)
    sizes = (teacher_size, teacher_size, student_size, student_size)
    sides = [torch.randn(batch, heads, tokens, size, generator=generator).to(device, dtype) for size in sizes]
    t_x, t_y, s_x, s_y = sides
    for side in (s_x, s_y):
        side.requires_grad_()
    # scores of both sides, and for the student's gradient two more products
    flop = 2 * batch * heads * tokens**2 * (teacher_size + 3 * student_size)
    peak = matmul_peak(device, dtype)
    rows = []
    for implementation in implementations:

        def step(implementation: str = implementation) -> None:
            s_x.grad = s_y.grad = None
            relation_kl(t_x, t_y, s_x, s_y, None, implementation=implementation).backward()

        try:
            step()
        except ModelError:
            continue
        shape = f"{batch}x{heads}x{tokens}x{tokens}, heads of {teacher_size} and {student_size}"
        rows.append(_measure("loss", implementation, shape, step, sides, batch * tokens, flop, peak, repeats))
    return rows


def bench_step(
    *,
    teacher: Size = Size(12, 768),
    students: Sequence[Size] = (Size(6, 384),),
    batch: int = 8,
    tokens: int = 512,
    heads: int = 12,
    ways: Sequence[str] = ("by-hand", "ours"),
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vocabulary: int = 30522,
) -> list[Row]:
    """A whole training step: teacher, students, loss, gradients, update; float32 weights, `dtype` by
    autocast.

    ways: "by-hand" and "ours" for every student alone; "ours-compiled" with compiled blocks. With several
    students a last row trains all of them on one teacher pass.
    """
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)
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
        flop = step_flop(teacher, group, batch, tokens)
        shape = f"{teacher} to {' + '.join(map(str, group))}, {batch}x{tokens}"
        for way in ways:
            if way == "by-hand" and len(group) > 1:
                continue
            step, held = _STEPS[way](copy.deepcopy(config), group, ids, dtype)  # a model keeps its config
            rows.append(_measure("step", way, shape, step, held, batch * tokens, flop, peak, repeats))
            del step, held
            gc.collect()
    return rows


def step_flop(teacher: Size, students: Iterable[Size], batch: int, tokens: int) -> float:
    """Floating-point operations of a step, two a multiplication: a backward counts twice its forward."""

    def forward(size: Size) -> float:
        layer = 2 * 12 * size.hidden**2 + 4 * tokens * size.hidden
        return (size.layers - 1) * layer + 2 * 3 * size.hidden**2

    def relations(size: Size) -> float:
        return 2 * 2 * tokens * (teacher.hidden + 3 * size.hidden)

    a_token = forward(teacher) + sum(3 * forward(size) + relations(size) for size in students)
    return batch * tokens * a_token


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large matrix products: what this device gives now."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(_seconds(lambda: a @ b, device) for _ in range(8))
    return 2 * size**3 / best


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; ratios are to the first row of the same shape."""
    lines = [("way", "shape", "ms (20-80 %)", "tokens/s", "speed", "peak MB", "memory", "GFLOP/s", "of peak")]
    for row in rows:
        first = next(other for other in rows if other.shape == row.shape)
        spread = f"{row.low_seconds * 1e3:.0f}-{row.high_seconds * 1e3:.0f}"
        lines.append(
            (
                row.way,
                row.shape,
                f"{row.median_seconds * 1e3:.0f} ({spread})",
                f"{row.tokens_per_second:,.0f}",
                f"{row.tokens_per_second / first.tokens_per_second:.2f}x",
                f"{row.peak_memory_bytes / 1e6:,.0f}",
                f"{row.peak_memory_bytes / first.peak_memory_bytes:.2f}",
                f"{row.flop_per_second / 1e9:,.0f}",
                f"{row.share_of_matmul_peak:.0%}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in text)


def json_lines(rows: Iterable[Row]) -> str:
    """One JSON object a row."""
    return "\n".join(json.dumps(asdict(row)) for row in rows)


def peak_bytes(step: Callable[[], Any], held: Any, device: str) -> int:
    """Bytes alive at the peak of one `step`; `held` (tensors, modules, optimisers) is what lives before and
    after."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    storages = {tensor.untyped_storage() for tensor in _tensors(held)}
    before = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return before + peak


def _measure(
    bench: str,
    way: str,
    shape: str,
    step: Callable[[], None],
    held: Any,
    tokens: int,
    flop: float,
    peak: float,
    repeats: int,
) -> Row:
    first = _tensors(held)[0]
    device = first.device.type
    step()
    step()
    times = sorted(_seconds(step, device) for _ in range(repeats))
    median = statistics.median(times)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})"
    return Row(
        bench=bench,
        way=way,
        shape=shape,
        device=name,
        dtype=str(first.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        median_seconds=median,
        low_seconds=times[round(0.2 * (repeats - 1))],
        high_seconds=times[round(0.8 * (repeats - 1))],
        tokens_per_second=tokens / median,
        peak_memory_bytes=peak_bytes(step, held, device),
        flop_per_second=flop / median,
        share_of_matmul_peak=flop / median / peak,
    )


def _seconds(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _tensors(held: Any) -> list[Tensor]:
    """Every tensor in tensors, modules (with gradients), optimisers and lists of these."""
    if isinstance(held, Tensor):
        return [held] if held.grad is None else [held, held.grad]
    if isinstance(held, nn.Module):
        return [t for tensor in (*held.parameters(), *held.buffers()) for t in _tensors(tensor)]
    if isinstance(held, torch.optim.Optimizer):
        return [v for state in held.state.values() for v in state.values() if isinstance(v, Tensor)]
    return [tensor for part in held for tensor in _tensors(part)]


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
    if compiled:
        for encoder in (teacher, *students.values()):
            encoder.compile_blocks()
    optimizers = {name: _adamw(distiller.trained_parameters(name).values()) for name in students}

    def step() -> None:
        with _autocast(ids, dtype):
            taps = distiller.teach(ids, None)
        for name, optimizer in optimizers.items():
            with _autocast(ids, dtype):
                sums = distiller.term_sums(name, taps, ids, None)
            (sums.sum() / len(ids)).backward()
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

    def outputs(model: Any) -> tuple[Tensor, Tensor]:
        out = model(ids, output_attentions=True, output_hidden_states=True)
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
        with _autocast(ids, dtype):
            with torch.no_grad():
                teacher_maps = outputs(teacher)
            student_maps = outputs(student)
        loss = torch.stack([divergence(s, t) for s, t in zip(student_maps, teacher_maps, strict=True)]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step, [student, teacher, optimizer, ids]


_STEPS: dict[str, Callable[..., tuple[Callable[[], None], list[Any]]]] = {
    "ours": _step_of_ours,
    "ours-compiled": _step_compiled,
    "by-hand": _step_by_hand,
}
