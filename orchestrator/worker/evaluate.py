"""The students' divergence from their teacher on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minilm.data.read.rows import Rows
from minilm.data.stream import partition
from minilm.model.distiller import Distiller
from minilm.orchestrator.feed.corpora import HeldOut
from minilm.orchestrator.train.bucketing import by_length
from minilm.orchestrator.train.distributed import World


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
    rows = min(rows, held_out.num_rows)
    device = world.device
    students = list(distiller.students)
    sums = torch.zeros(len(students), distiller.num_terms, dtype=torch.float64, device=device)
    count = 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for index in partition(-(-rows // micro_batch), world.rank, world.size):
            batch = held_out.read(range(index * micro_batch, min((index + 1) * micro_batch, rows)))
            count += float(distiller.count(batch.mask, batch.input_ids.shape))
            for ids, mask in by_length(batch.input_ids, batch.mask):
                ids, mask = ids.to(device), None if mask is None else mask.to(device)
                teacher_output = distiller.teacher_forward(ids, mask)
                for row, name in enumerate(students):
                    sums[row] += distiller.term_sums(name, teacher_output, ids, mask)
    *totals, count = world.all_reduce_host([*sums.flatten().tolist(), count])
    width = distiller.num_terms
    return {
        name: {term: totals[i * width + j] / count for j, term in enumerate(distiller.term_names)}
        for i, name in enumerate(students)
    }
