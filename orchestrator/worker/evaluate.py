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
    """What an evaluator is given. Students are in evaluation mode, and nothing records gradients.

    `progress(done, total)` is told of this worker's micro-batches, for each corpus.
    """

    distiller: Distiller
    corpora: Sequence[HeldOut]
    rows: int
    micro_batch: int
    autocast: torch.dtype | None
    world: World
    progress: Callable[[int, int], None] = lambda done, total: None

    def parts(self) -> Iterator[tuple[HeldOut, int, float]]:
        """Each corpus with how many of its first rows are measured, at least one, and its fraction of the mixture."""
        total = sum(corpus.weight for corpus in self.corpora)
        for corpus in self.corpora:
            fraction = corpus.weight / total
            yield corpus, min(max(1, round(self.rows * fraction)), corpus.rows.num_rows), fraction

    def batches_of(self, held_out: Rows, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This worker's micro-batches of the first `rows` rows, cut by length where rows have padding, on its device:
        input_ids int64 [rows, tokens], mask bool of the same shape or None without padding."""
        size, world = self.micro_batch, self.world
        mine = partition(-(-rows // size), world.rank, world.size)
        for number, index in enumerate(mine):
            self.progress(number, len(mine))
            batch = held_out.read(range(index * size, min((index + 1) * size, rows)))
            for ids, mask in by_length(batch.input_ids, batch.mask):
                yield ids.to(world.device), None if mask is None else mask.to(world.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This worker's micro-batches of all corpora."""
        for corpus, rows, _ in self.parts():
            yield from self.batches_of(corpus.rows, rows)


Evaluator = Callable[[HeldOutPass], dict[str, float]]  # a value by student, the same on every worker
EVALUATORS: dict[str, Evaluator] = {}


def evaluate(held_out: HeldOutPass) -> dict[str, dict[str, float]]:
    """Every measurement, by student and name: the divergence's terms, and probe/NAME for each row of `EVALUATORS`.

    Leaves the students in training mode.
    """
    held_out.distiller.eval()
    device = held_out.world.device.type
    with torch.no_grad(), torch.autocast(device, held_out.autocast, enabled=held_out.autocast is not None):
        found = heldout_divergence(held_out)
        for name, evaluator in EVALUATORS.items():
            for student, value in evaluator(held_out).items():
                found[student][f"probe/{name}"] = value
    held_out.distiller.train()
    return found


def heldout_divergence(held_out: HeldOutPass) -> dict[str, dict[str, float]]:
    """The objective's mean over about `rows` held-out rows, without dropout, by student and term.

    Values are in the objective's unit (nats a query). In a mixture each corpus gives its first held-out rows, in
    proportion to its weight (at least one row), and the mean over corpora is weighted in the same way; each corpus's
    own mean is under TERM/CORPUS.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in held_out.distiller.students}
    for corpus, rows, fraction in held_out.parts():
        for name, terms in _divergence(held_out, corpus.rows, rows).items():
            for term, mean in terms.items():
                found[name][term] = found[name].get(term, 0.0) + fraction * mean
                if len(held_out.corpora) > 1:
                    found[name][f"{term}/{corpus.name}"] = mean
    return found


def _divergence(held_out: HeldOutPass, corpus: Rows, rows: int) -> dict[str, dict[str, float]]:
    """Means over the first `rows` rows. Each worker takes a part of the micro-batches and all get the same result;
    sums are float64."""
    distiller, world = held_out.distiller, held_out.world
    students, width = list(distiller.students), distiller.num_terms
    sums = torch.zeros(len(students), width, dtype=torch.float64, device=world.device)
    count = 0.0
    for ids, mask in held_out.batches_of(corpus, rows):
        count += float(distiller.count(mask, ids.shape))
        teacher_output = distiller.teacher_forward(ids, mask)
        for row, name in enumerate(students):
            sums[row] += distiller.term_sums(name, teacher_output, ids, mask)
    *totals, count = world.all_reduce_host([*sums.flatten().tolist(), count])
    return {
        name: {term: totals[i * width + j] / count for j, term in enumerate(distiller.term_names)}
        for i, name in enumerate(students)
    }
