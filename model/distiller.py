"""A frozen teacher, its students and the objective as one object: the loop need not know that it distils.

Several students share one teacher pass. Each term depends on the teacher's taps and on one student alone, and
a student's dropout on the seed given for it alone: a student gets the same numbers, bit for bit, with or
without others beside it.

Invariants: the teacher is in eval mode whatever `.train()` is called on; it has no gradients, is not among
`parameters()` and not in `state_dict()`, so it cannot end in an optimiser, a DDP wrapper or a checkpoint.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from model.errors import ModelError
from model.objective import Objective
from model.tap import TappedEncoder, Taps


class Distiller(nn.Module):
    """`teacher` (frozen here, for good) and its `students` by name, compared by `objective`.

    `weights` float32 [num_terms], on the teacher's device: loss = (weights * term_sums).sum() / count.
    """

    weights: Tensor

    def __init__(
        self, teacher: TappedEncoder, students: Mapping[str, TappedEncoder], objective: Objective
    ) -> None:
        super().__init__()
        if not students:
            raise ModelError("a distiller needs at least one student")
        self._teacher = (teacher.requires_grad_(False).eval(),)  # a tuple: not a sub-module
        self.students = dict(students)
        # Not a ModuleDict: it refuses names such as "a.b".
        self._student_modules = nn.ModuleList(students.values())
        self.objective = objective
        self.term_names = objective.names
        self.num_terms = len(objective.names)
        self.register_buffer("weights", objective.weights.to(teacher.model.device), persistent=False)
        for name, student in students.items():
            if student.model is teacher.model:
                raise ModelError(f"student {name!r} is the teacher itself; load or build a model of its own")
            _compare(teacher, name, student, objective)

    @property
    def teacher(self) -> TappedEncoder:
        return self._teacher[0]

    @torch.no_grad()
    def teach(self, input_ids: Tensor, mask: Tensor | None) -> Taps:
        """The teacher's taps, without gradients; good for every student of this batch."""
        return self.teacher(input_ids, mask)

    def term_sums(
        self,
        name: str,
        teacher_taps: Taps,
        input_ids: Tensor,
        mask: Tensor | None,
        *,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """[num_terms], float32 or better, with gradients to student `name`: undivided and unweighted.

        dropout_seed: all that this student's dropout depends on; the global random state is left as it was.
        None draws from the global state, as any module does.
        """
        with _seeded(dropout_seed, input_ids.device):
            student_taps = self.students[name](input_ids, mask)
        return self.objective.term_sums(teacher_taps.to(student_taps.q.dtype), student_taps, mask)

    def count(self, mask: Tensor | None, shape: Iterable[int]) -> Tensor:
        """What term sums are divided by, see `Objective.count`."""
        return self.objective.count(mask, shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """.to(), .cuda(): the teacher goes where its students go."""
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _compare(teacher: TappedEncoder, name: str, student: TappedEncoder, objective: Objective) -> None:
    t, s = teacher.model.config, student.model.config
    if t.vocab_size != s.vocab_size:
        raise ModelError(
            f"student {name!r} has a vocabulary of {s.vocab_size} and the teacher of {t.vocab_size};"
            " both must read the same tokens"
        )
    try:
        objective.check(t.num_attention_heads, t.hidden_size, s.num_attention_heads, s.hidden_size)
    except ModelError as error:
        raise ModelError(f"student {name!r}: {error}") from None


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
