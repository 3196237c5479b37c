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
from tests.soak.soak import run_without_faults
from tests.soak.testbed import Testbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WAIT_SECONDS = 400


class Run:
    """A run on two workers that makes steps."""

    def __init__(self, recipe: Path, testbed: Testbed, folder: Path):
        self.testbed, self.log = testbed, folder / "run.log"
        self.work = Workdir(testbed.disk / "work")
        self.progress = Progress(load_recipe(recipe, []), self.work)
        testbed.prepare(recipe, self.work.root, self.log, [])
        testbed.start_driver()
        self.wait(lambda: self.progress.step > self.progress.resumed + 20)

    def wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not reached():
            assert self.testbed.driver and self.testbed.driver.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"waited in vain\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)
            self.progress.update()

    def end(self) -> int:
        assert self.testbed.driver
        return self.testbed.driver.wait(WAIT_SECONDS)

    @property
    def weights(self) -> str:
        return weights_digest(self.work.stage("assistant").student("assistant"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_soak_recipe(tmp_path_factory.mktemp("recipe"), steps=800, workers=[1, 2])


@pytest.fixture(scope="module")
def weights(recipe: Path) -> str:
    """The weights of a run without faults."""
    run_without_faults(recipe, recipe.parent / "alone", recipe.parent / "alone.log")
    return weights_digest(Workdir(recipe.parent / "alone").stage("assistant").student("assistant"))


@pytest.fixture
def testbed(tmp_path: Path) -> Iterator[Testbed]:
    with Testbed(tmp_path / "testbed", 2, 2) as testbed:
        yield testbed


def test_a_second_driver_is_refused_and_the_first_goes_on(recipe, weights, testbed, tmp_path):
    run = Run(recipe, testbed, tmp_path)
    began = time.monotonic()
    assert testbed.start_second_driver() == 6
    print(f"\nsecond driver: refused after {time.monotonic() - began:.1f} s")
    assert "another run works in" in (tmp_path / "run-second-driver.log").read_text()
    run.progress.update()
    assert run.progress.attempts == 1
    assert run.end() == 0, run.log.read_text()[-3000:]
    assert run.weights == weights


def test_a_disk_that_stays_full_ends_the_run_and_room_lets_it_go_on(recipe, weights, testbed, tmp_path):
    """Not even the reason fits on the disk: it reaches the driver another way."""
    if not testbed.has_own_disk:
        pytest.skip("mounting needs root")
    run = Run(recipe, testbed, tmp_path)
    began = time.monotonic()
    testbed.fill_disk(float("inf"))
    assert run.end() in (2, 10)
    print(f"\ndisk full: ended after {time.monotonic() - began:.1f} s; {last_line(run.log)}")
    assert "o space left on" in run.log.read_text()
    testbed.free_disk()
    testbed.start_driver()
    assert run.end() == 0, run.log.read_text()[-3000:]
    assert run.weights == weights
