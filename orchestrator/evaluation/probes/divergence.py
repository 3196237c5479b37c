"""The objective on held-out rows: the divergence of the students from their teacher."""

from __future__ import annotations

import math

import torch

from minilm.data.read.rows import Rows
from minilm.orchestrator.evaluation.probes.evaluator import Evaluator, HeldOutPass


class Divergence(Evaluator):
    """The objective's mean over about `rows` held-out rows, without dropout, by student and term.

    Values are in the objective's unit (nats a query). In a mixture each corpus gives its first held-out rows, in
    proportion to its weight (at least one row), and the mean over corpora is weighted in the same way; each corpus's
    own mean is under TERM/CORPUS.
    """

    def run(self, given: HeldOutPass) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {name: {} for name in given.distiller.students}
        for corpus, rows, fraction in given.parts():
            for name, terms in self.means(given, corpus.rows, rows).items():
                for term, mean in terms.items():
                    found[name][term] = found[name].get(term, 0.0) + fraction * mean
                    if len(given.corpora) > 1:
                        found[name][f"{term}/{corpus.name}"] = mean
        return found

    @staticmethod
    def means(given: HeldOutPass, corpus: Rows, rows: int) -> dict[str, dict[str, float]]:
        """Means over the first `rows` rows. Each worker computes a part of the micro-batches; their sums, float64, are
        added in their order, so that all get the same bits, however many they are."""
        distiller = given.distiller
        students, width = list(distiller.students), distiller.num_terms
        sums = torch.zeros(given.num_batches(rows), len(students) * width + 1, dtype=torch.float64)
        sums = sums.to(given.world.device)
        for batch in given.batches_of(corpus, rows):
            own = sums[batch.number]
            own[-1] += distiller.count(batch.mask, batch.ids.shape)
            teacher_output = distiller.teacher_forward(batch.ids, batch.mask)
            for i, name in enumerate(students):
                own[i * width : (i + 1) * width] += distiller.term_sums(
                    name, teacher_output, batch.ids, batch.mask
                )
        by_batch = given.world.merge(sums.cpu()).tolist()
        *totals, count = (math.fsum(values) for values in zip(*by_batch, strict=True))
        return {
            name: {term: totals[i * width + j] / count for j, term in enumerate(distiller.term_names)}
            for i, name in enumerate(students)
        }
