"""The README's commands for a cluster, typed as they stand there, in an empty home folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json
from tests.rooms import ROOT
from tests.support import checkpoints_in
from tests.test_driver_curriculum import write_recipe
from tests.test_wheel import build_wheel
from tests.typed import Shell, blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUN = "minilm run recipes/quickstart.yaml"
CONNECT = "import os, signal, time, ray, minilm.orchestrator.launch.ray_private as private; ray.init('auto')"
KILLED = "private.write_claim('mine'); print(private.read_claims()); os.kill(os.getpid(), signal.SIGKILL)"
LOOK = "[time.sleep(1) for _ in range(60) if private.read_claims()]; print(private.read_claims())"
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
        if tokens:  # and the local run goes on beside the head
            for line in USE_TOKENS:
                shell.type(line)
            (folder / ".gitignore").write_text("runs\n")  # Ray uploads no folder that changes meanwhile
            shell.type(f"{RUN} > ../local.log 2>&1 &")
        else:
            assert "quickstart-assistant v1" in shell.type(RUN)
            assert not (home / ".ray").exists(), "what other commands of Ray would find"
        shell.type(START)
        out = shell.type(SUBMIT)
        assert "succeeded" in out and "quickstart-assistant v1" in out
        assert "`ray job stop` will kill" not in out
        assert (home / "minilm-runs" / "quickstart" / "summary.json").exists()
        shell.type("wait")
        assert (folder / "runs" / "quickstart" / "summary.json").exists()
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


def test_of_two_runs_that_want_the_same_place_one_waits_for_all_stages_of_the_other(tmp_path, text, teacher):
    """Both are started at once. It says who holds what it waits for."""
    write_recipe(tmp_path, text, teacher)  # of two stages: between them the place is free
    with Shell(tmp_path, tmp_path / "home") as shell:
        shell.type(START.replace('"trainer": 2', '"trainer": 1'))
        for name in ("a", "b"):
            log, code = tmp_path / f"{name}.log", tmp_path / f"{name}.code"
            run = f"minilm run tiny.yaml --workdir {name} --address 127.0.0.1:6379 > {log} 2>&1"
            shell.type(f"({run}; echo $? > {code}) &")
        shell.type("wait")
        logs = {name: (tmp_path / f"{name}.log").read_text() for name in ("a", "b")}
        assert [(tmp_path / f"{name}.code").read_text() for name in logs] == ["0\n", "0\n"], logs
        assert "{'" in shell.type(f'python -c "{CONNECT}; {KILLED}" 2> /dev/null', expect=137)
        assert shell.type(f'python -c "{CONNECT}; {LOOK}" 2> /dev/null') == "{}\n", (
            "a dead driver's ends with it"
        )
    waited = [name for name, log in logs.items() if "waiting for the cluster" in log]
    assert len(waited) == 1, logs
    (first,) = {"a", "b"} - set(waited)
    holder = rf"0 of 1 trainer are free, 1 held by process \d+ on \S+ in {tmp_path / first} \("
    assert re.search(holder, logs[waited[0]]), logs
    ended = (tmp_path / first / "stages" / "small" / "done.json").stat().st_mtime
    begun = (tmp_path / waited[0] / "stages" / "assistant" / "stage.json").stat().st_mtime
    assert ended < begun


def test_a_cluster_without_the_package_gets_its_wheel_with_the_job(tmp_path, text, teacher):
    """Its Python has everything else: an environment that finds the packages of this one, but follows no link of it."""
    folder = write_quickstart(tmp_path / "user", text, teacher)
    build_wheel(folder, tmp_path / "checkout")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (environment / "bin" / "ray").write_text(
        f"#!{environment}/bin/python\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n"
    )
    (environment / "bin" / "ray").chmod(0o755)
    submit = blocks(ROOT / "docs" / "runs.md", "## A cluster without")[0][1]
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with Shell(folder, tmp_path / "home", PATH=path, PYTHONPATH="") as shell:
        assert "No module named minilm" in shell.type("python -m minilm", expect=1)
        shell.type(START)
        out = shell.type(submit.replace("RECIPE.yaml", "recipes/quickstart.yaml"))
        assert "succeeded" in out and "quickstart-assistant v1" in out
