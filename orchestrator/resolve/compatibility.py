"""Teacher, data and students against each other, from configurations alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minilm.data.tokenizer import (
    has_tokenizer,
    load_tokenizer,
    pipeline_difference,
    pipeline_fingerprint,
    vocabulary_fingerprint,
)
from minilm.model.encoder.shape import EncoderShape, load_config, shape_of, tapped_layer
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.references import (
    StudentRef,
)
from minilm.orchestrator.recipe.schema import Recipe, Stage
from minilm.orchestrator.resolve.folders import model_folder
from minilm.orchestrator.stage.data import DataSpec
from minilm.orchestrator.stage.folder import RunFolder


def check_stages(recipe: Recipe, workdir: RunFolder, data: DataSpec) -> None:
    """Every stage's teacher, data and students against each other before the first one runs. Raises `UserError`.

    The teacher of a later stage need not exist yet: an earlier student's shape is known from the recipe.
    """
    shapes: dict[str, EncoderShape] = {}
    for stage in recipe.stages:
        match stage.teacher_ref:
            case StudentRef(name):
                shape = shapes[name]
                check_students(stage, shape)
            case ref:
                shape = check_stage(stage, model_folder(ref, recipe, workdir), data)
        shapes |= students_shapes(stage, shape)


def config_problems(recipe: Recipe) -> list[str]:
    """A line for each stage that a run would refuse by the config of its teacher, where that is a folder on this
    machine or an earlier student of such a one. Reads no data and no weights."""
    shapes: dict[str, EncoderShape] = {}
    problems: list[str] = []
    for stage in recipe.stages:
        try:
            if stage.teacher in recipe.student_names:
                shape = shapes.get(stage.teacher)
                if shape is None:
                    continue
                check_students(stage, shape)
            elif (Path(stage.teacher) / "config.json").is_file():
                shape = check_teacher(stage, Path(stage.teacher))
            else:
                continue
        except (UserError, ModelError) as error:
            problems.append(str(error))
        else:
            shapes |= students_shapes(stage, shape)
    return problems


def students_shapes(stage: Stage, teacher: EncoderShape) -> dict[str, EncoderShape]:
    """Of the students, by name, as far as the recipe tells."""
    return {
        student.name: replace(
            teacher, layers=student.layers, hidden=student.hidden, heads=student.heads or teacher.heads
        )
        for student in stage.students
    }


def check_stage(stage: Stage, teacher: Path, data: DataSpec) -> EncoderShape:
    """The teacher's shape, after comparing it with the data and the students. Raises `UserError`."""
    shape = check_teacher(stage, teacher)
    where = f"stage {stage.name}"
    if data.seq_len > shape.max_tokens:
        raise UserError(
            f"{where}: rows are {data.seq_len} tokens long, the teacher takes at most {shape.max_tokens}; "
            f"build the data with a smaller seq_len"
        )
    check_vocabulary(where, teacher, shape, data)
    return shape


def check_teacher(stage: Stage, teacher: Path) -> EncoderShape:
    """The teacher's shape, after comparing it with the stage and its students. Raises `UserError`."""
    config = load_config(teacher)
    try:
        tapped_layer(config, stage.teacher_layer)
    except ModelError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
    shape = shape_of(config)
    check_students(stage, shape)
    return shape


def check_students(stage: Stage, teacher: EncoderShape) -> None:
    """The students' sizes against the teacher's, as the objective needs them. Raises `UserError`."""
    try:
        objective = Objective.named(**stage.objective_fields())
        for student in stage.students:
            heads = student.heads or teacher.heads
            if student.hidden % heads:
                raise ModelError(
                    f"student {student.name} has hidden {student.hidden}, which {heads} heads do not divide; "
                    f"give a multiple of {heads}, or other heads"
                )
            objective.check(teacher.heads, teacher.hidden, heads, student.hidden)
    except ModelError as error:
        raise UserError(f"stage {stage.name}: {error}") from error


def check_vocabulary(where: str, teacher: Path, shape: EncoderShape, data: DataSpec) -> None:
    """Token ids must mean the same to the data and the teacher: the commonest silent error."""
    info = data.vocabulary
    if info.vocab_size > shape.vocab_size:
        raise UserError(
            f"{where}: the data was made with a vocabulary of {info.vocab_size} tokens, the teacher knows "
            f"{shape.vocab_size}; build the data with the teacher's tokenizer"
        )
    if not has_tokenizer(teacher):
        return  # the sizes are all there is to compare
    own = load_tokenizer(str(teacher))
    if vocabulary_fingerprint(own) != info.vocabulary_fingerprint:
        raise UserError(
            f"{where}: the data was made with another tokenizer than the teacher's in {teacher} (same ids would mean "
            f"other tokens); build the data with `--tokenizer {teacher}`"
        )
    if pipeline_fingerprint(own) == info.pipeline_fingerprint:
        return
    # Older data do not pin how text becomes tokens, and another version of `tokenizers` may write the same otherwise.
    made_with = load_tokenizer(data.tokenizer)
    if pipeline_fingerprint(own) != pipeline_fingerprint(made_with):
        example = pipeline_difference(made_with, own)
        raise UserError(
            f"{where}: the data was made with another lower-casing, normalization or pre-tokenization than that of "
            f"the teacher's tokenizer in {teacher}{example and f' ({example})'}; build the data with "
            f"`--tokenizer {teacher}`"
        )
