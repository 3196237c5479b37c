"""What is measured on held-out rows while a stage trains: the divergence from the teacher, and whatever else has a
row in `EVALUATORS`. Training's bits do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilm.data.read.rows import Rows
from minilm.data.stream import partition
from minilm.model.distiller import Distiller
from minilm.orchestrator.feed.corpora import HeldOut
from minilm.orchestrator.train.bucketing import by_length
from minilm.orchestrator.train.distributed import World


@dataclass(frozen=True)
class HeldOutPass:
    """What an evaluator is given. Students are in evaluation mode, and nothing records gradients."""

    distiller: Distiller
    corpora: Sequence[HeldOut]
    rows: int
    micro_batch: int
    autocast: torch.dtype | None
    world: World

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This worker's part of the first held-out rows, on its device: input_ids int64 [rows, tokens], mask bool of
        the same shape or None without padding."""
        total = sum(corpus.weight for corpus in self.corpora)
        for corpus in self.corpora:
            rows = max(1, round(self.rows * corpus.weight / total))
            yield from held_out_batches(corpus.rows, rows, self.micro_batch, self.world)


Evaluator = Callable[[HeldOutPass], dict[str, float]]  # a value by student, the same on every worker
EVALUATORS: dict[str, Evaluator] = {}


def evaluate(held_out: HeldOutPass) -> dict[str, dict[str, float]]:
    """Every measurement, by student and name: the divergence's terms, and probe/NAME for each row of `EVALUATORS`."""
    found = heldout_divergence(
        held_out.distiller,
        held_out.corpora,
        rows=held_out.rows,
        micro_batch=held_out.micro_batch,
        autocast=held_out.autocast,
        world=held_out.world,
    )
    held_out.distiller.eval()
    device = held_out.world.device.type
    with torch.no_grad(), torch.autocast(device, held_out.autocast, enabled=held_out.autocast is not None):
        for name, evaluator in EVALUATORS.items():
            for student, value in evaluator(held_out).items():
                found[student][f"probe/{name}"] = value
    held_out.distiller.train()
    return found


def heldout_divergence(
    distiller: Distiller,
    corpora: Sequence[HeldOut],
    *,
    rows: int,
    micro_batch: int,
    autocast: torch.dtype | None,
    world: World,
) -> dict[str, dict[str, float]]:
    """The objective's mean over about `rows` held-out rows, without dropout, by student and term.

    Values are in the objective's unit (nats a query). In a mixture each corpus gives its first held-out rows, in
    proportion to its weight (at least one row), and the mean over corpora is weighted in the same way; each corpus's
    own mean is under TERM/CORPUS. Leaves the students in training mode.
    """
    total = sum(corpus.weight for corpus in corpora)
    found: dict[str, dict[str, float]] = {name: {} for name in distiller.students}
    distiller.eval()
    for corpus in corpora:
        part = corpus.weight / total
        means = _divergence(distiller, corpus.rows, max(1, round(rows * part)), micro_batch, autocast, world)
        for name, terms in means.items():
            for term, mean in terms.items():
                found[name][term] = found[name].get(term, 0.0) + part * mean
                if len(corpora) > 1:
                    found[name][f"{term}/{corpus.name}"] = mean
    distiller.train()
    return found


def _divergence(
    distiller: Distiller,
    held_out: Rows,
    rows: int,
    micro_batch: int,
    autocast: torch.dtype | None,
    world: World,
) -> dict[str, dict[str, float]]:
    """Means over the first `rows` rows. Each worker takes a part of the micro-batches and all get the same result;
    sums are float64."""
    device = world.device
    students = list(distiller.students)
    sums = torch.zeros(len(students), distiller.num_terms, dtype=torch.float64, device=device)
    count = 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for ids, mask in held_out_batches(held_out, rows, micro_batch, world):
            count += float(distiller.count(mask, ids.shape))
            teacher_output = distiller.teacher_forward(ids, mask)
            for row, name in enumerate(students):
                sums[row] += distiller.term_sums(name, teacher_output, ids, mask)
    *totals, count = world.all_reduce_host([*sums.flatten().tolist(), count])
    width = distiller.num_terms
    return {
        name: {term: totals[i * width + j] / count for j, term in enumerate(distiller.term_names)}
        for i, name in enumerate(students)
    }


def held_out_batches(
    held_out: Rows, rows: int, micro_batch: int, world: World
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This worker's micro-batches of the first `rows` rows, cut by length where rows have padding, on its device."""
    rows = min(rows, held_out.num_rows)
    for index in partition(-(-rows // micro_batch), world.rank, world.size):
        batch = held_out.read(range(index * micro_batch, min((index + 1) * micro_batch, rows)))
        for ids, mask in by_length(batch.input_ids, batch.mask):
            yield ids.to(world.device), None if mask is None else mask.to(world.device)
