"""A frozen teacher, its students and the objective as one object: the loop need not know that it distils.

Several students share one teacher pass. Each term depends on the teacher's taps and on one student alone, and
a student's dropout on the seed given for it alone: a student gets the same numbers, bit for bit, with or
without others beside it.

Invariants: the teacher is in eval mode whatever `.train()` is called on; it has no gradients, is not among
`parameters()` and not in `state_dict()`, so it cannot end in an optimiser, a DDP wrapper or a checkpoint.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from minilm.model.compatibility import check_student, check_teacher, mapped_layers
from minilm.model.encoder.shape import EncoderShape, shape_of
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.encoder.taps import Blocks, Taps
from minilm.model.errors import ModelError
from minilm.model.loss.masking import Masked
from minilm.model.loss.objective import Objective


class TeacherOutput(NamedTuple):
    """The teacher's side of a batch, shared by all students: its taps, and the masked rows it read for soft labels."""

    taps: Taps
    masked: Masked | None = None


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
        teacher_shape = _shape(teacher)
        check_teacher(objective, teacher_shape, teacher.layer)
        if objective.embeds and any(encoder.head is None for encoder in (teacher, *students.values())):
            raise ModelError(
                "an embedding compares pooled vectors: set `head` of the teacher and of every student"
            )
        for name, student in students.items():
            if student.model is teacher.model:
                raise ModelError(f"student {name!r} is the teacher itself; load or build a model of its own")
            student_shape = replace(_shape(student), layers=student.layer)
            check_student(name, objective, teacher_shape, student_shape, layer=teacher.layer)
            hidden_sizes = teacher.model.config.hidden_size, student.model.config.hidden_size
            projections = objective.projections(*hidden_sizes)
            self._projections[name] = {key: p.to(student.model.device) for key, p in projections.items()}
            self._mapped[name] = []
            if objective.layer_to_layer:
                self._mapped[name] = mapped_layers(teacher_shape, teacher.layer, student.layer)
            earlier = range(1, student.layer) if objective.layer_to_layer else ()
            student.watch(layers=tuple(earlier), fields=objective.fields)
        self._projection_modules = nn.ModuleList(
            p for own in self._projections.values() for p in own.values()
        )
        self._watched = sorted({layer for mapped in self._mapped.values() for layer in mapped})
        teacher.watch(layers=self._watched, fields=objective.fields)

    @property
    def teacher(self) -> TappedEncoder:
        return self._teacher[0]

    @torch.no_grad()
    def teacher_forward(self, input_ids: Tensor, mask: Tensor | Blocks | None) -> TeacherOutput:
        """The teacher's taps of this batch, without gradients; they serve every student. For blocks see
        `TappedEncoder.forward`; an objective takes them where `takes_blocks` says so."""
        masked = None if isinstance(mask, Blocks) else self.objective.mask_tokens(input_ids, mask)
        return TeacherOutput(_forward(self.teacher, input_ids, mask, masked), masked)

    def term_sums(
        self,
        name: str,
        teacher: TeacherOutput,
        input_ids: Tensor,
        mask: Tensor | Blocks | None,
        *,
        dropout_seed: int | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """[num_terms], float32 or better, with gradients to student `name`: undivided and unweighted.

        teacher: what `teacher_forward` gave for the same input_ids and mask. dropout_seed: all that this student's
        dropout depends on; the global random state is left as it was. None draws from the global state, as any
        module does. heads: `head_shape`; where given, the relations' undivided sums by head are added to it, which
        costs a forward of the loss.
        """
        with _seeded(dropout_seed, input_ids.device):
            student_taps = _forward(self.students[name], input_ids, mask, teacher.masked)
        mapped = zip(self._watched, teacher.taps.earlier, strict=True)
        earlier = tuple(taps for layer, taps in mapped if layer in self._mapped[name])
        teacher_taps = teacher.taps._replace(earlier=earlier).like(student_taps)
        if heads is not None:
            heads += self.objective.head_sums(teacher_taps, student_taps, mask)
        return self.objective.term_sums(
            teacher_taps, student_taps, mask, self._projections[name], teacher.masked
        )

    def trained_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that an optimiser of student `name` updates: the student's, its projections', its head's."""
        trained = self.students[name].trained_parameters()
        for term, projection in self._projections[name].items():
            trained |= {f"projection.{term}.{key}": p for key, p in projection.named_parameters()}
        if (head := self.students[name].head) is not None:
            trained |= {f"head.{key}": p for key, p in head.named_parameters()}
        return trained

    def state_module(self, name: str) -> nn.Module:
        """The module whose state a checkpoint of student `name` holds: its model, and what is trained beside it."""
        student = self.students[name]
        beside: dict[str, nn.Module] = {}
        if self._projections[name]:
            beside["projection"] = nn.ModuleList(self._projections[name].values())
        if student.head is not None and any(True for _ in student.head.parameters()):
            beside["head"] = student.head
        return nn.ModuleDict({"student": student.model, **beside}) if beside else student.model

    def count(self, mask: Tensor | None, shape: Iterable[int]) -> Tensor:
        """The number that term sums are divided by, see `Objective.count`."""
        return self.objective.count(mask, shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """.to(), .cuda(): the teacher goes where its students go."""
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _forward(
    encoder: TappedEncoder, input_ids: Tensor, mask: Tensor | Blocks | None, masked: Masked | None
) -> Taps:
    if masked is None:
        return encoder(input_ids, mask)
    return encoder(masked.ids, mask, masked.positions)


def _shape(encoder: TappedEncoder) -> EncoderShape:
    """The shape of a model in memory: whether it has a head is seen, not read off its config."""
    model = encoder.model
    return replace(shape_of(model.config), has_head=model.base_model is not model)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
