"""Time and memory of the divergence by itself; how a measurement is taken and printed.

Time: the median and the 20 % and 80 % quantiles of repeated calls after a warm-up, the ways in turns. Memory: bytes of
all tensors alive at the peak of one call, those that live before and after it included, counted by the allocator. Whole
training steps are in step.py.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from minilm.model.errors import ModelError
from minilm.model.loss.relations import relation_kl
from minilm.orchestrator.system.text import text_table


@dataclass(frozen=True)
class Row:
    """One line of a benchmark, in seconds and bytes. low, high: the 20 % and 80 % quantiles of one step."""

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


class Way(NamedTuple):
    """One that is compared. held: the tensors, modules and optimisers that live before and after `step`."""

    step: Callable[[], Any]
    held: Any


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
    """One relation's divergence, forward and backward. Implementations that do not apply here are skipped."""
    generator = torch.Generator().manual_seed(0)
    sizes = (teacher_size, teacher_size, student_size, student_size)
    sides = [torch.randn(batch, heads, tokens, size, generator=generator).to(device, dtype) for size in sizes]
    t_x, t_y, s_x, s_y = sides
    for side in (s_x, s_y):
        side.requires_grad_()
    # scores of both sides, and for the student's gradient two more products
    flop = 2 * batch * heads * tokens**2 * (teacher_size + 3 * student_size)
    peak = matmul_peak(device, dtype)
    ways = {}
    for implementation in implementations:

        def step(implementation: str = implementation) -> None:
            s_x.grad = s_y.grad = None
            relation_kl(t_x, t_y, s_x, s_y, None, implementation=implementation).backward()

        try:
            step()
        except ModelError:
            continue
        ways[implementation] = Way(step, sides)
    shape = f"{batch}x{heads}x{tokens}x{tokens}, heads of {teacher_size} and {student_size}"
    return measure("loss", ways, shape, device, dtype, batch * tokens, flop, peak, repeats)


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large matrix products on this device."""
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
    return text_table(lines)


def json_lines(rows: Iterable[Row]) -> str:
    """One JSON object a row."""
    return "\n".join(json.dumps(asdict(row)) for row in rows)


def peak_bytes(step: Callable[[], Any], held: Any, device: str) -> int:
    """Bytes alive at the peak of one `step`, of its own and what is `held`: the tensors, modules and optimisers that
    live before and after it."""
    gc.collect()
    storages = {tensor.untyped_storage() for tensor in _tensors(held)}
    before = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if device == "cuda":
        others = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - others
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


def measure(
    bench: str,
    ways: Mapping[str, Way],
    shape: str,
    device: str,
    dtype: torch.dtype,
    tokens: int,
    flop: float,
    peak: float,
    repeats: int,
) -> list[Row]:
    """Warm every way up twice, then time `repeats` turns in which each has one call.

    dtype: that of the products. tokens, flop: of one step. peak: FLOP/s of a matrix product in `dtype`.
    """
    for step, _ in ways.values():
        step()
        step()
    turns = [[_seconds(step, device) for step, _ in ways.values()] for _ in range(repeats)]
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})"
    rows = []
    for (way, (step, held)), times in zip(ways.items(), zip(*turns, strict=True), strict=True):
        median = statistics.median(times)
        rows.append(
            Row(
                bench=bench,
                way=way,
                shape=shape,
                device=name,
                dtype=str(dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                transformers=transformers.__version__,
                median_seconds=median,
                low_seconds=sorted(times)[round(0.2 * (repeats - 1))],
                high_seconds=sorted(times)[round(0.8 * (repeats - 1))],
                tokens_per_second=tokens / median,
                peak_memory_bytes=peak_bytes(step, held, device),
                flop_per_second=flop / median,
                share_of_matmul_peak=flop / median / peak,
            )
        )
    return rows


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
