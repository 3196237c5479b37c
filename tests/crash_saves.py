"""A process that is killed at every operation of a save in turn. Prints a JSON line for each.

Run by test_checkpoint_async_saver.

usage: python -m tests.crash_saves FOLDER

Faults: kill (SIGKILL itself) and full (no space left on device, for good). Each round forks a child with two sound
checkpoints of steps 1 and 2. The child saves step 3 (which removes step 1) and is struck at its n-th operation: open,
write (half of it is done), fsync, mkdir, rename, remove, rmdir. The parent then restores. Tensors are one write:
the library's, which gives its own temporary file their name at its end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from minilm.orchestrator.checkpoint import checkpoint, safetensors_file
from minilm.orchestrator.checkpoint.format import read
from minilm.orchestrator.checkpoint.local_store import LocalStore
from tests.support import checkpoints_in
from tests.test_checkpoint import FACTS, MINE, advance, make, save


class Storage:
    """Counts operations; strikes from number `at` on, or from the next one that needs space."""

    def __init__(self, at: int, fault: str):
        self.left, self.fault, self.struck = at, fault, False
        for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "open", "write"):
            self.wrap(os, name)
        save_file = safetensors_file.save_file

        def save(tensors, path):
            save_file(tensors, path.with_name(".tmp123456"))
            content = path.with_name(".tmp123456").read_bytes()
            half = lambda: path.with_name(".tmp123456").write_bytes(content[: len(content) // 2])  # noqa: E731
            self.operation(f"write {path.name}", writes=True, torn=half)
            path.with_name(".tmp123456").rename(path)

        safetensors_file.save_file = save
        fdopen = os.fdopen
        os.fdopen = lambda *arguments: TornFile(fdopen(*arguments), self)

    def wrap(self, module, name):
        original = getattr(module, name)

        def operation(*arguments, **options):
            makes = name == "open" and arguments[1] & os.O_CREAT
            self.operation(name, writes=bool(makes) or name in ("fsync", "mkdir", "write"))
            return original(*arguments, **options)

        setattr(module, name, operation)

    def operation(self, what: str, *, writes: bool, torn=lambda: None) -> None:
        self.left -= 1
        if self.left > 0 or (self.fault == "full" and not writes):
            return
        torn()
        if not self.struck:
            print(json.dumps(what), end=" ", flush=True)
        self.struck = True
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")


class TornFile:
    """A file whose write, when struck, has written half of what it was given."""

    def __init__(self, file, storage: Storage):
        self.file, self.storage = file, storage

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def flush(self):
        self.file.flush()

    def write(self, content):
        half = lambda: self.file.write(content[: len(content) // 2])  # noqa: E731
        self.storage.operation("write", writes=True, torn=half)
        return self.file.write(content)


def child(folder: Path, at: int, fault: str) -> int:
    models, states = make(0)
    for step in range(3):
        advance(states, step)
    Storage(at, fault)
    try:
        save(folder, 3, models, states, keep=2)
    except OSError as error:
        return 28 if error.errno == errno.ENOSPC else 1
    return 0


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    models, states = make(0)
    for step in (1, 2):
        advance(states, step - 1)
        save(root / "sound", step, models, states)
    for fault in ("kill", "full"):
        at = 1
        while strike(root, fault, at):
            at += 1


def strike(root: Path, fault: str, at: int) -> bool:
    """One round; False when the save was through before its operation number `at`."""
    folder = root / f"{fault}-{at}"
    shutil.copytree(root / "sound", folder)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(child(folder, at, fault))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    models, states = make(9)
    step, facts = checkpoint.restore_newest(LocalStore(folder), models, states, MINE) or (None, None)
    found = {
        "fault": fault,
        "status": status,
        "step": step,
        "sound": facts == FACTS and all(read(p) for p in checkpoints_in(folder)),
        "left": left,
        "cleaned": not any(path.name.startswith((".", "damaged")) for path in folder.iterdir()),
    }
    print(json.dumps(found))
    return status != 0


if __name__ == "__main__":
    main()
