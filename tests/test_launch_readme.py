"""The README's commands for a cluster, typed as they stand there, in an empty home folder."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json
from tests.rooms import ROOT
from tests.support import checkpoints_in
from tests.test_driver_curriculum import write_recipe
from tests.typed import Shell, blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUN = "minilm run recipes/quickstart.yaml"
START, SUBMIT = blocks(ROOT / "README.md", "On a cluster")[0]
USE_TOKENS = blocks(ROOT / "README.md", "On a cluster")[1]


def write_quickstart(folder: Path, text: Path, teacher: Path, *, batch: int = 8, steps: int = 8) -> Path:
    """A user's folder in which the README's recipe is a tiny one, of one stage."""
    (folder / "recipes").mkdir(parents=True)
    compute = {"micro_batch": 4, "threads": 1, "checkpoint_every_seconds": 3600}
    student = {"layers": 3, "hidden": 24}
    stage = {"batch": batch, "steps": steps, "peak_lr": 1e-3, "warmup_steps": 1, "held_out_rows": 8}
    stages = [{"name": "assistant", "teacher": str(teacher), "student": student, **stage}]
    path = write_recipe(folder, text, teacher, name="quickstart", compute=compute, stages=stages)
    path.rename(folder / "recipes" / "quickstart.yaml")
    return folder


@pytest.mark.parametrize("tokens", [False, True], ids=["without tokens", "with tokens"])
def test_a_local_run_then_a_head_then_a_job(tmp_path, text, teacher, tokens):
    folder = write_quickstart(tmp_path / "user", text, teacher)
    home = tmp_path / "home"
    with Shell(folder, home) as shell:
        assert "quickstart-assistant v1" in shell.type(RUN)
        assert not (home / ".ray").exists(), "what other commands of Ray would find"
        for line in USE_TOKENS if tokens else ():
            shell.type(line)
        shell.type(START)
        out = shell.type(SUBMIT)
        assert "succeeded" in out and "quickstart-assistant v1" in out
        assert "`ray job stop` will kill" not in out
        assert (home / "minilm-runs" / "quickstart" / "summary.json").exists()
        if tokens:
            shell.type("unset RAY_AUTH_MODE")  # the token lies in the home folder
            joined = shell.type(f"{RUN} --workdir joined --address 127.0.0.1:6379")
            assert "quickstart-assistant v1" in joined
            refused = shell.type(
                f"RAY_AUTH_TOKEN=wrong {RUN} --workdir other --address 127.0.0.1:6379", expect=2
            )
            assert (
                "the Ray cluster at 127.0.0.1:6379 demands a token, and this environment has none or"
                in refused
            )
            assert "Traceback" not in refused


def test_a_stopped_job_has_saved_at_its_step_boundary(tmp_path, text, teacher):
    """A step takes longer than the 3 s after which Ray would kill the run."""
    folder = write_quickstart(tmp_path / "user", text, teacher, batch=6000, steps=40)
    stage = StageFolder(tmp_path / "home" / "minilm-runs" / "quickstart" / "stages" / "assistant")
    with Shell(folder, tmp_path / "home") as shell:
        shell.type(START)
        out = shell.type(SUBMIT.replace(" -- ", " --no-wait -- "))
        job = re.search(r"raysubmit_\w+", out)[0]
        while (read_json(stage.heartbeat) or {}).get("step", 0) < 1:
            time.sleep(0.2)
        assert not checkpoints_in(stage.checkpoints)
        assert "was stopped" in shell.type(f"ray job stop {job}")
        assert "the same command goes on" in shell.type(f"ray job logs {job}")
    assert len(checkpoints_in(stage.checkpoints)) == 1
