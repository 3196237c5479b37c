"""Starts of students that are made before the workers begin, once, as folders of models.

So every worker, however many there are and wherever they run, begins with the same bits. Two kinds are made: of
`init: teacher-pca`, from the teacher and the first rows that the stage trains on, and of a model with another tokenizer
than the data's, whose table of tokens is put into the data's order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.data.token_match import TokenMatch
from minilm.model.encoder.shape import load_config
from minilm.model.export import export_student, weights_digest, whole_folder
from minilm.orchestrator.feed.corpora import close, load_quarantine, open_stream, release
from minilm.orchestrator.resolve.starts import other_vocabulary, special_keys
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.system.files import sha256_json

if TYPE_CHECKING:
    from torch import Tensor

PROJECTED = "teacher-pca"
SAMPLE_TOKENS = 32_768


def with_made_starts(spec: StageSpec, show: Callable[[str], None] = lambda text: None) -> StageSpec:
    """The stage with the folder of each student's start that has to be made, which is there then."""
    size = load_config(spec.teacher).vocab_size
    students = []
    for student in spec.students:
        folder = StageFolder(Path(spec.folder)).start(
            student.name, sha256_json([spec.digest, student.name])[:12]
        )
        if student.init == PROJECTED and not student.start:
            if not folder.is_dir():
                show("projecting the teacher for the students' start")
                _project(spec, student, folder)
            student = replace(student, start=str(folder), start_digest=weights_digest(folder))
        elif spec.objective["name"] == "embedding" and student.start:
            match = other_vocabulary(student.start, spec.data.tokenizer, size)
            if match is not None and not folder.is_dir():
                show("putting the tokens of a student's start into the data's order")
                _reorder(spec, student, match, folder)
            student = replace(student, start=str(folder)) if match is not None else student
        students.append(student)
    return replace(spec, students=tuple(students))


def _project(spec: StageSpec, student: StudentSpec, folder: Path) -> None:
    from minilm.model.encoder.build import load_encoder, quiet_transformers
    from minilm.model.encoder.principal_start import from_principal_directions
    from minilm.orchestrator.train.build import build_objective, build_random

    head = build_objective(spec).needs_head
    teacher = load_encoder(spec.teacher, layer=spec.teacher_layer, head=head).model
    model = build_random(spec, student, teacher.config, head=head)
    from_principal_directions(model, teacher, _sample(spec))
    with whole_folder(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary)


def _reorder(spec: StageSpec, student: StudentSpec, match: TokenMatch, folder: Path) -> None:
    from minilm.model.encoder.other_vocabulary import with_vocabulary
    from minilm.model.encoder.sentence_head import load_head
    from minilm.model.encoder.sentence_layout import read_layout
    from minilm.orchestrator.train.build import load_student_start

    model = load_student_start(spec, student, head=False)
    made = with_vocabulary(model, match.rows, special_keys(student.start, spec.data.tokenizer))
    layout = read_layout(student.start, student.hidden)
    card = f"# The start of {student.name}\n\n{student.init} with the tokenizer of the data.\n"
    head = load_head(student.start, layout) if layout else None
    export_student(made, Path(spec.data.tokenizer), folder, card, head)


def _sample(spec: StageSpec) -> list[tuple[Tensor, Tensor | None]]:
    stream = open_stream(
        spec.data,
        seed=spec.seed,
        batch=spec.batch,
        micro_batch=spec.micro_batch,
        quarantine=load_quarantine(spec.data),
    )
    rows = max(1, SAMPLE_TOKENS // spec.data.seq_len)
    found: list[tuple[Tensor, Tensor | None]] = []
    try:
        for number in range(-(-rows // spec.micro_batch)):
            batch = stream.micro_batch(*divmod(number, spec.batch // spec.micro_batch))
            found.append(batch.sequences)
    finally:
        release(stream)
        close(stream.corpora)
    return found
