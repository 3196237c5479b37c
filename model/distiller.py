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

from minilm.model.encoder.shape import picked_layers, tapped_layer
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.encoder.taps import Taps
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective


class Distiller(nn.Module):
    """`teacher` (frozen here, for good) and its `students` by name, compared by `objective`.

    `weights` float32 [num_terms], on the teacher's device: loss = (weights * term_sums).sum() / count.
    `head_shape`: relations, named `objective.relation_names`, and heads of each.
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
        heads = objective.relation_heads or teacher.model.config.num_attention_heads
        self.head_shape = len(objective.relation_names), heads
        self.register_buffer("weights", objective.weights.to(teacher.model.device), persistent=False)
        self._projections: dict[str, dict[str, nn.Linear]] = {}
        self._mapped: dict[str, list[int]] = {}
        for name, student in students.items():
            if student.model is teacher.model:
                raise ModelError(f"student {name!r} is the teacher itself; load or build a model of its own")
            _compare(teacher, name, student, objective)
            hidden_sizes = teacher.model.config.hidden_size, student.model.config.hidden_size
            projections = objective.projections(*hidden_sizes)
            self._projections[name] = {key: p.to(student.model.device) for key, p in projections.items()}
            self._mapped[name] = _mapped_layers(teacher, name, student) if objective.layer_to_layer else []
            earlier = range(1, student.layer) if objective.layer_to_layer else ()
            student.watch(layers=tuple(earlier), parts=objective.parts)
        self._projection_modules = nn.ModuleList(
            p for own in self._projections.values() for p in own.values()
        )
        self._watched = sorted({layer for mapped in self._mapped.values() for layer in mapped})
        teacher.watch(layers=self._watched, parts=objective.parts)

    @property
    def teacher(self) -> TappedEncoder:
        return self._teacher[0]

    @torch.no_grad()
    def teacher_forward(self, input_ids: Tensor, mask: Tensor | None) -> Taps:
        """The teacher's taps, without gradients; good for every student of this batch."""
        masked = self.objective.mask_tokens(input_ids, mask)
        return (
            self.teacher(input_ids, mask)
            if masked is None
            else self.teacher(masked.ids, mask, masked.positions)
        )

    def term_sums(
        self,
        name: str,
        teacher_taps: Taps,
        input_ids: Tensor,
        mask: Tensor | None,
        *,
        dropout_seed: int | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """[num_terms], float32 or better, with gradients to student `name`: undivided and unweighted.

        dropout_seed: all that this student's dropout depends on; the global random state is left as it was.
        None draws from the global state, as any module does. heads: `head_shape`; where given, the relations'
        undivided sums by head are added to it, which costs a forward of the loss.
        """
        masked = self.objective.mask_tokens(input_ids, mask)
        inputs = (input_ids, mask) if masked is None else (masked.ids, mask, masked.positions)
        with _seeded(dropout_seed, input_ids.device):
            student_taps = self.students[name](*inputs)
        earlier = [
            taps
            for at, taps in zip(self._watched, teacher_taps.earlier, strict=True)
            if at in self._mapped[name]
        ]
        taught = teacher_taps._replace(earlier=tuple(earlier)).like(student_taps)
        if heads is not None:
            heads += self.objective.head_sums(taught, student_taps, mask)
        return self.objective.term_sums(taught, student_taps, mask, self._projections[name], masked)

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """What an optimiser of student `name` updates: the student's, and the projections of its terms."""
        trained = self.students[name].trained_parameters()
        for term, projection in self._projections[name].items():
            trained |= {f"projection.{term}.{key}": p for key, p in projection.named_parameters()}
        return trained

    def state_module(self, name: str) -> nn.Module:
        """The module whose state a checkpoint of student `name` holds: its model, and projections if it has
        any."""
        if not self._projections[name]:
            return self.students[name].model
        projections = nn.ModuleList(self._projections[name].values())
        return nn.ModuleDict({"student": self.students[name].model, "projection": projections})

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
    for side, model in ((f"student {name!r}", student.model), ("the teacher", teacher.model)):
        if objective.needs_head and model.base_model is model:
            raise ModelError(
                f"soft labels need a masked-language-model head, and {side} has none; load it with one"
            )
    try:
        objective.check(t.num_attention_heads, t.hidden_size, s.num_attention_heads, s.hidden_size)
    except ModelError as error:
        raise ModelError(f"student {name!r}: {error}") from None


def _mapped_layers(teacher: TappedEncoder, name: str, student: TappedEncoder) -> list[int]:
    """The teacher's layers for layers 1 to M-1 of the student; its last goes with the teacher's tap."""
    if student.layer > teacher.layer:
        raise ModelError(
            f"student {name!r} has {student.layer} layers and the teacher {teacher.layer} up to its tap;"
            " layer-to-layer needs a student that is not deeper"
        )
    *earlier, _ = picked_layers(teacher.layer, student.layer)
    return [tapped_layer(teacher.model.config, layer) for layer in earlier]


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
