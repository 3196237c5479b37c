"""Invariants of a finished run with faults: it agrees with its data, with MLflow and with a run without faults.

Each check returns the problems that it found, a line each; an empty list means that the invariant holds.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from minilm.model.export import weights_digest
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.checkpoint.store import step_of
from minilm.orchestrator.driver.verify_run import verify_run
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.recipe.schema import Recipe, Stage
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import Point, read_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json

Problems = list[str]


def check_round(recipe: Recipe, work: Workdir, reference: Workdir, server: str) -> dict[str, Problems]:
    """All checks of the finished run in `work`, by name. reference: the run without faults. server: its MLflow."""
    found: dict[str, Problems] = {}
    for stage in recipe.stages:
        folder, model = work.stage(stage.name), reference.stage(stage.name)
        checks = {
            "rows": rows(folder),
            "metrics": metrics(recipe, stage, folder, model),
            "MLflow": tracked(work, stage.name, folder, server),
            "weights": weights(stage, folder, model),
            "teacher": teacher(folder),
            "tidiness": tidiness(recipe, folder),
        }
        for name, problems in checks.items():
            found.setdefault(name, []).extend(f"stage {stage.name}: {problem}" for problem in problems)
    found["MLflow"] += runs_and_versions(recipe, work, server)
    return found


def rows(folder: StageFolder) -> Problems:
    """The ledgers of the last checkpoint and of `done.json` are the ones recomputed: no row was lost or doubled."""
    spec = StageSpec.from_json(folder.spec.read_text(encoding="utf-8"))
    last = LocalStore(folder.checkpoints).names()[-1]
    check = verify_run(folder.checkpoints / last)
    done = read_json(folder.done)
    problems = [] if check.sound else [check.text()]
    if check.step != spec.steps or done is None or done["ledger"] != check.expected:
        problems.append(f"done.json says {done}, {last} recomputes to {check.expected}")
    return problems


def metrics(recipe: Recipe, stage: Stage, folder: StageFolder, reference: StageFolder) -> Problems:
    """Both metrics files have each step that they should have, once and in order, with every metric."""
    every, steps = recipe.tracking.log_every, stage.steps
    expected = sorted({*range(every, steps + 1, every), steps})
    heldout = sorted(
        {0, *(range(stage.eval_every, steps + 1, stage.eval_every) if stage.eval_every else ()), steps}
    )
    problems = []
    for path, wanted, other in (
        (folder.step_metrics, expected, reference.step_metrics),
        (folder.heldout_metrics, heldout, reference.heldout_metrics),
    ):
        have, without_faults = every_line(path), every_line(other)
        problems += differences(path.name, [p.step for p in have], wanted)
        names = {name for point in without_faults for name in point.metrics}
        problems += [
            f"{path.name}: step {p.step} lacks {sorted(names - p.metrics.keys())}"
            for p in have
            if names - p.metrics.keys()
        ]
    return problems


def tracked(work: Workdir, name: str, folder: StageFolder, server: str) -> Problems:
    """MLflow has every value of the metrics files once, and no other."""
    from minilm.orchestrator.tracking.client import connect

    expected: dict[str, list[tuple[int, float]]] = defaultdict(list)
    files = (folder.step_metrics, folder.heldout_metrics, folder.system_metrics)
    for point in (point for file in files for point in every_line(file)):
        for metric, value in point.metrics.items():
            expected[metric].append((point.step, value))
    client = connect(server)
    run = client.get_run(tracking_state(work)["runs"][name])
    problems = [] if run.info.status == "FINISHED" else [f"its MLflow run is {run.info.status}"]
    if unknown := run.data.metrics.keys() - expected.keys():
        problems.append(f"MLflow has metrics that no metrics file has: {sorted(unknown)}")
    for metric, wanted in expected.items():
        have = sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric))
        steps = differences(f"MLflow's {metric}", [step for step, _ in have], [step for step, _ in wanted])
        problems += steps or ([] if have == sorted(wanted) else [f"MLflow's {metric} has other values"])
    return problems


def runs_and_versions(recipe: Recipe, work: Workdir, server: str) -> Problems:
    """MLflow has one run for the recipe, one for each stage, and one registered version for each student."""
    from minilm.orchestrator.tracking.client import connect

    client, state = connect(server), tracking_state(work)
    runs = client.search_runs([state["experiment_id"]], f"tags.`minilm.workdir` = '{state['key']}'")
    problems = []
    if sorted(r.info.run_id for r in runs) != sorted(state["runs"].values()):
        problems.append(f"{len(runs)} MLflow runs instead of {1 + len(recipe.stages)}")
    if unfinished := [r.info.run_name for r in runs if r.info.status != "FINISHED"]:
        problems.append(f"MLflow runs that are not FINISHED: {unfinished}")
    for stage in recipe.stages:
        for student in stage.students:
            versions = client.search_model_versions(f"name = '{recipe.name}-{student.name}'")
            own = [v for v in versions if v.run_id == state["runs"][stage.name]]
            if len(own) != 1:
                problems.append(f"student {student.name} is registered {len(own)} times")
    return problems


def weights(stage: Stage, folder: StageFolder, reference: StageFolder) -> Problems:
    """Every student has the same bits as in the run without faults."""
    problems = []
    for student in stage.students:
        have, wanted = (weights_digest(f.student(student.name)) for f in (folder, reference))
        if have != wanted:
            problems.append(f"weights of {student.name} are {have[:12]}, without faults {wanted[:12]}")
    return problems


def teacher(folder: StageFolder) -> Problems:
    """The teacher has the same bits as before the stage."""
    spec = StageSpec.from_json(folder.spec.read_text(encoding="utf-8"))
    same = weights_digest(Path(spec.teacher)) == spec.teacher_digest
    return [] if same else [f"the weights of teacher {spec.teacher} have changed"]


def tidiness(recipe: Recipe, folder: StageFolder) -> Problems:
    """No half-written file is left over, and no more checkpoints than the recipe keeps."""
    left = [path.name for path in folder.root.rglob(".*.tmp")]
    problems = [f"left behind: {left}"] if left else []
    kept, every = LocalStore(folder.checkpoints).names(), recipe.compute.keep_every_steps
    newest = [name for name in kept if every is None or step_of(name) % every]
    if len(newest) > recipe.compute.keep_checkpoints:
        problems.append(f"{len(newest)} checkpoints instead of {recipe.compute.keep_checkpoints}")
    return problems


def every_line(path: Path) -> list[Point]:
    """All points of a metrics file in its order, doubled ones included."""
    found: list[Point] = []
    offset = 0
    while True:
        new, end = read_metrics(path, offset)
        found += new
        if end == offset:
            return found
        offset = end


def differences(what: str, have: list[int], wanted: list[int]) -> Problems:
    if have == wanted:
        return []
    doubled = sorted({step for step in have if have.count(step) > 1})
    lost, extra = sorted(set(wanted) - set(have)), sorted(set(have) - set(wanted))
    return [
        f"{what}: steps lost {lost[:5]} ({len(lost)}), doubled {doubled[:5]} ({len(doubled)}), extra {extra[:5]}"
    ]


def tracking_state(work: Workdir) -> dict:
    return read_json(work.root / "tracking.json") or {}


def median_step_seconds(reference: StageFolder, batch: int) -> float:
    """Seconds a step in the run without faults, from the speeds that it logged."""
    return batch / statistics.median(p.metrics["rows_per_second"] for p in every_line(reference.step_metrics))
