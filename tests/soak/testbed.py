"""The testbed of a soak: raylets, an MLflow server, a small disk and the run itself, and the faults they can have.

Everything is real and on this machine: `ray.cluster_utils` nodes with room for one worker each, `mlflow server` on
loopback, `minilm run` as a process. Work directories lie on a tmpfs of their own if this process may mount one (root,
or inside `unshare -Urm`), so that the disk can be filled. Nothing is left over when the context ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from minilm.orchestrator.errors import InfrastructureError
from minilm.orchestrator.launch.ray_launcher import RESIZE_SECONDS
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.processes import signal_all, status
from tests.ports import free_port
from tests.soak.corruption import damage_newest, flip_bit

SERVER_SECONDS = 180
SECOND_DRIVER_SECONDS = 120
ENVIRONMENT = {
    RESIZE_SECONDS: "5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # Ray waits this long for a lost node
}


class Testbed:
    """`least` to `most` raylets with room for one worker each, and a head node without room for any."""

    def __init__(self, folder: Path, least: int, most: int, disk_mb: int = 256):
        self.folder, self.least, self.most = folder, least, most
        self.disk, self.ballast = folder / "disk", folder / "disk" / "ballast"
        self.disk_mb, self.has_own_disk = disk_mb, False
        self.command: list[str] = []
        self.log: Path = folder / "run.log"
        self.driver: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._stopped: list[int] = []

    @property
    def server_uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Testbed:
        self.disk.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.disk_mb}m", "tmpfs", str(self.disk)]
        self.has_own_disk = (
            bool(shutil.which("mount")) and not subprocess.run(mount, capture_output=True).returncode
        )
        try:
            from ray.cluster_utils import Cluster

            head = {"num_cpus": 1, "include_dashboard": False}
            with keep_sigterm():
                self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
            self._nodes: list[Any] = []
            for _ in range(self.least):
                self.add_node()
            self.start_server()
            self.wait_for_server()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_driver()
        self.kill_stopped()
        self.stop_server()
        if hasattr(self, "_cluster"):
            for node in (*self._nodes, self._cluster.head_node):
                self._cluster.remove_node(
                    node, allow_graceful=False
                )  # gracefully, each would take half a minute
            self._cluster.shutdown()
        if self.has_own_disk:
            subprocess.run(["umount", "-l", str(self.disk)], capture_output=True)

    # --- the run

    def prepare(self, recipe: Path, work: Path, log: Path, overrides: list[str]) -> None:
        """Set the command of a run, which is not started yet."""
        sets = [part for override in overrides for part in ("--set", override)]
        self.command = [sys.executable, "-m", "minilm", "run", str(recipe), "--workdir", str(work)]
        self.command += ["--address", self._cluster.address, *sets]
        self.log = log

    def start_driver(self) -> None:
        self.driver = self._start(self.command, self.log)

    def kill_driver(self) -> None:
        if self.driver is not None:
            self.driver.kill()
            self.driver.wait()
            self.driver = None

    def start_second_driver(self) -> int | None:
        """Run the same command beside the run. Returns its exit code, None if it did not end."""
        process = self._start(self.command, self.log.with_name(f"{self.log.stem}-second-driver.log"))
        try:
            return process.wait(SECOND_DRIVER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    def _start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        environment = ENVIRONMENT | dict(os.environ) | {"MLFLOW_TRACKING_URI": self.server_uri}
        with log.open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)

    # --- workers and nodes

    def workers(self) -> list[int]:
        """Process numbers of the Ray Train workers on our raylets in ascending order, without stopped ones."""
        raylets = {info.process.pid for node in self._nodes for info in node.all_processes.get("raylet", [])}
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with suppress(OSError):  # it has just ended
                if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                    fields = status(int(folder.name))
                    if fields and int(fields[1]) in raylets and fields[0] != "T":
                        found.append(int(folder.name))
        return sorted(found)

    def kill_worker(self, pick: float) -> bool:
        return self._signal_worker(pick, signal.SIGKILL) is not None

    def stop_worker(self, pick: float) -> bool:
        pid = self._signal_worker(pick, signal.SIGSTOP)
        if pid is not None:
            self._stopped.append(pid)
        return pid is not None

    def _signal_worker(self, pick: float, number: signal.Signals) -> int | None:
        pids = self.workers()
        if not pids:
            return None
        pid = pids[int(pick * len(pids))]
        signal_all([pid], number)
        return pid

    def kill_stopped(self) -> int:
        """Kill the workers that are still stopped, because nothing replaced them; returns how many there were."""
        left = [pid for pid in self._stopped if status(pid)[:1] == ["T"]]
        signal_all(left, signal.SIGKILL)
        self._stopped.clear()
        return len(left)

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    def add_node(self) -> None:
        with keep_sigterm():
            self._nodes.append(self._cluster.add_node(num_cpus=1, resources={"trainer": 1}))

    def change_nodes(self, pick: float) -> str:
        """Add a node or kill one, as `pick` and the limits say. Returns "added" or "killed"."""
        if self.num_nodes > self.least and (pick < 0.5 or self.num_nodes == self.most):
            victim = self._nodes.pop(int(pick * 997) % self.num_nodes)
            self._cluster.remove_node(victim, allow_graceful=False)
            return "killed"
        self.add_node()
        return "added"

    # --- checkpoints

    def damage(self, stage: StageFolder, pick: float) -> str | None:
        """Damage the newest checkpoint if the one before it is sound, and kill all workers. Returns how, or None.

        Workers are stopped meanwhile: a checkpoint saved in between would hide the damaged one.
        """
        pids = self.workers()
        signal_all(pids, signal.SIGSTOP)
        how = None
        try:
            how = damage_newest(stage.checkpoints, pick) if pids else None
        finally:
            signal_all(pids, signal.SIGKILL if how else signal.SIGCONT)
        return how

    def damage_cache(self, cache: Path, pick: float) -> str | None:
        """Kill all workers, which would not check it again, and damage a cached shard. Returns which one, or None."""
        shards = sorted(path for path in cache.glob("shards/*") if len(path.name) == 64)
        if not shards or not self.workers():
            return None
        signal_all(self.workers(), signal.SIGKILL)
        victim = shards[int(pick * len(shards))]
        flip_bit(victim, pick)
        return f"shard {victim.name[:12]}"

    # --- disk and server

    def fill_disk(self, seconds: float) -> None:
        """Fill the disk for so many seconds."""
        with self.ballast.open("wb") as file, suppress(OSError):
            while True:  # until the disk refuses
                free = shutil.disk_usage(self.disk).free
                os.posix_fallocate(file.fileno(), file.tell(), max(free, 1))
                file.seek(0, os.SEEK_END)
        self._later.append((time.monotonic() + seconds, self.free_disk))

    @property
    def disk_is_full(self) -> bool:
        return self.ballast.exists()

    def free_disk(self) -> None:
        self.ballast.unlink(missing_ok=True)

    @property
    def server_is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.server_uri}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def start_server(self) -> None:
        if self._server is not None:
            return
        folder = self.folder / "mlflow"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        environment = dict(os.environ) | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"
        }  # saves processes that a soak does not use
        with (folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=folder
            )

    def stop_server(self, seconds: float | None = None) -> None:
        """Kill the server; with `seconds`, it is started again after that time."""
        if self._server is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None
        if seconds is not None:
            self._later.append((time.monotonic() + seconds, self.start_server))

    def wait_for_server(self) -> None:
        deadline = time.monotonic() + SERVER_SECONDS
        while not self.server_is_up:
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"the MLflow server of the soak does not start; look at {self.folder}/mlflow/server.log"
                )
            time.sleep(0.2)

    def tick(self) -> None:
        """End the faults whose time is over: the server comes back, the disk is freed."""
        now = time.monotonic()
        for _, action in [item for item in self._later if item[0] <= now]:
            action()
        self._later = [item for item in self._later if item[0] > now]

    def end_faults(self) -> None:
        """End all faults: the server answers, the disk has room."""
        self._later.clear()
        self.free_disk()
        self.start_server()
        self.wait_for_server()


@contextmanager
def keep_sigterm() -> Iterator[None]:
    """Restores the handler: Ray replaces it with each node by one that would leave server, run and disk over."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
