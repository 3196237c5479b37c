"""How teacher and students of a stage make the vectors that `objective: embedding` compares, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

from minilm.model.compatibility import student_layout, teacher_layout
from minilm.model.encoder.sentence_layout import SentenceLayout, read_layout
from minilm.model.encoder.shape import EncoderShape
from minilm.model.loss.objective import Objective
from minilm.orchestrator.recipe.schema import Stage

Layouts = Mapping[str, SentenceLayout]  # of earlier stages' students that make vectors, by name


def stage_vectors(
    stage: Stage, objective: Objective, source: str | None, teacher: EncoderShape, earlier: Layouts
) -> SentenceLayout:
    """The teacher's layout, from its folder `source`, or of an earlier student. ModelError where nothing tells it."""
    own = read_layout(source, teacher.hidden) if source else earlier.get(stage.teacher)
    return teacher_layout(objective, f"the teacher {stage.teacher}", own, teacher.hidden)


def student_vectors(
    stage: Stage,
    objective: Objective,
    vectors: SentenceLayout,
    teacher: EncoderShape,
    students: Mapping[str, EncoderShape],
    starts: Mapping[str, str],
    earlier: Layouts,
) -> dict[str, SentenceLayout]:
    """The layout of every student whose shape is known. ModelError where one cannot give the teacher's vectors.

    vectors: the teacher's. starts: folders that students go on from; other students may go on from an earlier one.
    """
    found = {}
    for student in stage.students:
        if (shape := students.get(student.name)) is not None:
            start = starts.get(student.name)
            begun = read_layout(start, shape.hidden) if start else earlier.get(student.init)
            sizes = teacher.hidden, shape.hidden
            found[student.name] = student_layout(student.name, objective, vectors, *sizes, begun)
    return found
