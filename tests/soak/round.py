"""One round of a soak: a run from its beginning to its end, struck on its way, and what of it is counted.

How far the run has come is read from its own small files, which no strike touches.
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
from tests.soak.faults import Strike
from tests.soak.invariants import median_step_seconds
from tests.soak.report import Recovery, Tally, last_line, say
from tests.soak.testbed import Arena

POLL_SECONDS = 0.05
IDLE_SECONDS = 20.0  # steps that go on for so long: the strike has hit nobody
IDLE_SECONDS_ADDED = 60.0  # a new node is looked for every few seconds, and may be left unused
VICTIM_SECONDS = 20.0
ENDING_SECONDS = 15.0  # from a save that failed to the end of `minilm run`
MAX_BAD_ENDS = 3
BEGAN = re.compile(r"stage \S+: (?:resumes at step (\d+)|starts)")


class Progress:
    """How far a run has come, from its small files: stages that are done, steps of the current one.

    attempts: begun so far. resumed: the step at which the last one began. repeated: steps made again, of all.
    """

    def __init__(self, recipe: Recipe, work: Workdir):
        self.stages = [work.stage(stage.name) for stage in recipe.stages]
        self.stage = self.step = self.attempts = self.resumed = self.repeated = 0
        self.moved = time.monotonic()
        self._offset = 0

    @property
    def folder(self) -> Any:
        return self.stages[min(self.stage, len(self.stages) - 1)]

    def look(self) -> None:
        before = (self.stage, self.step, self.attempts)
        while self.stage < len(self.stages) and self.folder.published.exists():
            self.stage, self.step, self._offset = self.stage + 1, 0, 0
        if self.stage < len(self.stages):
            self._read_log()
            # not less: a new attempt takes it back just before it tells
            self.step = max(self.step, reached(self.folder.root))
        if before != (self.stage, self.step, self.attempts):
            self.moved = time.monotonic()

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
class Wound:
    """A strike that the run has not recovered from yet, with its progress at that moment."""

    kind: str
    at: float
    stage: int
    step: int
    attempts: int
    repeated: int
    alone: bool = True


class Round:
    """One run of the recipe from its beginning to its end, struck by `strikes`."""

    def __init__(
        self,
        recipe: Recipe,
        work: Workdir,
        arena: Arena,
        strikes: Iterator[Strike],
        tally: Tally,
        reference: Workdir,
        hang_seconds: float,
    ):
        self.recipe, self.work, self.arena, self.strikes, self.tally = recipe, work, arena, strikes, tally
        self.hang_seconds = hang_seconds
        self.step_seconds = [
            median_step_seconds(reference.stage(stage.name), stage.batch) for stage in recipe.stages
        ]
        self.progress = Progress(recipe, work)
        self.wound: Wound | None = None
        self.since = self.last_strike = time.monotonic()
        self.due_since: float | None = None  # the next strike looks for a victim
        self.full_until = 0.0  # so long the run may end because the disk is full, though it made steps again
        self.bad_ends = 0
        for name in ("ends", "hangs"):
            tally.problems[name] += []

    def play(self, deadline: float) -> bool:
        """True when the run has come to its end."""
        began = time.monotonic()
        self.arena.mend()
        self.start()
        strike = next(self.strikes, None)
        while True:
            time.sleep(POLL_SECONDS)
            self.arena.tick()
            self.progress.look()
            self.settle()
            code = self.arena.driver.poll() if self.arena.driver else 1
            if code == 0:
                break
            if code is not None and not self.go_on(code):
                return False
            if time.monotonic() - self.progress.moved > self.hang_seconds:
                self.hang()
            if strike and time.monotonic() < deadline and self.is_due(strike):
                self.due_since = self.due_since or time.monotonic()
                if self.hit(strike):
                    strike, self.due_since = next(self.strikes, None), None
        wall = time.monotonic() - began
        self.tally.wall += wall
        self.tally.steps += sum(stage.steps for stage in self.recipe.stages)
        self.tally.useful += sum(
            stage.steps * seconds
            for stage, seconds in zip(self.recipe.stages, self.step_seconds, strict=True)
        )
        return self.repeat()

    def start(self) -> None:
        self.arena.start_driver()
        self.progress.moved = time.monotonic()

    def repeat(self) -> bool:
        """The same command on the finished run tells MLflow what is left, and changes nothing."""
        self.arena.mend()
        if left := self.arena.free_stopped():
            self.tally.problems["ends"].append(f"{left} stopped workers were never replaced")
        self.start()
        code = self.arena.driver.wait(self.hang_seconds) if self.arena.driver else None
        if code:
            self.tally.problems["ends"].append(
                f"the finished run, repeated, ended with {code}; {last_line(self.arena.log)}"
            )
        return not code

    def settle(self) -> None:
        """Is the wound healed? A step was made by a new attempt, or a stage was finished; or there was none."""
        wound, now, progress = self.wound, time.monotonic(), self.progress
        if wound is None:
            return
        new_attempt = progress.attempts > wound.attempts and progress.step > progress.resumed
        if new_attempt or progress.stage > wound.stage:
            repeated, seconds = progress.repeated - wound.repeated, now - wound.at
            lost = seconds + repeated * self.step_seconds[wound.stage]
            self.tally.recoveries.append(Recovery(wound.kind, seconds, repeated, lost, wound.alone))
            say(f"    recovered after {seconds:.1f} s, {repeated} steps again")
        elif (
            progress.attempts == wound.attempts
            and wound.kind != "driver"  # its workers may run on until the next driver takes over
            and now - wound.at > (IDLE_SECONDS_ADDED if wound.kind == "node added" else IDLE_SECONDS)
            and now - progress.moved < 1
            and progress.step > wound.step + 1
        ):
            self.tally.idle[wound.kind] += 1
            say("    without effect")
        else:
            return
        self.wound = None

    def is_due(self, strike: Strike) -> bool:
        now = time.monotonic()
        if strike.hasty:
            return now - self.last_strike >= strike.pause
        making_steps = self.progress.step > self.progress.resumed and now - self.progress.moved < 1
        if self.wound is not None or not making_steps:
            self.since = now
        return now - self.since >= strike.pause

    def hit(self, strike: Strike) -> bool:
        """Do what the strike says, and note it. False to be asked again: there is no victim, and may be one soon."""
        arena, kind = self.arena, strike.kind
        detail, wounds = "", True
        if kind == "worker":
            done = arena.kill_worker(strike.pick)
        elif kind == "stop":
            done = arena.stop_worker(strike.pick)
        elif kind == "driver":
            arena.kill_driver()
            self.start()
            done = True
        elif kind == "damage":
            detail = arena.damage(self.progress.folder, strike.pick) or ""
            done = bool(detail)
        elif kind == "cache":
            assert self.recipe.data.cache
            detail = arena.damage_cache(Path(self.recipe.data.cache), strike.pick) or ""
            done = bool(detail)
        elif kind == "node":
            kind, done = f"node {arena.change_nodes(strike.pick)}", True
        elif kind == "full":
            arena.fill_disk(strike.lasting)
            self.full_until = time.monotonic() + strike.lasting + ENDING_SECONDS
            done = True
        elif kind == "tracking":
            arena.stop_server(strike.lasting)
            done, wounds = True, False
        else:
            done, wounds = self.rival(), False
        now = time.monotonic()
        if not done and now - (self.due_since or now) < VICTIM_SECONDS:
            return False
        self.last_strike = now
        say(f"{strike.text()}{': ' + detail if detail else ''}{'' if done else ': no victim'}")
        if not done:
            return True
        self.tally.struck[kind] += 1
        if not wounds:
            return True
        if self.wound is not None:
            self.wound.alone, self.wound.attempts = False, self.progress.attempts
            self.wound.kind = kind
        else:
            p = self.progress
            self.wound = Wound(kind, now, p.stage, p.step, p.attempts, p.repeated)
        return True

    def rival(self) -> bool:
        code = self.arena.rival()
        ended = self.arena.driver is not None and self.arena.driver.poll() is not None
        if code != 6 and not ended:
            self.tally.problems["ends"].append(f"a second driver ended with {code} instead of 6")
        return True

    def go_on(self, code: int) -> bool:
        """The run has ended by itself before its end: run it again. False when that has happened too often."""
        away = not self.arena.server_is_up
        full = time.monotonic() < self.full_until
        why = "the disk is full" if full else "MLflow is away" if away else ""
        text = f"ended with {code}; {last_line(self.arena.log)}"
        say(f"    {text}{f' ({why})' if why else ''}")
        if why and code in (2, 10):
            if self.arena.disk_is_full:
                time.sleep(1)
        else:
            self.tally.problems["ends"].append(text)
            self.bad_ends += 1
            if self.bad_ends > MAX_BAD_ENDS:
                return False
        self.start()
        return True

    def hang(self) -> None:
        beat = read_json(self.progress.folder.heartbeat)
        doing = f"{beat['doing']} at step {beat['step']}" if beat else "nothing yet"
        wound = (
            f", {time.monotonic() - self.wound.at:.0f} s after a strike {self.wound.kind!r}"
            if self.wound
            else ""
        )
        text = f"no step for {self.hang_seconds:.0f} s{wound}; last heartbeat: {doing}; {last_line(self.arena.log)}"
        self.tally.problems["hangs"].append(text)
        say(f"    HANG: {text}")
        self.arena.kill_driver()
        self.arena.free_stopped()
        self.start()
