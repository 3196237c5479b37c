"""A shell to type the README's commands into, with their own ports, a home folder and nothing else of this machine.

Its network namespace has a loopback device only, so that Ray's fixed ports are free in each; its processes, daemons
included, end with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.rooms import ROOT

NAMESPACE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
LOOPBACK = """python -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 1))'"""  # SIOCSIFFLAGS, IFF_UP
MARK = "typed.py: exit code"
FOREIGN = ("RAY_", "MLFLOW_", "HF_")


class Shell:
    """`bash` in `folder` with `home` as its home folder. Skips the test where namespaces are not allowed."""

    def __init__(self, folder: Path, home: Path, **environment: str):
        home.mkdir(exist_ok=True)
        command = NAMESPACE + ([] if os.getuid() == 0 else ["--map-root-user"])
        if subprocess.run([*command, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
            pytest.skip("namespaces are not allowed here")
        self.temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets want short paths
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        own = {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": self.temporary,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.process = subprocess.Popen(
            [*command, "bash", "--noprofile", "--norc"],
            cwd=folder,
            env=kept | own | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.type(LOOPBACK)

    def type(self, line: str, expect: int = 0) -> str:
        """What the line prints, its errors included, once it has ended with the exit code `expect`."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f'{line}\necho "{MARK} $?"\n')
        self.process.stdin.flush()
        printed = ""
        for text in self.process.stdout:
            before, found, code = text.partition(MARK)
            printed += before
            if found:
                assert int(code) == expect, f"{line}\n{printed}"
                return re.sub(r"\x1b\[\d*m", "", printed)
        raise AssertionError(f"the shell has ended\n{line}\n{printed}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.temporary, ignore_errors=True)


def blocks(page: Path, heading: str) -> list[list[str]]:
    """The indented blocks below a line of `page` that begins with `heading`, up to the next heading; their lines."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"\n{heading}")
    assert rest, f"{page.name} has no line that begins with {heading}"
    section = rest.partition("\n## ")[0]
    found = re.findall(r"(?:^    .+\n)+", section, re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in found]
