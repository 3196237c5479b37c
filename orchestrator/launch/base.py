"""What a launcher is: it gets the workers of one stage running somewhere, and the driver needs to know no more.

A run has one launcher, used as a context manager. To add one, write a subclass in a file of this folder and give it a
row in `LAUNCHERS`; `minilm run --launcher` takes its choices from there.
"""

# ruff: noqa: B027 (a launcher that does not need a step inherits an empty one)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

from minilm.orchestrator.errors import Stopped
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.signals import StopRequest

if TYPE_CHECKING:  # it imports PyTorch
    from minilm.orchestrator.launch.liveness import Heartbeats

# name: module of this folder and class; imported when it is chosen, because naming the choices must cost nothing
LAUNCHERS = {"ray": "ray_launcher:RayLauncher", "inline": "inline:InlineLauncher"}

STOPPED_BETWEEN = "stopped between two evaluations; the same command goes on from here"
Item = TypeVar("Item")
Result = TypeVar("Result")
Show = Callable[[str, bool], None]  # text for the status line, and whether it must appear at once


@dataclass(frozen=True)
class LaunchOptions:
    """What a run asks of its launcher: `workers` is (fewest, most); `wait_seconds` bounds the wait for machines;
    `address` names a cluster, None where the launcher finds its own. auto: nobody has counted the workers, so they need
    a cluster that says how many there is room for."""

    run: RunFolder
    device: str
    workers: tuple[int, int]
    wait_seconds: float
    address: str | None = None
    auto: bool = False


class Launcher(ABC):
    """Starts the workers of a run's stages, one stage after the other.

    alone: there is one worker, however many are asked for.
    """

    alone = False

    def __init__(self, options: LaunchOptions, stop: StopRequest):
        self.options, self.stop = options, stop

    @property
    def is_here(self) -> bool:
        """Do all workers run on this machine?"""
        return False

    @staticmethod
    def joins(address: str | None) -> bool:
        """Would workers with this `LaunchOptions.address` run on machines that were there before the run?"""
        return False

    @staticmethod
    def configure_process() -> None:
        """Settings of the driver's own process. Called once, before it starts any thread."""

    def prepare(self, show: Show) -> None:
        """Connect to what runs the workers; nothing if that is done. Called in the main thread.

        Raises `UserError` or `InfrastructureError` where that fails, `Stopped` on request.
        """

    def allocate(self, spec: StageSpec, show: Show) -> StageSpec:
        """Wait until the fewest workers have room, and return the stage with its device decided.

        Raises `UserError`, `InfrastructureError` or `Stopped` instead of waiting for ever.
        """
        return spec

    @abstractmethod
    def start(self, spec: StageSpec) -> Future[None]:
        """Start the stage's workers. The future ends when they have returned, or with the error that ended them."""

    def supervise(
        self, spec: StageSpec, beats: Heartbeats, say: Callable[[str], None]
    ) -> Callable[[bool], str]:
        """A function that the driver calls a few times a second while workers run; it acts on silent ones.

        It takes whether a stop is requested, and returns words for the status line. `say` prints a line that stays.
        """
        return lambda stop_requested: ""

    def abandon(self, spec: StageSpec) -> None:
        """Make the future of `start` end although workers may not hear the request to stop."""

    @abstractmethod
    def raise_failure(self, spec: StageSpec, error: BaseException) -> NoReturn:
        """Raise what a user should read for `error`, which the future of `start` ended with."""

    def each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`work` of each item, in their order, after `prepare`.

        A function of a module, and plain values: a launcher may run them side by side in other processes. Raises what
        `work` raises, and `Stopped` on request.
        """
        for item in items:
            if self.stop.requested:
                raise Stopped(STOPPED_BETWEEN)
            yield work(item)

    def close(self) -> None:
        """Give back whatever the launcher holds. Called once, after the last stage or an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_launcher(name: str) -> type[Launcher]:
    """The class of a row of `LAUNCHERS`."""
    module, _, attribute = LAUNCHERS[name].partition(":")
    launcher: type[Launcher] = getattr(import_module(f"minilm.orchestrator.launch.{module}"), attribute)
    return launcher


def run_in_thread(work: Callable[[], None]) -> Future[None]:
    """Run `work` in a thread of its own, which ends with it."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="launcher")
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future
