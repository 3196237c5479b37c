"""Measures two parts of the loop: exact and fast gradient sums, and how long a save holds the loop up.

Each function returns rows of a table. docs/benchmarks.md has the figures of some machines.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minilm.orchestrator.checkpoint.async_saver import AsyncSaver
from minilm.orchestrator.checkpoint.format import Fingerprints, ResumeState
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.train.build import build_distiller, make_states
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.gradient_sum import make_sum


@dataclass(frozen=True)
class GradientSumRow:
    """One kind of gradient sum. gradient_sum: "exact" or "fast".

    add_ms: to add one micro-batch. finish_ms: once a step, with the sum over workers. bytes_a_parameter: memory, the
    gradient included. error: the greatest distance from the float64 sum, relative to the gradient's root mean square.
    """

    gradient_sum: str
    workers: int
    parameters: int
    micro_batches: int
    add_ms: float
    finish_ms: float
    bytes_a_parameter: float
    error: float


def gradient_sum_rows(
    world: World, *, parameters: int = 33_000_000, micro_batches: int = 8, rounds: int = 5
) -> list[GradientSumRow]:
    """Time and error of both kinds of gradient sum.

    The gradients are normal values times powers of two from 2^-20 to 2^3, which is about the spread in a network.
    Every worker of `world` adds the same `micro_batches`; times are medians of `rounds`.
    """
    device = world.device
    generator = torch.Generator(device).manual_seed(0)
    spread = torch.randint(-20, 4, (parameters,), generator=generator, device=device).float().exp2()
    terms = torch.ones(2, device=device)
    rows = []
    for kind in ("exact", "fast"):
        before = _allocated(device)
        total = make_sum(kind, parameters, 2, device, micro_batches * world.size)
        held = _allocated(device) - before if device.type == "cuda" else _tensor_bytes(total)
        truth = torch.zeros(parameters, dtype=torch.float64, device=device)
        adding, finishing = [], []
        for _ in range(rounds):
            total.begin()
            truth.zero_()
            for _ in range(micro_batches):
                noise = torch.randn(parameters, generator=generator, device=device).mul_(spread)
                truth += noise
                start = _now(device)
                total.gradient += noise  # stands for what the backward pass does
                total.add(terms)
                adding.append(_now(device) - start)
            start = _now(device)
            total.finish(world, 1.0)
            finishing.append(_now(device) - start)
        truth *= world.size
        error = (total.gradient.double() - truth).abs().max() / truth.square().mean().sqrt()
        rows.append(
            GradientSumRow(
                kind,
                world.size,
                parameters,
                micro_batches,
                1e3 * statistics.median(adding),
                1e3 * statistics.median(finishing),
                held / parameters,
                float(error),
            )
        )
    return rows


@dataclass(frozen=True)
class SaveRow:
    """The cost of a save.

    stall_ms, stall_cpu_ms: how long the loop stands still, by the clock and of processor time. write_seconds,
    write_cpu_seconds: the same for the thread that writes beside the loop. share: the fraction of the loop's time that
    a save every `every_seconds` costs. share_at_most: the same without an idle core, where the thread takes its
    processor time from the loop.
    """

    parameters: int
    megabytes: float
    stall_ms: float
    stall_cpu_ms: float
    write_seconds: float
    write_cpu_seconds: float
    every_seconds: float
    share: float
    share_at_most: float


def save_row(spec: StageSpec, folder: Path, device: torch.device, *, rounds: int = 5) -> SaveRow:
    """Measure saves of the students of `spec`, with their moments, into `folder`. Times are medians of `rounds`; the
    first save, which allocates the memory, does not count."""
    distiller = build_distiller(spec, device)
    students = make_states(spec, distiller)
    for student in students:
        student.gradient.normal_()
        student.update(torch.tensor(True, device=device), step=0, learning_rate=1e-6, max_gradient_norm=None)
    models = {student.name: distiller.state_module(student.name) for student in students}
    saver = AsyncSaver(
        LocalStore(folder),
        models,
        students,
        Fingerprints("", ""),
        keep=1,
        keep_every=None,
        fence=Fence(""),
    )
    state = ResumeState({"digest": "0", "seed": 0, "batch": 1}, 1, 1, "float32")
    times = []
    for step in range(rounds + 1):
        start, cpu = _now(device), time.thread_time()
        saver.save(step + 1, state, lambda copy: None)
        copied, cpu, all_cpu = time.perf_counter(), time.thread_time() - cpu, time.process_time()
        saver.wait()
        times.append((copied - start, cpu, time.perf_counter() - copied, time.process_time() - all_cpu))
    size = sum(path.stat().st_size for path in folder.glob("step-*/*"))
    stall, stall_cpu, write, write_cpu = (
        statistics.median(column) for column in zip(*times[1:], strict=True)
    )
    every = spec.checkpoint_policy.checkpoint_every_seconds
    return SaveRow(
        parameters=sum(s.gradient.numel() for s in students),
        megabytes=size / 1e6,
        stall_ms=1e3 * stall,
        stall_cpu_ms=1e3 * stall_cpu,
        write_seconds=write,
        write_cpu_seconds=write_cpu,
        every_seconds=every,
        share=stall / every,
        share_at_most=(stall + write_cpu) / every,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _tensor_bytes(holder: object) -> int:
    """The bytes of the distinct storages that an object's tensors live in."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in vars(holder).values()
        if isinstance(t, torch.Tensor)
    }
    return sum(storages.values())
