"""What a careful colleague would say of a recipe that is sound: warnings, each with the figure behind it.

None of them is an error. They are of what is known here: a teacher's shape from its config, or by its hub id for those
that the papers name; the text's length where it is on this machine. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from minilm.orchestrator.recipe.language.assistant import asks_for_assistant, known_shape, known_tokens
from minilm.orchestrator.recipe.schema import Recipe, Stage, Student

if TYPE_CHECKING:
    from minilm.orchestrator.plan.reading import Reading
    from minilm.orchestrator.resolve.stages import ResolvedStage

# Muennighoff et al. 2023 (arXiv:2305.16264), of language models: 4 passes are almost as good as new text; beyond 40 no
# more is gained
MOST_EPOCHS = 40
# MiniLM: 3e-4 at 256 rows, 4e-4 to 6e-4 at 512, 5e-4 at 1,024, 6e-4 at 2,048; MiniLMv2: 6e-4 at 256
RATE, ROWS, FAR = 3e-4, 256, 5
# for each weight: the papers' students see 2,000 and more; Hoffmann et al. 2022 (arXiv:2203.15556) have 20 for language
# models
FEWEST_TOKENS = 20
SMALLEST_HEAD = 16  # the papers' students have heads of 32 and 64


class _Shape(NamedTuple):
    layers: int
    hidden: int
    heads: int | None
    ffn: int

    @property
    def weights(self) -> int:
        return weights_in_layers(self.layers, self.hidden, self.ffn)

    def __str__(self) -> str:
        return f"{self.layers} x {self.hidden}"


def advice(
    recipe: Recipe,
    resolved: Sequence[ResolvedStage] = (),
    data: Reading | None = None,
    seq_len: int | None = None,
) -> list[str]:
    """A line a warning. resolved: the stages, empty where no teacher is here. seq_len: of the data, None if unknown."""
    here = {one.stage.name: one for one in resolved}
    shapes: dict[str, _Shape] = {}  # of students
    teachers: dict[str, _Shape | None] = {}  # of each student
    lines: list[str] = []
    for stage in recipe.stages:
        one = here.get(stage.name)
        teacher = shapes.get(stage.teacher) or _teacher(stage, one)
        students = {student.name: _student(student, one, teacher) for student in stage.students}
        warnings = [
            *_rate(stage),
            *_epochs(stage, data),
            *_positions(stage, one, seq_len),
            *_sizes(stage, students, teacher),
        ]
        if stage.objective != "embedding":  # the papers' rules are of relations
            warnings += _tokens(stage, students, teacher, seq_len)
            warnings += _assistant(stage, students, teacher, teachers.get(stage.teacher))
        lines += [f"stage {stage.name}: {text}" for text in warnings]
        shapes |= students
        teachers |= dict.fromkeys(students, teacher)
    return lines


def weights_in_layers(layers: int, hidden: int, ffn: int) -> int:
    """Of the matrices of an encoder's layers."""
    return layers * (4 * hidden**2 + 2 * hidden * ffn)


def _teacher(stage: Stage, here: ResolvedStage | None) -> _Shape | None:
    if here and here.teacher:
        return _Shape(here.teacher.layers, here.teacher.hidden, here.teacher.heads, here.teacher.ffn)
    known = known_shape(stage.teacher)
    return _Shape(*known, None, 4 * known[1]) if known else None


def _student(student: Student, here: ResolvedStage | None, teacher: _Shape | None) -> _Shape:
    if here and (shape := here.students.get(student.name)):
        return _Shape(shape.layers, shape.hidden, shape.heads, shape.ffn)
    heads = student.heads or (teacher.heads if teacher else None)
    return _Shape(student.layers, student.hidden, heads, student.ffn or 4 * student.hidden)


def _rate(stage: Stage) -> Iterator[str]:
    suggested = RATE * math.sqrt(max(stage.batch, ROWS) / ROWS)
    if stage.peak_lr > FAR * suggested:
        how = f"{stage.peak_lr / suggested:.0f} times"
    elif stage.peak_lr < suggested / FAR:
        how = f"1/{suggested / stage.peak_lr:.0f} of"
    else:
        return
    yield (
        f"peak_lr {stage.peak_lr:g} is {how} what a batch of {stage.batch:,} rows suggests ({suggested:.1g}; the "
        f"papers have 3e-4 at 256 rows, 6e-4 at 2,048)"
    )


def _epochs(stage: Stage, data: Reading | None) -> Iterator[str]:
    for corpus in data.corpora if data else ():
        times = stage.steps * stage.batch * corpus.share / max(corpus.rows, 1)
        if round(times) > MOST_EPOCHS:
            about = "about " if corpus.estimated else ""
            yield (
                f"reads {corpus.name} {about}{times:,.0f} times ({about}{corpus.rows:,.0f} rows); language models gain "
                f"next to nothing beyond {MOST_EPOCHS} (arXiv:2305.16264): more text, or fewer steps"
            )


def _positions(stage: Stage, here: ResolvedStage | None, seq_len: int | None) -> Iterator[str]:
    """Of a teacher that is not here; of one that is, rows that are too long are an error."""
    longest = None if here and here.teacher else known_tokens(stage.teacher)
    if longest and seq_len and seq_len > longest:
        yield (
            f"rows are {seq_len} tokens long and {stage.teacher} takes at most {longest}, so that a run will refuse "
            f"them; give a smaller seq_len"
        )


def _tokens(
    stage: Stage, students: dict[str, _Shape], teacher: _Shape | None, seq_len: int | None
) -> Iterator[str]:
    """Not of students that start from whole layers of the teacher: the quickstart's learns from 0.08 for each."""
    tokens = stage.steps * stage.batch * (seq_len or 0)
    for student, (name, shape) in zip(stage.students, students.items(), strict=True):
        whole = student.init == "teacher-layers" and (not teacher or teacher.hidden == shape.hidden)
        if 0 < tokens < FEWEST_TOKENS * shape.weights and not whole:
            yield (
                f"student {name} ({shape}) sees {_short(tokens)} tokens for {_short(shape.weights)} weights in its "
                f"layers, {tokens / shape.weights:.2g} for each; fewer than {FEWEST_TOKENS} are far too few (the "
                f"papers have 2,000 and more): more steps, a smaller student, or one of the teacher's width with "
                f"init: teacher-layers"
            )


def _sizes(stage: Stage, students: dict[str, _Shape], teacher: _Shape | None) -> Iterator[str]:
    beside = "" if stage.objective == "embedding" else " with relation_heads in the stage"
    for student, (name, shape) in zip(stage.students, students.items(), strict=True):
        if teacher and shape.weights >= teacher.weights:
            yield f"student {name} ({shape}) is no smaller than its teacher ({teacher})"
        if shape.heads and shape.hidden // shape.heads < SMALLEST_HEAD and not student.starts_from:
            yield (
                f"student {name} has heads of {shape.hidden // shape.heads} dimensions (hidden {shape.hidden}, "
                f"{shape.heads} heads); the papers' have 32 and 64: a larger hidden, or fewer heads{beside}"
            )


def _assistant(
    stage: Stage, students: dict[str, _Shape], teacher: _Shape | None, above: _Shape | None
) -> Iterator[str]:
    """above: the teacher's own teacher, where the teacher is an earlier student."""
    if teacher is None:
        return
    asking = [name for name, s in students.items() if asks_for_assistant(teacher[:2], s[:2])]
    if asking:
        yield (
            f"student {', '.join(asking)} has at most half of the layers and of the hidden size of its teacher "
            f"({teacher}), and no assistant, which the papers' rule asks for; assistant: auto in the stage makes it"
        )
    like_assistant = above and all((above.layers, s.hidden) == teacher[:2] for s in students.values())
    if above and like_assistant and not any(asks_for_assistant(above[:2], s[:2]) for s in students.values()):
        ends = " and ".join(map(str, (above, *students.values())))
        yield (
            f"its teacher {stage.teacher} ({teacher}) is an assistant between {ends}, for which the papers' rule "
            f"asks for none (at most {above.layers // 2} layers and hidden {above.hidden // 2}); it costs a stage"
        )


def _short(number: float) -> str:
    """1234567 → 1.2 M."""
    for unit, size in ((" billion", 1e9), (" M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
