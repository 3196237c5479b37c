"""A real `mlflow server` on loopback, for the tests that stop and start one."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADMIN = ("admin", "a-long-password")


@contextmanager
def server(folder: Path, port: int, *, auth: bool = False) -> Iterator[str]:
    """Runs it over `folder`/server.db and `folder`/artifacts; gives its address, kills it in the end.

    auth: it knows users, of whom `ADMIN` is the first, and others may read what is not theirs.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = dict(os.environ)
    if auth:
        command += ["--app-name", "basic-auth"]
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder / 'auth.db'}\n"
            f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini")}
        environment |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "a test's own"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=folder, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400  # a busy machine imports it for minutes
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def add_user(url: str, name: str, password: str) -> None:
    """Add a user to a server with `auth`."""
    call = urllib.request.Request(
        f"{url}/api/2.0/mlflow/users/create",
        data=json.dumps({"username": name, "password": password}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(":".join(ADMIN).encode()).decode(),
        },
    )
    urllib.request.urlopen(call, timeout=30).close()
