"""The stages of a recipe in order: what is done already, what runs now, what its students are called afterwards.

This is the driver: it prepares inputs, starts each stage's workers (launch), shows their progress, feeds tracking
from the points files, publishes the students, and writes the summary. It holds no training state: whenever it dies,
the same command finds the data built, the stages done and the newest checkpoint, and goes on.
"""

from __future__ import annotations

import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from minilm.model.export import weights_digest
from minilm.orchestrator.driver.prepare_data import prepare_data
from minilm.orchestrator.driver.status_line import Line, StageProgress, build_reporter
from minilm.orchestrator.driver.summary import ModelEntry, Summary
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import Stopped, UserError
from minilm.orchestrator.launch import resources as places
from minilm.orchestrator.launch import trainer as launch
from minilm.orchestrator.launch.attempt import begin_attempt, check_outcome
from minilm.orchestrator.launch.cluster import Cluster
from minilm.orchestrator.launch.liveness import Heartbeats, Supervisor
from minilm.orchestrator.recipe.schema import Recipe, Stage
from minilm.orchestrator.resolve.compatibility import check_stage, check_stages, students_shapes
from minilm.orchestrator.resolve.folders import model_folder
from minilm.orchestrator.stage.data import DataSpec
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.system.files import read_json, sha256_json, write_json
from minilm.orchestrator.system.lease import Lease
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.tracking.tracking import Tracking

POLL_SECONDS = 0.25


def run_recipe(
    recipe: Recipe,
    recipe_file: Path,
    workdir: Workdir,
    lease: Lease,
    cluster: Cluster | None,
    stop: StopRequest,
    *,
    redo_from: str | None = None,
) -> Summary:
    """Run every stage that is not done, and return the summary of the whole curriculum.

    The caller holds `lease`, from `workdir.claim`, and leaves `cluster`; None for the same worker in this process.
    `redo_from`: as it was claimed. Raises `Stopped` after SIGINT or SIGTERM, `UserError` for bad input,
    `InfrastructureError` when the workers kept dying.
    """
    began = time.monotonic()
    with closing(Line()) as line:
        data = prepare_data(recipe, workdir, build_reporter(line, stop))
        check_stages(recipe, workdir, data)
        workdir.adopt(recipe, recipe_file, data, redo_from)
        line.show("opening the tracking store", force=True)
        tracking = Tracking.open(
            workdir.root,
            recipe.tracking.experiment,
            name=recipe.name,
            params=recipe.model_dump(mode="json"),
            tags={
                "minilm.data_fingerprint": data.fingerprint,
                "minilm.data": data.places,
                "minilm.recipe_digest": sha256_json(recipe.result_fields()),
            },
            recipe_file=recipe_file,
        )
        driver = Driver(recipe, workdir, lease, data, tracking, cluster, line, stop)
        try:
            models = [entry for number in range(len(recipe.stages)) for entry in driver.run_stage(number)]
            driver.withdraw_reservations()
        except Stopped:
            tracking.finish("KILLED")
            raise
        except BaseException:
            tracking.finish("FAILED")
            raise
        tracking.finish()
        students = {entry.name for entry in models if entry.registered}
        shown = [e for e in models if e.registered or e.name not in students]
        summary = Summary(
            recipe=recipe.name,
            models=tuple(shown),
            seconds=time.monotonic() - began,
            look=tracking.look,
            workdir=str(workdir.root),
            alias=recipe.tracking.alias,
        )
        write_json(workdir.summary, summary.to_json())
        return summary


@dataclass
class Driver:
    """What the stages of one run have in common."""

    recipe: Recipe
    workdir: Workdir
    lease: Lease
    data: DataSpec
    tracking: Tracking
    cluster: Cluster | None
    line: Line
    stop: StopRequest

    def run_stage(self, number: int) -> list[ModelEntry]:
        """Train and publish stage `number` (0-based) unless that is done; its teacher and students for the summary."""
        stage = self.recipe.stages[number]
        label = f"[{number + 1}/{len(self.recipe.stages)}] {stage.name}"
        spec = self.make_spec(stage)
        folder = self.workdir.stage(stage.name)
        published = read_json(folder.published)
        if published is not None and published["digest"] == spec.digest:
            self.line.say(f"{label}  done before")
            return [ModelEntry(**model) for model in published["models"]]
        run = self.tracking.stage(stage.name, {"stage": stage.model_dump(mode="json"), "digest": spec.digest})
        run.follow([folder.points, folder.heldout_metrics])
        try:
            done = read_json(folder.done)
            if done is None or done["digest"] != spec.digest:
                self.train(spec, label)
            self.line.show(f"{label}  registering and drawing", force=True)
            self.lease.check()
            # here: the driver needs no modelling code (seconds to import) before a stage is trained
            from minilm.orchestrator.driver.publish import publish

            return publish(self.recipe, spec, folder, self.tracking, run)
        except BaseException as error:
            run.finish("KILLED" if isinstance(error, Stopped) else "FAILED")
            raise

    def make_spec(self, stage: Stage) -> StageSpec:
        """The stage as plain values. Its digest covers data, teacher weights and all that determines the result."""
        recipe, compute = self.recipe, self.recipe.compute
        teacher = model_folder(stage.teacher_ref, recipe, self.workdir)
        shape = check_stage(stage, teacher, self.data)
        teacher_digest = weights_digest(teacher)
        fields = stage.result_fields()
        sizes = students_shapes(stage, shape)
        fields["students"] = [s | {"ffn": sizes[s["name"]].ffn} for s in fields["students"]]
        inputs = {
            "stage": fields | {"teacher": teacher_digest},
            "seed": recipe.seed,
            "precision": compute.precision,
            "data": [self.data.fingerprint, self.data.window],
        }
        return StageSpec(
            stage=stage.name,
            folder=str(self.workdir.stage(stage.name).root.resolve()),
            data=self.data,
            teacher=str(teacher),
            teacher_name=fields["teacher"],
            teacher_digest=teacher_digest,
            teacher_layer=stage.teacher_layer,
            students=tuple(
                StudentSpec(
                    s.name, s.layers, s.hidden, sizes[s.name].heads, sizes[s.name].ffn, s.dropout, s.init
                )
                for s in stage.students
            ),
            objective=stage.objective_fields(),
            seed=recipe.seed,
            batch=stage.batch,
            micro_batch=stage.micro_batch,
            steps=stage.steps,
            peak_lr=stage.peak_lr,
            warmup_steps=stage.warmup_steps,
            schedule=stage.schedule,
            adam_betas=stage.adam_betas,
            adam_eps=stage.adam_eps,
            weight_decay=stage.weight_decay,
            max_gradient_norm=stage.max_gradient_norm,
            eval_every=stage.eval_every,
            held_out_rows=stage.held_out_rows,
            log_every=recipe.tracking.log_every,
            per_head=recipe.tracking.per_head,
            device=compute.device,
            precision=compute.precision,
            threads=compute.threads,
            checkpoint_every_steps=compute.checkpoint_every_steps,
            checkpoint_every_seconds=compute.checkpoint_every_seconds,
            keep_checkpoints=compute.keep_checkpoints,
            keep_every_steps=compute.keep_every_steps,
            checkpoints=compute.checkpoints and f"{compute.checkpoints}/{recipe.name}/{stage.name}",
            reduction=compute.reduction,
            on_nonfinite=compute.on_nonfinite,
            max_skipped_steps=compute.max_skipped_steps,
            stall_seconds=compute.stall_seconds,
            digest=sha256_json(inputs),
        )

    def train(self, spec: StageSpec, label: str) -> None:
        """Run the stage's workers until it is done. Raises `Stopped`, `UserError` or `InfrastructureError`."""
        self.connect()
        folder = self.workdir.stage(spec.stage)
        spec = replace(spec, attempt=f"{spec.stage}-{uuid.uuid4().hex[:12]}", lease=str(self.lease.path))
        place = ""
        if self.cluster:
            place = places.wait_for_places(
                self.recipe.compute.device,
                self.recipe.compute.workers[0],
                wait_seconds=self.recipe.compute.wait_seconds,
                grows=self.cluster.is_joined,
                stop=self.stop,
                show=lambda text, force: self.line.show(f"{label}  {text}", force=force),
            )
        if place:  # decided once, so that no worker takes a GPU that Ray has not given it
            spec = replace(spec, device="cuda" if place == "GPU" else "cpu")
        begin_attempt(spec, folder)
        with ThreadPoolExecutor(1, thread_name_prefix="launcher") as pool:
            if self.cluster:
                workers, joined = self.recipe.compute.workers, self.cluster.is_joined
                future = launch.start_ray(spec, workers, place, pool, joined=joined)
            else:
                future = launch.start_inline(spec, pool)
            try:
                self.watch(future, spec, label, place)
            except BaseException:
                with suppress(OSError):  # a full disk
                    folder.stop_request.touch()  # the pool waits for the workers: let them end
                if self.cluster:  # or they are not there to end: then `fit` ends with an error
                    launch.cancel_reservations(folder.root)
                    self.cluster.leave()
                raise
        self.lease.check()
        self.line.close()
        folder.stop_request.unlink(missing_ok=True)
        check_outcome(spec, folder, future, inline=self.cluster is None)

    def watch(self, future: Future[None], spec: StageSpec, label: str, place: str) -> None:
        """Show progress until the workers have ended, pass a request to stop on to them, and look after silent ones."""
        folder, progress, beats = (
            StageFolder(Path(spec.folder)),
            StageProgress(self.line, spec, label),
            Heartbeats(spec),
        )
        supervise = Supervisor(
            spec,
            beats,
            wait_seconds=self.recipe.compute.wait_seconds,
            end=launch.end_worker,
            lacking=lambda: places.lacking(place, self.recipe.compute.workers[0]),
            say=self.line.say,
        )
        while wait([future], timeout=POLL_SECONDS).not_done:
            beats.look()
            with suppress(OSError):  # storage that does not answer, or is full, for a moment
                self.lease.check()
                if self.stop.requested and not folder.stop_request.exists():
                    folder.stop_request.touch()
            # inline, the worker's own watchdog ends this very process
            progress.show(beats.newest, supervise(self.stop.requested) if place else "")

    def connect(self) -> None:
        """Join or start the Ray cluster before the first stage that needs it."""
        if self.stop.requested:
            raise Stopped("stopped before the stage began; the same command goes on from here")
        if self.cluster and not self.cluster.connected:
            self.line.show("starting Ray", force=True)
            self.cluster.connect(self.stop)

    def withdraw_reservations(self) -> None:
        """Of a dead driver, where no stage was left to do it: another run on the cluster would wait for them."""
        folder = self.workdir.stage(self.recipe.stages[-1].name).root
        if self.cluster and self.cluster.is_joined and launch.reservations(folder):
            with suppress(UserError):  # a cluster that is gone has none
                self.connect()
                launch.cancel_reservations(folder)
