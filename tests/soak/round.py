"""One round of a soak: a run from beginning to end with faults injected on its way, counted in the report.

The progress of the run is read from its own small files, which no fault damages.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.system.files import read_json
from minilm.orchestrator.worker.crash_loop import reached
from tests.soak.faults import Fault
from tests.soak.invariants import median_step_seconds
from tests.soak.report import Recovery, Report, last_line, say
from tests.soak.testbed import Testbed

POLL_SECONDS = 0.05
NO_EFFECT_SECONDS = 20.0  # a run that went on for this long was not affected by the fault
NO_EFFECT_SECONDS_ADDED = 60.0  # Ray looks for new nodes every few seconds, and may leave one unused
VICTIM_SECONDS = 20.0
ENDING_SECONDS = 15.0  # from a failed save to the end of `minilm run`
MAX_BAD_ENDS = 3
BEGAN = re.compile(r"stage \S+: (?:resumes at step (\d+)|starts)")


class Progress:
    """The progress of a run, read from its small files.

    stage: number of stages done. step: of the current one. attempts: begun so far. resumed: the step at which the last
    attempt began. repeated: steps computed again, in all attempts together.
    """

    def __init__(self, recipe: Recipe, work: Workdir):
        self.stages = [work.stage(stage.name) for stage in recipe.stages]
        self.stage = self.step = self.attempts = self.resumed = self.repeated = 0
        self.last_change = time.monotonic()
        self._offset = 0

    @property
    def folder(self) -> Any:
        return self.stages[min(self.stage, len(self.stages) - 1)]

    def update(self) -> None:
        before = (self.stage, self.step, self.attempts)
        while self.stage < len(self.stages) and self.folder.published.exists():
            self.stage, self.step, self._offset = self.stage + 1, 0, 0
        if self.stage < len(self.stages):
            self._read_log()
            # never less: a new attempt resets the file just before it logs where it resumes
            self.step = max(self.step, reached(self.folder.root))
        if before != (self.stage, self.step, self.attempts):
            self.last_change = time.monotonic()

    def _read_log(self) -> None:
        try:
            with self.folder.worker_log(0).open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for found in BEGAN.finditer(whole.decode(errors="replace")):
            self.attempts, self.resumed = self.attempts + 1, int(found[1] or 0)
            self.repeated += max(0, self.step - self.resumed)
            self.step = self.resumed


@dataclass
class PendingRecovery:
    """A fault that the run has not recovered from yet, with the progress at that moment."""

    kind: str
    at: float
    stage: int
    step: int
    attempts: int
    repeated: int
    alone: bool = True


class Round:
    """One run of the recipe from beginning to end, with `faults` injected."""

    def __init__(
        self,
        recipe: Recipe,
        work: Workdir,
        testbed: Testbed,
        faults: Iterator[Fault],
        report: Report,
        reference: Workdir,
        hang_seconds: float,
    ):
        self.recipe, self.work, self.testbed, self.faults, self.report = recipe, work, testbed, faults, report
        self.hang_seconds = hang_seconds
        self.step_seconds = [
            median_step_seconds(reference.stage(stage.name), stage.batch) for stage in recipe.stages
        ]
        self.progress = Progress(recipe, work)
        self.pending: PendingRecovery | None = None
        self.since = self.last_fault = time.monotonic()
        self.due_since: float | None = None  # since when the next fault looks for a victim
        self.full_until = 0.0  # until then a full disk may end the run, even if it made steps again
        self.bad_ends = 0
        for name in ("ends", "hangs"):
            report.problems[name] += []

    def run(self, deadline: float) -> bool:
        """Play the round. True if the run came to its end."""
        began = time.monotonic()
        self.testbed.end_faults()
        self.start()
        fault = next(self.faults, None)
        while True:
            time.sleep(POLL_SECONDS)
            self.testbed.tick()
            self.progress.update()
            self.check_recovery()
            code = self.testbed.driver.poll() if self.testbed.driver else 1
            if code == 0:
                break
            if code is not None and not self.go_on(code):
                return False
            if time.monotonic() - self.progress.last_change > self.hang_seconds:
                self.hang()
            if fault and time.monotonic() < deadline and self.is_due(fault):
                self.due_since = self.due_since or time.monotonic()
                if self.inject(fault):
                    fault, self.due_since = next(self.faults, None), None
        wall = time.monotonic() - began
        self.report.wall += wall
        self.report.steps += sum(stage.steps for stage in self.recipe.stages)
        self.report.useful += sum(
            stage.steps * seconds
            for stage, seconds in zip(self.recipe.stages, self.step_seconds, strict=True)
        )
        return self.repeat()

    def start(self) -> None:
        self.testbed.start_driver()
        self.progress.last_change = time.monotonic()

    def repeat(self) -> bool:
        """Run the same command on the finished run, which sends MLflow what is left and changes nothing else."""
        self.testbed.end_faults()
        if left := self.testbed.kill_stopped():
            self.report.problems["ends"].append(f"{left} stopped workers were never replaced")
        self.start()
        code = self.testbed.driver.wait(self.hang_seconds) if self.testbed.driver else None
        if code:
            self.report.problems["ends"].append(
                f"the finished run, repeated, ended with {code}; {last_line(self.testbed.log)}"
            )
        return not code

    def check_recovery(self) -> None:
        """Count a recovery once a new attempt made a step or a stage ended; else, after a while, no effect."""
        pending, now, progress = self.pending, time.monotonic(), self.progress
        if pending is None:
            return
        new_attempt = progress.attempts > pending.attempts and progress.step > progress.resumed
        if new_attempt or progress.stage > pending.stage:
            repeated, seconds = progress.repeated - pending.repeated, now - pending.at
            lost = seconds + repeated * self.step_seconds[pending.stage]
            self.report.recoveries.append(Recovery(pending.kind, seconds, repeated, lost, pending.alone))
            say(f"    recovered after {seconds:.1f} s, {repeated} steps again")
        elif (
            progress.attempts == pending.attempts
            and pending.kind != "driver"  # workers may run on until the next driver takes over
            and now - pending.at
            > (NO_EFFECT_SECONDS_ADDED if pending.kind == "node added" else NO_EFFECT_SECONDS)
            and now - progress.last_change < 1
            and progress.step > pending.step + 1
        ):
            self.report.without_effect[pending.kind] += 1
            say("    without effect")
        else:
            return
        self.pending = None

    def is_due(self, fault: Fault) -> bool:
        now = time.monotonic()
        if fault.hasty:
            return now - self.last_fault >= fault.pause
        making_steps = self.progress.step > self.progress.resumed and now - self.progress.last_change < 1
        if self.pending is not None or not making_steps:
            self.since = now
        return now - self.since >= fault.pause

    def inject(self, fault: Fault) -> bool:
        """Inject the fault and count it. False if there is no victim now but may be one soon: call again."""
        testbed, kind = self.testbed, fault.kind
        detail, needs_recovery = "", True
        if kind == "worker":
            injected = testbed.kill_worker(fault.pick)
        elif kind == "stop":
            injected = testbed.stop_worker(fault.pick)
        elif kind == "driver":
            testbed.kill_driver()
            self.start()
            injected = True
        elif kind == "damage":
            detail = testbed.damage(self.progress.folder, fault.pick) or ""
            injected = bool(detail)
        elif kind == "cache":
            assert self.recipe.data.cache
            detail = testbed.damage_cache(Path(self.recipe.data.cache), fault.pick) or ""
            injected = bool(detail)
        elif kind == "node":
            kind, injected = f"node {testbed.change_nodes(fault.pick)}", True
        elif kind == "full":
            testbed.fill_disk(fault.duration)
            self.full_until = time.monotonic() + fault.duration + ENDING_SECONDS
            injected = True
        elif kind == "tracking":
            testbed.stop_server(fault.duration)
            injected, needs_recovery = True, False
        else:
            self.start_second_driver()
            injected, needs_recovery = True, False
        now = time.monotonic()
        if not injected and now - (self.due_since or now) < VICTIM_SECONDS:
            return False
        self.last_fault = now
        say(f"{fault.text()}{': ' + detail if detail else ''}{'' if injected else ': no victim'}")
        if not injected:
            return True
        self.report.injected[kind] += 1
        if not needs_recovery:
            return True
        if self.pending is not None:
            self.pending.alone, self.pending.attempts = False, self.progress.attempts
            self.pending.kind = kind
        else:
            p = self.progress
            self.pending = PendingRecovery(kind, now, p.stage, p.step, p.attempts, p.repeated)
        return True

    def start_second_driver(self) -> None:
        """A second driver must end with code 6, unless the first has ended meanwhile."""
        code = self.testbed.start_second_driver()
        ended = self.testbed.driver is not None and self.testbed.driver.poll() is not None
        if code != 6 and not ended:
            self.report.problems["ends"].append(f"a second driver ended with {code} instead of 6")

    def go_on(self, code: int) -> bool:
        """Start the run again, which has ended before its end. False if that happened too often without a reason."""
        away = not self.testbed.server_is_up
        full = time.monotonic() < self.full_until
        why = "the disk is full" if full else "MLflow is away" if away else ""
        text = f"ended with {code}; {last_line(self.testbed.log)}"
        say(f"    {text}{f' ({why})' if why else ''}")
        if why and code in (2, 10):
            if self.testbed.disk_is_full:
                time.sleep(1)
        else:
            self.report.problems["ends"].append(text)
            self.bad_ends += 1
            if self.bad_ends > MAX_BAD_ENDS:
                return False
        self.start()
        return True

    def hang(self) -> None:
        """Count a hang, and start the run again."""
        beat = read_json(self.progress.folder.heartbeat)
        doing = f"{beat['doing']} at step {beat['step']}" if beat else "nothing yet"
        pending = (
            f", {time.monotonic() - self.pending.at:.0f} s after a fault {self.pending.kind!r}"
            if self.pending
            else ""
        )
        text = f"no step for {self.hang_seconds:.0f} s{pending}; last heartbeat: {doing}; {last_line(self.testbed.log)}"
        self.report.problems["hangs"].append(text)
        say(f"    HANG: {text}")
        self.testbed.kill_driver()
        self.testbed.kill_stopped()
        self.start()
