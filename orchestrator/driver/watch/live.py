"""Keeps the page of a run up to date until the run is finished or Ctrl-C. Reads files, writes none, asks no process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from minilm.orchestrator.driver.run_status import run_status
from minilm.orchestrator.driver.watch.curves import Curves
from minilm.orchestrator.driver.watch.page import log_lines, page
from minilm.orchestrator.stage.folder import RunFolder

REFRESH_SECONDS, PLAIN_REFRESH_SECONDS = 2.0, 10.0


class Watch:
    """The run in `workdir` as it was seen last. Raises as `run_status`."""

    def __init__(self, workdir: Path):
        self.curves: dict[str, Curves] = {}
        self.status = run_status(workdir, ask_stores=False)
        self.read_curves()

    def look(self) -> None:
        """Read what is new; what can't be read for a moment stays as it was."""
        with suppress(OSError):
            self.status = run_status(Path(self.status.workdir), ask_stores=False)
        self.read_curves()

    def read_curves(self) -> None:
        folder = RunFolder(Path(self.status.workdir))
        for stage in self.status.stages:
            curves = self.curves.setdefault(stage.stage, Curves(folder.stage(stage.stage)))
            with suppress(OSError):
                curves.read()

    def shown(self, console: Console) -> Group:
        """The page, lines cut at the width of the terminal."""
        ascii_only = console.options.ascii_only
        lines = page(self.status, self.curves, console.width, ascii_only=ascii_only)
        for line in lines:
            line.no_wrap, line.overflow = True, "crop" if ascii_only else "ellipsis"
        return Group(*lines)


def watch(workdir: Path, *, once: bool) -> None:
    """Show the run until it is finished, or `once`. Without a terminal a line is printed for each thing that is new."""
    watched, console = Watch(workdir), Console(highlight=False)
    if once:
        if console.is_terminal:
            console.print(watched.shown(console))
        else:
            for line in page(
                watched.status, watched.curves, console.width, ascii_only=console.options.ascii_only
            ):
                print(line.plain)
        return
    with suppress(KeyboardInterrupt), sigterm_as_ctrl_c():
        if console.is_terminal and not console.is_dumb_terminal:
            with Live(watched.shown(console), console=console, auto_refresh=False) as live:
                while not watched.status.finished:
                    time.sleep(REFRESH_SECONDS)
                    watched.look()
                    live.update(watched.shown(console), refresh=True)
        else:
            follow(watched)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """So that a terminal gets its cursor back."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def follow(watched: Watch) -> None:
    last: list[str] = []
    while True:
        lines = log_lines(watched.status)
        for line in lines:
            if line not in last:
                print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
        if watched.status.finished:
            return
        last = lines
        time.sleep(PLAIN_REFRESH_SECONDS)
        watched.look()
