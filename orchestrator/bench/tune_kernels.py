"""Time candidate launches of both kernels on this GPU; `fused.LAUNCH` is set by hand from what this prints.

    python -m minilm.orchestrator.bench.tune_kernels --rows 32 --heads 12 --tokens 512 \\
        --head-sizes 64,32 --dtype bfloat16

Leaves out: writing the table, and tuning while training. A candidate that does not fit on the chip is skipped.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterable

import torch
from triton.runtime.errors import OutOfResources

from minilm.model.kernels.fused import LAUNCH, Launch
from minilm.model.loss.relations import relation_kl

CANDIDATES = tuple(
    Launch(*sizes) for sizes in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
)


def tune(
    *,
    rows: int,
    heads: int,
    tokens: int,
    head_sizes: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cuda",
    candidates: Iterable[Launch] = CANDIDATES,
    repeats: int = 20,
) -> dict[str, list[tuple[float, Launch]]]:
    """Median seconds and launch by pass ("forward", "backward"), the fastest first. `LAUNCH` is left unchanged."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.randn(rows, heads, tokens, size, generator=generator).to(device, dtype) for size in head_sizes
    )
    student.requires_grad_()
    before, found = dict(LAUNCH), {"forward": [], "backward": []}  # type: ignore[var-annotated]
    try:
        for which, candidate in itertools.product(found, candidates):
            LAUNCH.update(before)
            LAUNCH[which, dtype] = candidate
            try:
                seconds = [_seconds(which, teacher, student) for _ in range(repeats + 2)][2:]
            except OutOfResources:
                continue
            found[which].append((statistics.median(seconds), candidate))
    finally:
        LAUNCH.update(before)
    return {which: sorted(timed) for which, timed in found.items()}


def _seconds(which: str, teacher: torch.Tensor, student: torch.Tensor) -> float:
    start = _now(student)
    loss = relation_kl(teacher, teacher, student, student, None, implementation="triton")
    middle = _now(student)
    loss.backward()
    return middle - start if which == "forward" else _now(student) - middle


def _now(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 32), ("heads", 12), ("tokens", 512), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head-sizes", default="64,32", metavar="T,S", help="of teacher and student")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    teacher_size, student_size = (int(size) for size in options.head_sizes.split(","))
    found = tune(
        rows=options.rows,
        heads=options.heads,
        tokens=options.tokens,
        head_sizes=(teacher_size, student_size),
        dtype=getattr(torch, options.dtype),
        repeats=options.repeats,
    )
    now = {which: LAUNCH[which, getattr(torch, options.dtype)] for which in found}
    for which, timed in found.items():
        for seconds, launch in timed[:8]:
            mark = "  (now)" if launch == now[which] else ""
            print(f"{which:9} {1e3 * seconds:8.3f} ms  {launch}{mark}")


if __name__ == "__main__":
    main()
