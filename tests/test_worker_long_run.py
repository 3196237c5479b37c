"""400,000 steps on the real path (Ray, tracking, checkpoints, stream) at toy sizes: it ends, and nothing grows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json
from tests.conftest import make_teacher
from tests.test_driver_curriculum import write_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]

STEPS, WARM, LOG_EVERY = 400_000, 10_000, 500


def resident_mb(pid: int) -> float:
    """Memory of the process that no other file or process backs, in MB: what a leak would add to."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) / 1024  # type: ignore[index]


def test_a_paper_length_run_ends_and_keeps_its_size(tmp_path, text):
    """Memory of driver and worker at the end within 5 % of that at step 10,000; stores as small as configured."""
    teacher = make_teacher(tmp_path / "bert", layers=2, hidden=16, heads=2)
    stage = {"batch": 2, "steps": STEPS, "peak_lr": 1e-3, "warmup_steps": 4000, "held_out_rows": 8}
    student = {"layers": 2, "hidden": 8}
    recipe = write_recipe(
        tmp_path,
        text,
        teacher,
        stages=[
            {"name": "toy", "teacher": str(teacher), "student": student, "eval_every": STEPS // 8, **stage}
        ],
        data={"text": str(text), "tokenizer": str(teacher), "seq_len": 16, "held_out": 0.1},
        compute={
            "micro_batch": 2,
            "threads": 1,
            "checkpoint_every_seconds": 30,
            "keep_every_steps": STEPS // 4,
        },
        tracking={"log_every": LOG_EVERY},
    )
    work = tmp_path / "work"
    folder = StageFolder(work / "stages" / "toy")
    log = (tmp_path / "run.log").open("w")  # a pipe that nobody reads would stop it after an hour
    process = subprocess.Popen(
        [sys.executable, "-m", "minilm", "run", str(recipe), "--workdir", str(work)],
        env=os.environ | {"MLFLOW_TRACKING_URI": ""},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    samples: list[dict[str, float]] = []
    began = time.monotonic()
    while process.poll() is None:
        time.sleep(10)
        beat = read_json(folder.heartbeat)
        if beat and beat["doing"] == "training":
            try:
                memory = {"driver": resident_mb(process.pid), "worker": resident_mb(beat["pid"])}
            except FileNotFoundError:
                continue  # it has just ended
            samples.append({"seconds": time.monotonic() - began, "step": beat["step"], **memory})
            with (tmp_path / "samples.jsonl").open("a") as file:
                file.write(json.dumps(samples[-1]) + "\n")
    log.close()
    assert process.returncode == 0, (tmp_path / "run.log").read_text()[-5000:]
    warm = next(s for s in samples if s["step"] >= WARM)
    last = samples[-1]
    print(f"{len(samples)} samples; {warm} … {last}; {time.monotonic() - began:.0f} s in all")
    for who in ("driver", "worker"):
        assert last[who] <= 1.05 * warm[who], f"the {who} has grown: {warm} → {last}"
    kept = sorted(path.name for path in folder.checkpoints.iterdir() if path.is_dir())
    assert len(kept) <= 2 + 4, kept  # the newest two, and each of every 100,000 steps
    points = sum(1 for _ in folder.step_metrics.open())
    assert points == STEPS // LOG_EVERY
    assert (work / "mlflow.db").stat().st_size < 20e6
