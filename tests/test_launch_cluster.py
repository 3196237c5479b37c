"""The cluster of a run: when it is started, and what a killed driver leaves of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import AuthenticationError

from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import Stopped, UserError
from minilm.orchestrator.launch import cluster, ray_private
from minilm.orchestrator.launch.base import LaunchOptions
from minilm.orchestrator.launch.cluster import Cluster, check_answers, end_leftovers
from minilm.orchestrator.launch.ray_launcher import RayLauncher
from minilm.orchestrator.stage.folder import RunFolder
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.processes import descendants
from minilm.orchestrator.system.signals import StopRequest
from tests.rooms import ROOT

SLEEPER = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
PARENT = [sys.executable, "-c", f"import subprocess; subprocess.run({SLEEPER!r})"]


def test_an_address_where_no_cluster_answers():
    """Said before Ray, which would wait for minutes, is asked."""
    advice = "no Ray cluster answers at 127.0.0.1:1 .* `ray start --head`, or drop"
    with pytest.raises(UserError, match=advice):
        check_answers("127.0.0.1:1")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example"])
def test_the_address_of_a_job_server_is_no_clusters(tmp_path, monkeypatch, address):
    """The README's reader may have exported it for `ray job submit`."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    told = (
        f"{address} is a job server, which takes `ray job submit`; a run joins .* HOST:PORT .*--address local"
    )
    with pytest.raises(UserError, match=told) as raised:
        Cluster(None, 1, tmp_path / "cluster.json")
    assert raised.value.exit_code == 2
    assert not Cluster("local", 1, tmp_path / "cluster.json").is_joined


@pytest.mark.parametrize(
    ("address", "claims"),
    [("local", False), ("10.0.0.1:6379", True), ("auto", True), ("ray://head:10001", False)],
)
def test_who_claims_places(tmp_path, address, claims):
    options = LaunchOptions(RunFolder(tmp_path), "cpu", (1, 1), 600.0, address=address)
    claim = RayLauncher(options, StopRequest()).claim
    assert (claim is not None) is claims
    assert claim is None or claim.holder.endswith(f" in {tmp_path}")


def test_a_cluster_that_demands_another_token(tmp_path, monkeypatch):
    """On a real head in test_launch_readme; here the sentence, and that Ray's own 20 s of trying are not waited for."""
    monkeypatch.setattr("os.environ", os.environ.copy())
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray tries"))
    monkeypatch.setattr(cluster, "check_answers", lambda address: None)

    def refuse(address: str) -> None:
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(ray_private, "authenticate", refuse)
    stop = SimpleNamespace(requested=False, install=lambda: None)
    told = (
        "the Ray cluster at 10.0.0.1:6379 demands a token, and this environment has none or another one: set"
    )
    with pytest.raises(UserError, match=told) as raised:
        Cluster("10.0.0.1:6379", 1, tmp_path / "cluster.json").connect(stop)
    assert raised.value.exit_code == 2


OWN_CLUSTER = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from minilm.orchestrator.launch import cluster, ray_private
from minilm.orchestrator.launch.base import LaunchOptions
from minilm.orchestrator.launch.cluster import Cluster
cluster = Cluster("local", 1, Path("cluster.json"))
stop = SimpleNamespace(requested=False, install=lambda: None)
cluster.connect(stop)
import ray
assert ray.cluster_resources()["trainer"] == 1
print("ready", flush=True)
sys.stdin.read()
cluster.leave()
cluster.connect(stop)  # Ray keeps the first token that it has read
cluster.leave()
del os.environ["RAY_AUTH_TOKEN"]  # as after somebody's own ray.init(), whose token lies in the home folder
cluster.connect(stop)
cluster.leave()
"""
FIXED_PORTS = {6379, 8265, 10001, 44217, 44227, 52365}  # of `ray start --head`


def listening(pids: set[int]) -> set[int]:
    """The TCP ports on which any of these processes accepts connections."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = int(fields[1].rpartition(":")[2], 16)
    found = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):  # closed meanwhile
                found.add(sockets.get(str(file.readlink()), 0))
    return found - {0}


def test_a_cluster_of_the_runs_own_takes_no_port_and_leaves_no_file_that_a_head_would_find(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", OWN_CLUSTER],
        cwd=tmp_path,
        env=kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        ports: set[int] = set()
        deadline = time.monotonic() + 200
        while len(ports) < 7 and time.monotonic() < deadline:  # until its agents listen too
            ports = listening({child.pid for child in descendants(process.pid)})
            time.sleep(0.1)
        process.stdin.close()
        assert process.wait() == 0
    assert len(ports) >= 7 and not ports & FIXED_PORTS, ports
    assert not list(home.rglob("*")), "a token there would be demanded by the next `ray start --head`"


def test_a_stop_that_is_asked_for_while_ray_is_imported_comes_before_ray_starts(tmp_path, monkeypatch):
    stop = SimpleNamespace(requested=True, install=lambda: None)
    monkeypatch.setattr("os.environ", os.environ.copy())  # which it adds to
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray starts"))
    with pytest.raises(Stopped, match="stopped while Ray started; the same command goes on"):
        Cluster("local", 1, tmp_path / "cluster.json").connect(stop)


def test_what_a_killed_driver_has_left_is_ended_and_nothing_else(tmp_path):
    """Its children's children too; no process that has only got the number of one of them."""
    before = set(descendants())
    with subprocess.Popen(PARENT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout and parent.stdout.readline(), "the child's child is there"
        ours = [process for process in descendants() if process not in before]
        assert len(ours) == 2 and parent.pid in [process.pid for process in ours]
        record = tmp_path / "cluster.json"
        write_json(record, [asdict(process) | {"started": process.started + 1} for process in ours])
        end_leftovers(record)
        assert not any(process.is_gone() for process in ours)
        write_json(record, [asdict(process) for process in ours])
        end_leftovers(record)
        assert all(process.is_gone() for process in ours), "at once: the next ones want their ports"
        parent.wait(10)
        assert parent.stdout.read() == b"", "nobody holds the other end: the child's child has ended"
    end_leftovers(tmp_path / "none.json")
    for text in ("", "[{}]", "[1]"):  # cut by a power failure, of another version
        record.write_text(text)
        end_leftovers(record)


def test_processes_may_have_any_name():
    """A name is bytes, and cut at 15 of them: here in the middle of a letter."""
    name = "abcdefghijklmnö".encode()[:15]
    program = f"import time; open('/proc/self/comm', 'wb').write({name!r}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline(), "it has its name"
        assert Path(f"/proc/{process.pid}/comm").read_bytes() == name + b"\n"
        assert process.pid in {child.pid for child in descendants()}
        process.kill()


def test_ray_starts_before_the_rest_only_where_a_stage_is_left_to_train(tmp_path):
    """A new run's inputs are looked at first; a trained one is published without a cluster, which may be gone."""
    work, recipe = Workdir(tmp_path), SimpleNamespace(stages=[SimpleNamespace(name=n) for n in ("a", "b")])
    assert not work.goes_on(recipe)
    write_json(work.run, {})
    assert work.goes_on(recipe)
    for name in ("a", "b"):
        assert work.goes_on(recipe)
        work.stage(name).root.mkdir(parents=True)
        write_json(work.stage(name).done, {})
    assert not work.goes_on(recipe)
