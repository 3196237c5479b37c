"""Writes a recipe for soaks, with text and teacher, so small that most of the time goes into starting.

usage: python -m tests.soak.recipe FOLDER [STEPS]

The recipe has two stages of STEPS steps each (600), 1 to 3 workers, and data behind a URL. Prints its path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from minilm.data.builder.build import build
from tests.conftest import make_teacher, write_text


def write_soak_recipe(
    folder: Path, *, steps: int, stages: int = 1, workers: object = 1, by_url: bool = False, **compute: object
) -> Path:
    """Write the recipe into `folder`; a step is 6 rows of 32 tokens, the students have 2 layers or 1 of size 16.

    by_url: the data are several shards behind a file:// URL, read through a cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "words.txt", documents=300)
    teacher = make_teacher(folder / "bert", layers=2, hidden=32)
    stage = {"batch": 6, "steps": steps, "peak_lr": 1e-3, "warmup_steps": steps // 10, "held_out_rows": 8}
    students = [("assistant", str(teacher), 2), ("small", "assistant", 1)][:stages]
    data: dict[str, object] = {"text": str(text), "tokenizer": str(teacher), "seq_len": 32, "held_out": 0.1}
    if by_url:
        options = {"seq_len": 32, "held_out": 0.1, "rows_per_block": 64, "shard_bytes": 32 << 10}
        build([text], str(teacher), folder / "built", processes=1, **options)
        data = {"shards": (folder / "built").as_uri(), "cache": str(folder / "cache")}
    recipe = {
        "name": "soak",
        "data": data,
        "stages": [
            {
                "name": name,
                "teacher": of,
                "student": {"layers": layers, "hidden": 16},
                "eval_every": 500,
                **stage,
            }
            for name, of, layers in students
        ],
        "compute": {
            "workers": workers,
            "micro_batch": 2,
            "threads": 1,
            "checkpoint_every_seconds": 1,
            "stall_seconds": 10,
            **compute,
        },
        "tracking": {"log_every": 20},
    }
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 600
    print(write_soak_recipe(Path(sys.argv[1]).resolve(), steps=count, stages=2, workers=[1, 3], by_url=True))
