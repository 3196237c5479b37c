"""The stages of a recipe in order: what is done already, what runs now, what its students are called afterwards.

This is the driver: it prepares inputs, starts each stage's workers (launch), shows their progress, feeds tracking
from the metrics files, publishes the students, and writes the summary. It holds no training state: whenever it dies,
the same command finds the data built, the stages done and the newest checkpoint, and goes on.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from minilm.data.format.manifest import MANIFEST
from minilm.model.export import weights_digest
from minilm.orchestrator.driver.made_starts import with_made_starts
from minilm.orchestrator.driver.preflight import check_checkpoints, check_device
from minilm.orchestrator.driver.prepare_data import prepare_data
from minilm.orchestrator.driver.status_line import StageProgress, StatusLine, build_reporter, say_built
from minilm.orchestrator.driver.summary import ModelEntry, Summary, gains, gains_text
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import InfrastructureError, RecipeErrors, Stopped
from minilm.orchestrator.evaluation.check_data import data_fingerprint
from minilm.orchestrator.evaluation.probes.catalogue import PROBES
from minilm.orchestrator.evaluation.tasks import TASKS
from minilm.orchestrator.launch.attempt import begin_attempt, check_outcome
from minilm.orchestrator.launch.base import Launcher
from minilm.orchestrator.launch.liveness import Heartbeats
from minilm.orchestrator.recipe.references import parse_reference
from minilm.orchestrator.recipe.schema import Recipe, trunk_fields
from minilm.orchestrator.resolve.evaluation import evaluation_problems, other_rows, probe_problems
from minilm.orchestrator.resolve.folders import model_folder
from minilm.orchestrator.resolve.licences import licence_notes
from minilm.orchestrator.resolve.stages import (
    ResolvedStage,
    check_data,
    position_notes,
    resolve,
    start_notes,
)
from minilm.orchestrator.resolve.starts import other_vocabulary
from minilm.orchestrator.stage.data import DataSpec
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import ProbeSpec, StageSpec, StudentSpec, UntilSpec, grouped
from minilm.orchestrator.system.files import read_json, sha256_json, write_json
from minilm.orchestrator.system.lease import Lease
from minilm.orchestrator.system.signals import StopRequest
from minilm.orchestrator.tracking.registry import check_rights
from minilm.orchestrator.tracking.tracking import Tracking

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25


def run_recipe(
    recipe: Recipe,
    recipe_file: Path,
    workdir: Workdir,
    lease: Lease,
    launcher: Launcher,
    stop: StopRequest,
    line: StatusLine,
    *,
    redo_from: str | None = None,
    whole: str = "",
) -> Summary:
    """Run every stage that is not done, and return the summary of the whole curriculum.

    The caller holds `lease`, from `workdir.claim`, and closes `launcher`. `redo_from`: as it was claimed. `whole`: the
    recipe with all its values, to be written into the work directory. Raises `Stopped` after SIGINT or
    SIGTERM, `UserError` for bad input, `InfrastructureError` when the workers kept dying.
    """
    began = time.monotonic()
    with closing(line):
        line.show("looking at teachers and data", force=True)

        def fetch(reference: str) -> str:
            folder = str(model_folder(parse_reference(reference), workdir, recipe))
            log.info("%s is taken from %s", reference, folder)
            return folder

        if launcher.is_here:
            check_device(recipe.compute)
        check_checkpoints(recipe.compute, workdir.root)
        # where a run goes on, the weights were sound, and the driver needs no modelling code (seconds to import)
        weights, built = not workdir.goes_on(recipe), (workdir.data / MANIFEST).exists()
        stages, problems = resolve(recipe, fetch, built=built, weights=weights)
        problems = problems or evaluation_problems(recipe, running=True, rows=False)
        problems = problems or probe_problems(recipe, running=True, rows=False)
        if not problems:
            data = prepare_data(recipe, workdir, fetch, build_reporter(line, stop), partial(say_built, line))
            problems = check_data(stages, data.seq_len, data.vocabulary, data.tokenizer, data.packing)
        if problems:
            raise RecipeErrors([f"{recipe_file}: {problem}" for problem in problems])
        licences = licence_notes(recipe, stages)
        notes = [*position_notes(stages, data.seq_len), *start_notes(stages, data.tokenizer)]
        for note in [*notes, *licences]:
            line.say(note)
        workdir.adopt(recipe, recipe_file, data, redo_from, whole)
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
        tracking.datasets(inputs_of(data))
        driver = Driver(recipe, workdir, lease, data, tuple(stages), licences, tracking, launcher, line, stop)
        try:
            driver.check_rights()
            models = [entry for number in range(len(recipe.stages)) for entry in driver.run_stage(number)]
            students = {entry.name for entry in models if entry.registered}
            shown = [e for e in models if e.registered or e.name not in students]
            if not workdir.is_wound_up(recipe):
                from minilm.orchestrator.driver.wind_up import wind_up  # modelling code

                wind_up(recipe, workdir, shown, licences, launcher, tracking, line)
        except Stopped:
            tracking.finish("KILLED")
            raise
        except BaseException:
            tracking.finish("FAILED")
            raise
        tracking.finish()
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


def inputs_of(data: DataSpec) -> list[tuple[str, str, str, dict[str, Any]]]:
    """The data sets as MLflow lists inputs: (name, fingerprint, place, what else is known)."""
    return [
        (corpus.name, corpus.fingerprint, corpus.place, {"seq_len": data.seq_len, "weight": corpus.weight})
        for corpus in data.corpora
    ]


@dataclass
class Driver:
    """What the stages of one run have in common."""

    recipe: Recipe
    workdir: Workdir
    lease: Lease
    data: DataSpec
    stages: tuple[ResolvedStage, ...]
    licences: list[str]
    tracking: Tracking
    launcher: Launcher
    line: StatusLine
    stop: StopRequest

    def check_rights(self) -> None:
        """Raises `UserError` where a student that is left to train may not be registered; MLflow may be away."""
        stages = [
            stage for stage in self.recipe.stages if not self.workdir.stage(stage.name).published.exists()
        ]
        names = [self.recipe.registered_name(student.name) for stage in stages for student in stage.students]
        if not self.tracking.num_pending:
            with suppress(InfrastructureError):
                check_rights(self.tracking.uri, names, patience_seconds=0.0)

    def run_stage(self, number: int) -> list[ModelEntry]:
        """Train and publish stage `number` (0-based) unless that is done; its teacher and students for the summary."""
        stage = self.recipe.stages[number]
        label = f"[{number + 1}/{len(self.recipe.stages)}] {stage.name}"
        spec = self.make_spec(self.stages[number])
        folder = self.workdir.stage(stage.name)
        published = read_json(folder.published)
        if published is not None and published["digest"] == spec.digest:
            self.line.say(f"{label}  done before", stage=stage.name)
            return [ModelEntry(**model) for model in published["models"]]

        def show(text: str) -> None:
            self.line.show(f"{label}  {text}", force=True, stage=stage.name, doing="publishing")

        run = self.tracking.stage(stage.name, {"stage": stage.model_dump(mode="json"), "digest": spec.digest})
        self.tracking.datasets(inputs_of(self.data), stage.name)
        run.follow([folder.step_metrics, folder.heldout_metrics, folder.system_metrics])
        try:
            done = read_json(folder.done)
            if done is None or done["digest"] != spec.digest:
                self.train(spec, label)
            self.lease.check()
            show("loading teacher and students")
            steps = json.loads(folder.done.read_text(encoding="utf-8"))["steps"]
            spec = replace(spec, steps=steps)  # with `until`, perhaps fewer than the recipe allows
            # here: the driver needs no modelling code (seconds to import) before a stage is trained
            from minilm.orchestrator.driver.publish import publish

            entries = publish(self.recipe, spec, folder, self.licences, self.tracking, run, show)
        except BaseException as error:
            run.finish("KILLED" if isinstance(error, Stopped) else "FAILED")
            raise
        learned = gains(
            read_all_metrics(folder.heldout_metrics), [student.name for student in stage.students]
        )
        self.line.say(
            f"{label}  {steps} steps: {gains_text(learned)}",
            event="learned",
            stage=stage.name,
            steps=steps,
            students={name: gain._asdict() for name, gain in learned.items()},
        )
        return entries

    def make_spec(self, resolved: ResolvedStage) -> StageSpec:
        """The stage as plain values. Its digest covers data, teacher weights and all that determines the result."""
        recipe, compute, stage = self.recipe, self.recipe.compute, resolved.stage
        teacher = model_folder(recipe.teacher_ref(stage), self.workdir, recipe)
        teacher_digest = weights_digest(teacher)
        fields = stage.result_fields()
        sizes = resolved.students
        until = None
        if stage.until:
            until = UntilSpec(every=stage.every(stage.until.probe) or 0, **stage.until.model_dump())
            for item in stage.evaluate:
                if item.probe == until.probe and item.data:
                    task, place = TASKS.get(PROBES[item.probe].task), Path(item.data)
                    fields["until"]["data"] = (
                        data_fingerprint(task, place) if task else other_rows(place).fingerprint
                    )
        references = {student["name"]: student["init"] for student in fields["students"]}
        folders = {
            student.name: str(
                model_folder(parse_reference(student.starts_from, recipe.student_names), self.workdir, recipe)
            )
            for student in stage.students
            if student.starts_from
        }
        starts = {name: weights_digest(Path(folder)) for name, folder in folders.items()}
        fields["students"] = [
            s | {"ffn": sizes[s["name"]].ffn, "init": starts.get(s["name"], s["init"])}
            for s in fields["students"]
        ]
        fields["teacher"], teacher_name = teacher_digest, fields["teacher"]
        trunk = trunk_fields(fields)
        inputs: dict[str, Any] = {
            "stage": fields,
            "seed": recipe.seed,
            "precision": compute.precision,
            "data": [self.data.fingerprint, self.data.window],
        }
        if resolved.teacher_layout is not None:
            inputs["vectors"] = asdict(resolved.teacher_layout)
        if moved := {
            name: match.rows
            for name, start in resolved.starts.items()
            if stage.objective == "embedding"
            and (match := other_vocabulary(start, self.data.tokenizer, sizes[name].vocab_size))
        }:
            inputs["tokens"] = moved
        return StageSpec(
            stage=stage.name,
            folder=str(self.workdir.stage(stage.name).root.resolve()),
            data=self.data,
            teacher=str(teacher),
            teacher_name=teacher_name,
            teacher_digest=teacher_digest,
            teacher_layer=stage.teacher_layer,
            students=tuple(
                StudentSpec(
                    name=student.name,
                    layers=student.layers,
                    hidden=student.hidden,
                    heads=sizes[student.name].heads,
                    ffn=sizes[student.name].ffn,
                    dropout=student.dropout,
                    init=references[student.name],
                    start_share=student.start_share,
                    positions=student.positions,
                    start=folders.get(student.name, ""),
                    start_digest=starts.get(student.name, ""),
                )
                for student in stage.students
            ),
            objective=stage.objective_fields(),
            seed=recipe.seed,
            batch=stage.batch,
            micro_batch=stage.micro_batch,
            steps=stage.steps,
            evaluate=tuple(
                ProbeSpec(item.probe, stage.every(item.probe), item.data or "") for item in stage.evaluate
            ),
            until=until,
            checkpoints=compute.checkpoints and f"{compute.checkpoints}/{recipe.name}/{stage.name}",
            **grouped(recipe.tracking.model_dump() | compute.model_dump() | stage.model_dump()),
            digest=sha256_json(inputs),
            trunk=sha256_json(inputs | {"stage": trunk}) if trunk else "",
        )

    def train(self, spec: StageSpec, label: str) -> None:
        """Run the stage's workers until it is done. Raises `Stopped`, `UserError` or `InfrastructureError`."""

        def show(text: str, force: bool) -> None:
            self.line.show(f"{label}  {text}", force=force, stage=spec.stage, doing="starting")

        if self.stop.requested:
            raise Stopped("stopped before the stage began; the same command goes on from here")
        self.launcher.prepare(show)
        folder = self.workdir.stage(spec.stage)
        spec = replace(spec, attempt=f"{spec.stage}-{uuid.uuid4().hex[:12]}", lease=str(self.lease.path))
        spec = self.launcher.allocate(spec, show)
        spec = with_made_starts(spec, lambda text: show(text, True))
        begin_attempt(spec, folder)
        future = self.launcher.start(spec)
        try:
            self.watch(future, spec, label)
        except BaseException:
            with suppress(OSError):  # a full disk
                folder.stop_request.touch()
            self.launcher.abandon(spec)
            wait([future])
            raise
        self.lease.check()
        self.line.close()
        folder.stop_request.unlink(missing_ok=True)
        check_outcome(spec, folder, future, self.launcher)

    def watch(self, future: Future[None], spec: StageSpec, label: str) -> None:
        """Show progress until the workers have ended, pass a request to stop on to them, and look after silent ones."""
        folder = StageFolder(Path(spec.folder))
        progress, beats = StageProgress(self.line, spec, label), Heartbeats(spec)
        supervise = self.launcher.supervise(spec, beats, self.line.warn)
        while wait([future], timeout=POLL_SECONDS).not_done:
            beats.poll()
            with suppress(OSError):  # storage that does not answer, or is full, for a moment
                self.lease.check()
                if self.stop.requested and not folder.stop_request.exists():
                    folder.stop_request.touch()
            progress.show(beats.newest, supervise(self.stop.requested))
