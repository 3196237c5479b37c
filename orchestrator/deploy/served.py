"""An encoder that another program computes, and whether it computes what PyTorch does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.batches import most_tokens

TOLERANCE = 1e-4
LONGEST = 300  # tokens: more than the window of those layers that see one only


class ServedEncoder:
    """Called as an encoder of transformers is, so that an evaluation takes it for one.

    inputs: names of those that the program takes; compute: int64 arrays [rows, tokens] by these names into float32
    [rows, tokens, hidden].
    """

    def __init__(
        self, config: Any, inputs: Sequence[str], compute: Callable[[dict[str, np.ndarray]], np.ndarray]
    ):
        self.config = config
        self._inputs, self._compute = tuple(inputs), compute

    def to(self, device: torch.device) -> ServedEncoder:
        return self

    def eval(self) -> ServedEncoder:
        return self

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        arrays = {name: inputs[name].cpu().numpy() for name in self._inputs}
        return SimpleNamespace(last_hidden_state=torch.from_numpy(self._compute(arrays)))


def ragged_batches(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Batches of rows of different lengths, from one token to `LONGEST` or what the model takes, with random ids."""
    generator, config = torch.Generator().manual_seed(0), model.config
    longest, padding = most_tokens(model, LONGEST), config.pad_token_id or 0
    for lengths in ((1,), (longest,), (longest, 1, 1 + longest // 2), (5, 3, 8, 1, 2)):
        sizes = [min(length, longest) for length in lengths]
        shape = (len(sizes), max(sizes))
        ids = torch.randint(0, config.vocab_size - 1, shape, generator=generator)
        ids += ids >= padding  # any id but that of padding
        mask = (torch.arange(shape[1]) < torch.tensor(sizes)[:, None]).long()
        values = {
            "input_ids": torch.where(mask.bool(), ids, padding),
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(ids),
        }
        yield {name: values[name] for name in names}


def largest_difference(model: PreTrainedModel, served: ServedEncoder, names: Sequence[str]) -> float:
    """The largest difference of two encoders' hidden states at valid tokens of ragged batches, over the largest of
    PyTorch's states where that is more than 1."""
    worst = 0.0
    with torch.inference_mode():
        for inputs in ragged_batches(model, names):
            valid = inputs["attention_mask"].bool()
            expected = model(**inputs).last_hidden_state[valid]
            got = served(**inputs).last_hidden_state[valid]
            scale = max(1.0, float(expected.abs().max()))
            worst = float(np.maximum(worst, float((got - expected).abs().max()) / scale))  # keeps a NaN
    return worst


def check_same(
    name: str, format: str, difference: float, versions: Mapping[str, str], tolerance: float = TOLERANCE
) -> None:
    """UserError where the difference is larger than `tolerance`, or none at all."""
    if not difference <= tolerance:
        made = ", ".join(f"{package} {version}" for package, version in versions.items())
        raise UserError(
            f"{name} as {format} differs from PyTorch by {difference:.1e} on ragged batches, allowed {tolerance:g}, "
            f"so nothing was written; try other versions of {made}"
        )
