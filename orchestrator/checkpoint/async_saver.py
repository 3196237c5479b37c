"""Checkpoints in the background: the loop pays for a copy of the state, a thread checks and writes it.

At most one save is in flight. Its copy lives in host memory that is allocated once (page-locked beside a GPU, whose
copies are queued on the stream and waited for by the thread, so the loop never waits for the device). An error of
the thread is raised in the loop at its next step. The exception is a remote store that does not answer: that save is
given up with a warning, and a later one has its turn.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint.format import Fingerprints, ResumeState
from minilm.orchestrator.checkpoint.state import capture
from minilm.orchestrator.checkpoint.store import CheckpointStore, StoreUnavailable
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.system.write_errors import writing
from minilm.orchestrator.train.step import StudentState

log = logging.getLogger(__name__)

TensorsByFile = dict[str, dict[str, Tensor]]  # what `capture` returns


class AsyncSaver:
    """Saves `models` and `students` into `store`; `keep` and `keep_every` as for `checkpoint.write`.

    fence: checked before a save is written and again right before it is committed.
    given_up: the number of saves that were lost because the store did not answer.
    """

    def __init__(
        self,
        store: CheckpointStore,
        models: Mapping[str, torch.nn.Module],
        students: Sequence[StudentState],
        fingerprints: Fingerprints,
        *,
        keep: int,
        keep_every: int | None,
        fence: Fence,
    ):
        self.store, self.models, self.students, self.fingerprints = store, models, students, fingerprints
        self.keep, self.keep_every, self.fence = keep, keep_every, fence
        self.given_up = 0
        self._host: TensorsByFile = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def save(
        self, step: int, state: ResumeState, check: Callable[[TensorsByFile], None], *, must: bool = True
    ) -> None:
        """Copy the state after `step` updates and begin to write it, after the save in flight if there is one.

        `check(copy)` runs on the thread before anything is written, and may raise to prevent it. must: a store that
        does not answer is an error.
        """
        self.wait()
        copied = self._copy()

        def work() -> None:
            try:
                copied()
                self.fence.check()
                check(self._host)
                with writing(self.store.where):
                    checkpoint.write(
                        self.store,
                        step,
                        self._host,
                        self.fingerprints,
                        state,
                        keep=self.keep,
                        keep_every=self.keep_every,
                        guard=self.fence.check,
                    )
            except StoreUnavailable as error:
                if must:
                    self._error = error
                    return
                self.given_up += 1
                log.warning(
                    "step %d is NOT saved (%d saves given up so far), the run goes on and saves again later: %s",
                    step,
                    self.given_up,
                    error,
                )
            except BaseException as error:  # handed to the loop, whatever it is
                self._error = error

        self._thread = threading.Thread(target=work, name="minilm-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is in flight; raise the error of the last save, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait_a_little(self, seconds: float) -> None:
        """Wait until nothing is in flight, for at most `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def close(self) -> None:
        """Wait for the save in flight; its error is dropped, because the caller is already raising another one."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self) -> Callable[[], None]:
        """Begin to copy the live state into host memory; the thread calls what is returned to wait for the copy."""
        live = capture(self.models, self.students)
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
