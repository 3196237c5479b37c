"""The stream as an ordinary `torch.utils.data.IterableDataset`, for loops that know nothing of this project.

One element is a micro-batch as a dict of tensors; `state_dict()` is the number of elements handed out, and seed and
fingerprint so that a state of other data is refused. Resuming costs nothing: rows are a function of the step.
Rank and world size are plain arguments, so the same class serves a Megatron external data loader, a fairseq-style
loop, or a bare script. Use it with `DataLoader(dataset, batch_size=None, num_workers=0)`: a thread reads ahead, worker
processes would only copy (and are refused). Examples: docs/data.md.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from minilm.data.errors import DataError
from minilm.data.read.rows import Corpus, Rows
from minilm.data.stream import Stream, partition


class StreamDataset(IterableDataset[dict[str, Tensor]]):
    """Micro-batches of steps 0 … num_steps - 1 that worker `rank` of `world_size` computes, in order.

    Elements: {"input_ids": int64 [micro_batch, seq_len], "attention_mask": bool, same shape, "row_ids": int64
    [micro_batch], "step": int}. Rows of packing "masked" hold several documents, and nothing may look from one into
    another: "document_ids" (int64, the shape of input_ids) counts them in a row from 1, 0 at padding. Iterating
    again goes on where the last iteration ended; set the position with `load_state_dict` or `set_step`.
    """

    def __init__(
        self,
        source: Path | Rows | Sequence[Corpus],
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        window: int | None = None,
        pin: bool = False,
    ):
        self._stream = Stream(source, seed=seed, batch=batch, micro_batch=micro_batch, window=window, pin=pin)
        self._mine = partition(self._stream.num_micro_batches, rank, world_size)
        self._seed, self._num_steps = seed, num_steps
        self._identity = {
            "seed": seed,
            "batch": batch,
            "micro_batch": micro_batch,
            "window": window,
            "fingerprint": self._stream.fingerprint,
        }
        self._step, self._taken = 0, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise DataError("the stream reads ahead on a thread of its own; use DataLoader(…, num_workers=0)")
        if self._taken:  # the rest of a step that was begun
            for index in self._mine[self._taken :]:
                batch = self._stream.micro_batch(self._step, index)
                yield self._handed_out(batch)
        batches = self._stream.iterate(self._step, self._num_steps, self._mine)
        try:
            for batch in batches:
                yield self._handed_out(batch)
        finally:
            batches.close()

    def _handed_out(self, batch: Any) -> dict[str, Any]:
        step = self._step
        self._taken += 1
        if self._taken == len(self._mine):
            self._step, self._taken = step + 1, 0
        mask = (
            batch.mask if batch.mask is not None else batch.input_ids.new_ones(batch.input_ids.shape).bool()
        )
        handed_out = {
            "input_ids": batch.input_ids,
            "attention_mask": mask,
            "row_ids": batch.row_ids,
            "step": step,
        }
        if batch.ends is not None:
            handed_out["document_ids"] = (batch.ends.cumsum(dim=1) - batch.ends.long() + 1) * mask
        return handed_out

    def __len__(self) -> int:
        return (self._num_steps - self._step) * len(self._mine) - self._taken

    def set_step(self, step: int) -> None:
        """Go to the begin of a step, which any worker count can continue from."""
        self._step, self._taken = step, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last element handed out, and the identity of the stream."""
        return {**self._identity, "step": self._step, "taken": self._taken, "of": len(self._mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state`. DataError if it belongs to other data or another order, or was saved inside a step
        with another worker count."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"the saved position belongs to another stream: {name} was {state.get(name)!r}, is {value!r} now"
                )
        if state["taken"] and state["of"] != len(self._mine):
            raise DataError(
                f"the position lies inside step {state['step']} and was saved with another number of workers; "
                f"save at the end of a step, or go back to its begin with set_step({state['step']})"
            )
        self._step, self._taken = int(state["step"]), int(state["taken"])
