"""Whole curricula as people run them: `minilm run` in processes of its own, killed, stopped, repeated, misused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minilm.model.export import weights_digest
from minilm.orchestrator.checkpoint.format import FORMAT, sealed
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.cli import main
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.launch.attempt import take_checkpoints
from minilm.orchestrator.recipe.library import copy_recipe
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.tracking.tracking import Tracking
from tests.support import crowded_folder, has_checkpoint, make_spec

pytestmark = pytest.mark.timeout(900)  # several starts of everything, on a slow machine too


def write_recipe(folder: Path, text: Path, teacher: Path, **changes: object) -> Path:
    """A curriculum of two stages, teacher → assistant → student, of 40 steps each."""
    stage = {"batch": 8, "steps": 40, "peak_lr": 1e-3, "warmup_steps": 4, "held_out_rows": 8}
    recipe = {
        "name": "tiny",
        "data": {"text": str(text), "tokenizer": str(teacher), "seq_len": 32, "held_out": 0.1},
        "stages": [
            {"name": "assistant", "teacher": str(teacher), "student": {"layers": 3, "hidden": 24}, **stage},
            {"name": "small", "teacher": "assistant", "student": {"layers": 1, "hidden": 24}, **stage},
        ],
        "compute": {"micro_batch": 4, "threads": 1, "checkpoint_every_steps": 4},
        "tracking": {"log_every": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def minilm(
    *arguments: str | Path,
    program: tuple[str, ...] = ("-m", "minilm"),
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=os.environ | {"MLFLOW_TRACKING_URI": ""} | environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *arguments: str | Path,
    expect: int = 0,
    seconds: float = 240,
    cwd: Path | None = None,
    **environment: str,
) -> tuple[str, str]:
    process = minilm(*arguments, cwd=cwd, **environment)
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{errors}"
    return out, errors


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """As long as the test has, which is pytest's to end."""
    while not condition():
        assert process.poll() is None, "".join(map(str, process.communicate()))
        time.sleep(0.005)


def digests(workdir: Path) -> dict[str, str]:
    return {
        stage: weights_digest(StageFolder(workdir / "stages" / stage).student(stage))
        for stage in ("assistant", "small")
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path) -> Path:
    """A folder with the recipe and the work directory of a run that was left alone; one for all processes and files
    of tests, which only read it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "finished"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            recipe = write_recipe(folder, text, teacher)
            started_in = crowded_folder(folder / "user")
            run("run", recipe, "--workdir", folder / "work", "--launcher", "inline", cwd=started_in)
            (folder / "whole").touch()
    return folder


def test_a_run_ends_with_a_table_of_all_models(finished):
    out, errors = run("run", finished / "tiny.yaml", "--workdir", finished / "work", "--launcher", "inline")
    assert "every stage of tiny is done already" in errors
    for expected in (
        "(teacher)",
        "assistant (stage assistant)",
        "small (stage small)",
        "tiny-small v1",
        "3 x 48",
    ):
        assert expected in out
    summary = json.loads((finished / "work" / "summary.json").read_text())
    assert [m["name"] for m in summary["models"]][1:] == ["assistant", "small"]
    for model in summary["models"][1:]:
        assert set(model["before"]) == set(model["after"]) == {"attention", "value"}
        assert sum(model["after"].values()) < sum(model["before"].values())


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_finished_run_starts_neither_torch_nor_ray_nor_mlflow_and_a_check_from_afar_none(
    finished, verb, tmp_path
):
    """That check is of a recipe whose teacher is not here."""
    given = ["run", str(finished / "tiny.yaml"), "--workdir", str(finished / "work")]
    if verb == "check":
        given = ["check", *map(str, copy_recipe("bert-l6-h384", tmp_path))]
    program = (
        "import sys; from minilm.orchestrator.cli import main; "
        f"code = main({given!r}); "
        "sys.exit(code or bool({'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_driver_that_goes_on_imports_no_modelling_code_before_its_workers_run(finished, tmp_path):
    """Seconds that every recovery from a dead driver would wait for; only a first run looks into the teachers."""
    program = (
        "import sys; from minilm.orchestrator.launch.inline import InlineLauncher\n"
        "from minilm.orchestrator.cli import main\n"
        "heavy = {'transformers.modeling_utils', 'minilm.model.encoder.build'}\n"
        "InlineLauncher.start = lambda self, spec: sys.exit(f'has {heavy & set(sys.modules) or None}')\n"
        f"main(['run', {str(finished / 'tiny.yaml')!r}, '--workdir', {str(tmp_path)!r}, '--launcher', 'inline'])"
    )
    for expected in ("'minilm.model.encoder.build'", "has None\n"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.stderr.endswith("\n") and expected in done.stderr.splitlines(True)[-1], done.stderr


def test_what_was_tracked(finished):
    """Through MLflow's own client: parameters, tags, points once each, pictures, the recipe file."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished / 'work' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    stages = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(stages) == {"assistant", "small"}
    assert all(r.info.status == "FINISHED" for r in runs)
    assert parent.data.params["stages.assistant.peak_lr"] == "0.001"
    manifest = read_json(finished / "work" / "data" / "manifest.json")
    assert manifest is not None
    assert len(parent.data.tags["minilm.data_fingerprint"]) == 64
    assert [a.path for a in client.list_artifacts(parent.info.run_id, "recipe")] == ["recipe/tiny.yaml"]
    for name, stage in stages.items():
        for metric in ("loss", "attention", "value", "gradient_norm"):
            history = client.get_metric_history(stage.info.run_id, f"{name}/{metric}")
            assert sorted(p.step for p in history) == list(range(4, 41, 4))
        assert {"learning_rate", "rows_per_second", "tokens_per_second"} <= set(stage.data.metrics)
        held_out = client.get_metric_history(stage.info.run_id, f"{name}/heldout/value")
        assert sorted(p.step for p in held_out) == [0, 40]
        pictures = {a.path for a in client.list_artifacts(stage.info.run_id, "pictures")}
        assert pictures == {"pictures/attention_maps.png", "pictures/loss_curves.png"}


@pytest.mark.slow
def test_a_registered_student_loads_without_our_code(finished, tmp_path):
    out, _ = run("pull", "models:/tiny-small@newest", tmp_path / "small", "--workdir", finished / "work")
    assert "version 1" in out
    program = (
        "import sys, transformers; "
        f"model = transformers.AutoModel.from_pretrained({str(tmp_path / 'small')!r}); "
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(tmp_path / 'small')!r}); "
        "output = model(**tokenizer('time year people way', return_tensors='pt')); "
        "assert output.last_hidden_state.shape == (1, 6, 24), output.last_hidden_state.shape; "
        "assert 'minilm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_killed_in_a_stage_between_stages_and_while_publishing_the_weights_are_the_same(finished, tmp_path):
    """SIGKILL of the whole driver, three times; then it goes on to the same bits, points and versions."""
    recipe, work = finished / "tiny.yaml", tmp_path / "work"
    first, second = (StageFolder(work / "stages" / name) for name in ("assistant", "small"))
    moments = (
        lambda: has_checkpoint(first.checkpoints, 4),
        lambda: first.done.exists(),
        lambda: has_checkpoint(second.checkpoints, 4),
    )
    for reached in moments:
        process = minilm("run", recipe, "--workdir", work, "--launcher", "inline")
        wait_for(reached, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not second.done.exists()
    run("run", recipe, "--workdir", work, "--launcher", "inline")
    assert digests(work) == digests(finished / "work")

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 3, "a resumed run goes on in the same MLflow runs"
    for run_ in runs:
        for metric in run_.data.metrics:
            steps = [p.step for p in client.get_metric_history(run_.info.run_id, metric)]
            assert len(steps) == len(set(steps)), f"{metric} has double points"
    assert [int(v.version) for v in client.search_model_versions("name = 'tiny-assistant'")] == [1]


@pytest.mark.slow  # three runs
def test_with_the_work_directory_lost_it_goes_on_in_a_new_one_to_the_same_weights(finished, tmp_path):
    """SIGKILL in the second stage, and nothing is left but the checkpoints on object storage: the first stage is
    measured and exported again without training, as the teacher of the second, which goes on where it was."""
    pytest.importorskip("moto.server")
    from tests.s3_server import S3Server

    def puts(place: str) -> list[str]:
        return [path for method, path in server.requests if method == "PUT" and place in path]

    def begun() -> bool:
        return len([path for path in puts("/small/step-") if path.endswith("/checkpoint.json")]) > 1

    server = S3Server()
    options = ("--launcher", "inline", "--set", "compute.checkpoints=s3://bucket/kept")
    command = ("run", finished / "tiny.yaml", *options, "--workdir")
    try:
        # from the second commit on nothing arrives: one checkpoint of the second stage is there
        server.fault = lambda method, path: "reset" if method == "PUT" and begun() else None
        process = minilm(*command, tmp_path / "lost", **server.environment)
        wait_for(begun, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        shutil.rmtree(tmp_path / "lost")
        server.fault = lambda method, path: None
        server.requests.clear()

        work = tmp_path / "new"
        run(*command, work, **server.environment)
        first, second = (StageFolder(work / "stages" / name) for name in ("assistant", "small"))
        assert puts("/assistant/") == ["/bucket/kept/tiny/assistant/owner.json"]
        assert [point.step for point in read_all_metrics(first.step_metrics)] == []
        assert [point.step for point in read_all_metrics(second.step_metrics)] == list(range(8, 41, 4))
        assert read_json(second.spec)["teacher"] == str(first.student("assistant").resolve())
        assert digests(work) == digests(finished / "work")
        models, undisturbed = (
            json.loads((root / "summary.json").read_text())["models"] for root in (work, finished / "work")
        )
        assert [m["after"] for m in models] == [m["after"] for m in undisturbed]
        assert not any(m["before"] for m in models), "what was measured before the first step is lost"
    finally:
        server.close()


def test_checkpoints_move_only_together_with_the_place(tmp_path, shards, teacher):
    folder = StageFolder(tmp_path / "stage")
    folder.root.mkdir()
    spec = make_spec(shards, teacher, folder.root)
    folder.spec.write_text(spec.to_json())
    elsewhere = replace(spec, checkpoints=str(tmp_path / "elsewhere"), attempt="second")
    take_checkpoints(elsewhere, folder)
    assert LocalStore(tmp_path / "elsewhere").owner() == "second"
    (folder.checkpoints / "step-000000003").mkdir(parents=True)
    with pytest.raises(
        UserError, match="stage first has checkpoints in .* copy them there, or set compute.chec"
    ):
        take_checkpoints(elsewhere, folder)
    shutil.copytree(folder.checkpoints, tmp_path / "elsewhere", dirs_exist_ok=True)
    take_checkpoints(elsewhere, folder)
    take_checkpoints(spec, folder)


def test_checkpoints_that_another_recipe_is_making_are_left_to_it(tmp_path, shards, teacher):
    folder, store = StageFolder(tmp_path / "stage"), LocalStore(tmp_path / "elsewhere")
    store.claim("first")
    spec = make_spec(shards, teacher, folder.root, checkpoints=store.where, attempt="second")
    meta = {"format": FORMAT, "job": "another", "data": spec.data.fingerprint, "step": 3}
    write_json(store.folder / "step-000000003" / "checkpoint.json", sealed(meta))
    with pytest.raises(UserError, match="belongs to another recipe .another, this run has digest"):
        take_checkpoints(spec, folder)
    assert store.owner() == "first"
    write_json(store.folder / "step-000000003" / "checkpoint.json", sealed(meta | {"job": spec.digest}))
    take_checkpoints(spec, folder)
    assert store.owner() == "second"


def test_sigterm_stops_at_a_step_boundary_with_its_own_exit_code(finished, tmp_path):
    recipe, work = finished / "tiny.yaml", tmp_path / "work"
    override = ("--set", "stages.assistant.steps=100000", "--set", "stages.assistant.warmup_steps=10")
    folder = StageFolder(work / "stages" / "assistant")
    process = minilm("run", recipe, "--workdir", work, "--launcher", "inline", *override)
    wait_for(lambda: has_checkpoint(folder.checkpoints, 4), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 3
    assert "minilm: stopped: stage assistant is stopped; the same command goes on" in errors
    assert not (folder.root / "failure.json").exists()


def test_a_work_directory_of_another_recipe_is_refused(finished, tmp_path, capsys):
    work = shutil.copytree(finished / "work", tmp_path / "work")
    command = ["run", str(finished / "tiny.yaml"), "--workdir", str(work), "--set", "stages.small.steps=41"]
    assert main(command) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("minilm: error: work directory")
    assert "stages.small.steps is 40 there and 41 now; --from small does it again" in errors


ELSEWHERE = """
import sys
from minilm.orchestrator import cli
from minilm.orchestrator.system import lease, processes
processes.this_machine, lease.PATIENCE_SECONDS = lambda: "another host", 1.0
sys.exit(cli.main(sys.argv[1:]))
"""


def stop_unlocked(process: subprocess.Popen[str], store: Path) -> None:
    """SIGSTOP, but not while it has the SQLite file: nobody else could read that until it goes on."""
    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with closing(sqlite3.connect(store, timeout=0)) as other, suppress(sqlite3.OperationalError):
            other.execute("BEGIN EXCLUSIVE")
            return
        process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_dead_and_that_one_writes_no_more(finished, tmp_path):
    """The first one's process is another host's, as far as anybody knows; it is stopped, overtaken, and wakes."""
    work = tmp_path / "work"
    folder = StageFolder(work / "stages" / "assistant")
    steps = ("--set", "stages.assistant.steps=100000", "--set", "stages.assistant.warmup_steps=10")
    command = ("run", finished / "tiny.yaml", "--workdir", work, "--launcher", "inline", *steps)
    first = minilm(*command, program=("-c", ELSEWHERE))
    second = None
    try:
        wait_for(folder.heartbeat.exists, first)
        _, errors = run(*command, expect=6)
        assert f"another run works in {work} (process {first.pid} on" in errors
        stop_unlocked(first, work / "mlflow.db")
        second = minilm(*command, program=("-c", ELSEWHERE.replace("another", "a third")))
        wait_for(lambda: read_json(folder.heartbeat)["pid"] == second.pid, second)
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate()
        assert first.returncode == 6
        assert f"another run has taken {work} over" in errors
        second.send_signal(signal.SIGTERM)
        out, errors = second.communicate()
        assert second.returncode == 3, out + errors
        steps = [p.step for p in read_all_metrics(folder.step_metrics)]
        assert steps == list(range(4, 4 * len(steps) + 1, 4))
        assert [json.loads(line)["step"] for line in folder.step_metrics.read_text().splitlines()] == steps
    finally:
        for process in (first, second):
            if process:
                process.kill()
                process.communicate()


def test_a_locked_tracking_store_ends_a_new_run_in_one_line_and_does_not_end_one_that_goes_on(
    tmp_path, monkeypatch, caplog
):
    store = tmp_path / "mlflow.db"

    def opened(wait="0.1"):
        """MLflow keeps its connection to an address, but not to the same file under another one."""
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}?timeout={wait}")
        return Tracking.open(tmp_path, "tiny", name="tiny", params={}, tags={})

    with closing(sqlite3.connect(store)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="MLflow at sqlite.* does not answer .*database is locked"):
            opened()
    run_id = opened().run_id
    with closing(sqlite3.connect(store)) as other:
        other.execute("BEGIN EXCLUSIVE")
        tracking = opened(wait="0.2")
        assert tracking.num_pending == 1 and "database is locked" in caplog.text
    assert tracking.flush(at_once=True) == 0
    assert tracking.client.get_run(run_id).info.status == "RUNNING"


def bad_tokenizer(tmp_path: Path, text: Path, teacher: Path) -> tuple[dict[str, object], str]:
    from tests.conftest import make_teacher

    other = make_teacher(tmp_path / "other", extra_words=("zebra",))
    shutil.copy(teacher / "config.json", other / "config.json")
    data = {"text": str(text), "tokenizer": str(other), "seq_len": 32, "held_out": 0.1}
    return {"data": data}, "the data's vocabulary has"


def missing_text(tmp_path: Path, text: Path, teacher: Path) -> tuple[dict[str, object], str]:
    data = {"text": str(tmp_path / "absent.txt"), "tokenizer": str(teacher), "seq_len": 32}
    return {"data": data}, "absent.txt' does not exist"


def empty_text(tmp_path: Path, text: Path, teacher: Path) -> tuple[dict[str, object], str]:
    empty = tmp_path / "empty.txt"
    empty.touch()
    return {"data": {"text": str(empty), "tokenizer": str(teacher), "seq_len": 32}}, "empty.txt"


def too_long_rows(tmp_path: Path, text: Path, teacher: Path) -> tuple[dict[str, object], str]:
    data = {"text": str(text), "tokenizer": str(teacher), "seq_len": 128, "held_out": 0.1}
    return {"data": data}, "rows are 128 tokens long, the teacher takes at most 64"


@pytest.mark.parametrize("make", [bad_tokenizer, missing_text, empty_text, too_long_rows])
def test_bad_input_is_one_line_and_exit_code_2(make, tmp_path, text, teacher, capsys):
    changes, expected = make(tmp_path, text, teacher)
    recipe = write_recipe(tmp_path, text, teacher, **changes)
    assert main(["run", str(recipe), "--workdir", str(tmp_path / "work"), "--launcher", "inline"]) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("minilm: error:")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in errors
    assert not (tmp_path / "work" / "stages").exists() or not list((tmp_path / "work").rglob("*.safetensors"))


def test_a_flipped_bit_in_a_shard_ends_the_run_naming_the_shard(finished, tmp_path, capsys):
    recipe, work = finished / "tiny.yaml", tmp_path / "work"
    shutil.copytree(finished / "work" / "data", work / "data")
    shard = next((work / "data").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[8192] ^= 1
    shard.write_bytes(content)
    assert main(["run", str(recipe), "--workdir", str(work), "--launcher", "inline"]) == 2
    errors = capsys.readouterr().err
    assert shard.name in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(finished, tmp_path):
    """A real full file system: a small tmpfs holds the stages."""
    work = tmp_path / "work"
    stages = work / "stages"
    stages.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(stages)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        _, errors = run("run", finished / "tiny.yaml", "--workdir", work, "--launcher", "inline", expect=2)
        assert "minilm: error: stage assistant: no space left on the disk of" in errors
        assert "Traceback" not in errors
        assert not list(stages.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(stages)], check=True)
