"""Checkpoints in the background: the loop pays for a copy of the state, a thread checks and writes it.

At most one save is in flight. Its copy lives in host memory that is allocated once (page-locked beside a GPU, whose
copies are queued on the stream and waited for by the thread, so the loop never waits for the device). An error of
the thread is raised in the loop at its next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from orchestrator import checkpoint
from orchestrator.checkpoint import Facts, Identity
from orchestrator.step import StudentState
from orchestrator.storage import writing

Parts = dict[str, dict[str, Tensor]]


class Saver:
    """Saves `models` and `students` into `folder`; `keep`, `keep_every`, `guard` as for `checkpoint.write`."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, torch.nn.Module],
        students: Sequence[StudentState],
        identity: Identity,
        *,
        keep: int,
        keep_every: int | None,
        guard: Callable[[], None],
    ):
        self.folder, self.models, self.students, self.identity = folder, models, students, identity
        self.keep, self.keep_every, self.guard = keep, keep_every, guard
        self._host: Parts = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def save(self, step: int, facts: Facts, check: Callable[[Parts], None]) -> None:
        """Copy the state after `step` updates and begin to write it, behind the save in flight if there is one.

        `check(copy)` runs on the thread before anything is written, and may raise to prevent it.
        """
        self.wait()
        copied = self._copy()

        def work() -> None:
            try:
                copied()
                check(self._host)
                with writing(self.folder):
                    checkpoint.write(
                        self.folder,
                        step,
                        self._host,
                        self.identity,
                        facts,
                        keep=self.keep,
                        keep_every=self.keep_every,
                        guard=self.guard,
                    )
            except BaseException as error:  # handed to the loop, whatever it is
                self._error = error

        self._thread = threading.Thread(target=work, name="minilm-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is in flight; raise the error of the last save, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Let a save in flight end; its error, if any, is dropped, because another one is on its way."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self) -> Callable[[], None]:
        """Copy the live state into host memory; returns what the thread calls to wait until that has happened."""
        live = checkpoint.capture(self.models, self.students)
        on_gpu = False
        for stem, tensors in live.items():
            host = self._host.setdefault(stem, {})
            for name, tensor in tensors.items():
                on_gpu |= tensor.is_cuda
                if name not in host:
                    host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                host[name].copy_(tensor.detach(), non_blocking=True)
        if not on_gpu:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize
