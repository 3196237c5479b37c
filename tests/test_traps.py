"""Two drivers at once, and a disk that is full, on real raylets of this machine; each prints its time.

The other traps of clusters: busy CPUs, nodes added and killed, a killed driver are in test_elastic; stopped workers,
drained nodes, a folder that can't be written and places that are lost in test_standstill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minilm.model.export import weights_digest
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.recipe.load import load_recipe
from tests.soak.recipe import write_soak_recipe
from tests.soak.report import last_line
from tests.soak.round import Progress
from tests.soak.soak import run_undisturbed
from tests.soak.testbed import Arena

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WAIT_SECONDS = 400


class Run:
    """A run on two workers that makes steps."""

    def __init__(self, recipe: Path, arena: Arena, folder: Path):
        self.arena, self.log = arena, folder / "run.log"
        self.work = Workdir(arena.disk / "work")
        self.progress = Progress(load_recipe(recipe, []), self.work)
        arena.begin(recipe, self.work.root, self.log, [])
        arena.start_driver()
        self.wait(lambda: self.progress.step > self.progress.resumed + 20)

    def wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not reached():
            assert self.arena.driver and self.arena.driver.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"waited in vain\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)
            self.progress.look()

    def end(self) -> int:
        assert self.arena.driver
        return self.arena.driver.wait(WAIT_SECONDS)

    @property
    def weights(self) -> str:
        return weights_digest(self.work.stage("assistant").student("assistant"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_soak_recipe(tmp_path_factory.mktemp("recipe"), steps=800, workers=[1, 2])


@pytest.fixture(scope="module")
def weights(recipe: Path) -> str:
    """Of a run that nobody disturbed."""
    run_undisturbed(recipe, recipe.parent / "alone", recipe.parent / "alone.log")
    return weights_digest(Workdir(recipe.parent / "alone").stage("assistant").student("assistant"))


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    with Arena(tmp_path / "arena", 2, 2) as arena:
        yield arena


def test_a_second_driver_is_refused_and_the_first_goes_on(recipe, weights, arena, tmp_path):
    run = Run(recipe, arena, tmp_path)
    began = time.monotonic()
    assert arena.rival() == 6
    print(f"\nsecond driver: refused after {time.monotonic() - began:.1f} s")
    assert "another run works in" in (tmp_path / "run-rival.log").read_text()
    run.progress.look()
    assert run.progress.attempts == 1
    assert run.end() == 0, run.log.read_text()[-3000:]
    assert run.weights == weights


def test_a_disk_that_stays_full_ends_the_run_and_room_lets_it_go_on(recipe, weights, arena, tmp_path):
    """Not even the reason fits on the disk: it reaches the driver another way."""
    if not arena.has_own_disk:
        pytest.skip("mounting needs root")
    run = Run(recipe, arena, tmp_path)
    began = time.monotonic()
    arena.fill_disk(float("inf"))
    assert run.end() in (2, 10)
    print(f"\ndisk full: ended after {time.monotonic() - began:.1f} s; {last_line(run.log)}")
    assert "o space left on" in run.log.read_text()
    arena.free_disk()
    arena.start_driver()
    assert run.end() == 0, run.log.read_text()[-3000:]
    assert run.weights == weights
