"""Starts of students that are made before the workers begin, once, as folders of models.

So every worker, however many there are and wherever they run, begins with the same bits. Three kinds are made: of
`init: teacher-pca`, from the teacher and the first rows that the stage trains on; of a model with another tokenizer
than the data's, whose table of tokens is put into the data's order; and of any model, these two and `init:
teacher-layers` among them, whose vectors need a dense layer to the teacher's width. That layer turns them to the
teacher's vectors of the first rows and keeps their cosines: drawn at random, it would have the first steps destroy what
the model knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.data.token_match import TokenMatch
from minilm.model.compatibility import student_layout, teacher_layout
from minilm.model.encoder.sentence_layout import SentenceLayout, read_layout
from minilm.model.encoder.shape import load_config
from minilm.model.export import export_student, weights_digest, whole_folder
from minilm.model.loss.objective import Objective
from minilm.orchestrator.feed.corpora import close, load_quarantine, open_stream, release
from minilm.orchestrator.resolve.starts import other_vocabulary, special_keys
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.system.files import sha256_json

if TYPE_CHECKING:
    from torch import Tensor

PROJECTED = "teacher-pca"
SAMPLE_TOKENS = 32_768
TURN_ROWS, TURN_TOKENS = 2_048, 64  # rows are cut: the beginnings of texts are texts too


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
        if student.init != "random" and _needs_dense(spec, student):
            folder = folder.with_name(f"{folder.name}-dense")
            if not folder.is_dir():
                show("turning a student's vectors towards the teacher's")
                _turn(spec, student, folder)
            digest = student.start_digest or weights_digest(folder)
            student = replace(student, start=str(folder), start_digest=digest)
        students.append(student)
    return replace(spec, students=tuple(students))


def _project(spec: StageSpec, student: StudentSpec, folder: Path) -> None:
    from minilm.model.encoder.build import load_encoder, quiet_transformers
    from minilm.model.encoder.principal_start import from_principal_directions
    from minilm.orchestrator.train.build import build_objective, build_random

    head = build_objective(spec).needs_head
    teacher = load_encoder(spec.teacher, layer=spec.teacher_layer, head=head).model
    model = build_random(spec, student, teacher.config, head=head)
    from_principal_directions(model, teacher, _sample(spec, max(1, SAMPLE_TOKENS // spec.data.seq_len)))
    with whole_folder(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary)


def _reorder(spec: StageSpec, student: StudentSpec, match: TokenMatch, folder: Path) -> None:
    from minilm.model.encoder.other_vocabulary import with_vocabulary
    from minilm.model.encoder.sentence_head import load_head
    from minilm.orchestrator.train.build import load_student_start

    model = load_student_start(spec, student, head=False)
    made = with_vocabulary(model, match.rows, special_keys(student.start, spec.data.tokenizer))
    layout = read_layout(student.start, student.hidden)
    card = f"# The start of {student.name}\n\n{student.init} with the tokenizer of the data.\n"
    head = load_head(student.start, layout) if layout else None
    export_student(made, Path(spec.data.tokenizer), folder, card, head)


def _needs_dense(spec: StageSpec, student: StudentSpec) -> bool:
    """Whether the student gets a dense layer that its start does not have."""
    objective, hidden = Objective.named(**spec.objective), load_config(spec.teacher).hidden_size
    if not objective.embeds:
        return False
    own = read_layout(student.start, student.hidden) if student.start else None
    if own and own.dense:
        return False
    whose = f"the teacher {spec.teacher_name}"
    theirs = teacher_layout(objective, whose, read_layout(spec.teacher, hidden), hidden)
    return bool(student_layout(student.name, objective, theirs, hidden, student.hidden, own).dense)


def _turn(spec: StageSpec, student: StudentSpec, folder: Path) -> None:
    import torch
    from torch.nn.functional import normalize

    from minilm.model.encoder.sentence_head import SentenceHead
    from minilm.orchestrator.train.bucketing import end_to_end
    from minilm.orchestrator.train.build import build_distiller

    distiller = build_distiller(replace(spec, students=(student,)), torch.device("cpu")).eval()
    encoder = distiller.students[student.name]
    head = encoder.head
    assert head is not None
    encoder.head = SentenceHead(SentenceLayout(head.layout.pooling, normalize=True))
    vectors: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for ids, mask in _sample(spec, TURN_ROWS):
            ids, mask = ids[:, :TURN_TOKENS], None if mask is None else mask[:, :TURN_TOKENS]
            texts = None if mask is None else end_to_end(ids, mask)
            given, wanted = (model(*(texts or (ids, mask))).pooled for model in (encoder, distiller.teacher))
            assert given is not None and wanted is not None
            wanted = normalize(wanted, dim=-1)
            finite = (given.sum(dim=1) + wanted.sum(dim=1)).isfinite()  # the worker names what is not
            vectors.append((given[finite], wanted[finite]))
    head.turn(*(torch.cat(side) for side in zip(*vectors, strict=True)))
    card = f"# The start of {student.name}\n\n{student.init} with a dense layer to the teacher's width.\n"
    export_student(encoder.model, Path(spec.data.tokenizer), folder, card, head)


def _sample(spec: StageSpec, rows: int) -> list[tuple[Tensor, Tensor | None]]:
    """Whole micro-batches, int64 ids and bool mask or None, of the first `rows` rows that the stage trains on; where it
    has fewer, of about one epoch."""
    stream = open_stream(
        spec.data,
        seed=spec.seed,
        batch=spec.batch,
        micro_batch=spec.micro_batch,
        quarantine=load_quarantine(spec.data),
    )
    rows = min(rows, sum(corpus.rows.num_rows for corpus in stream.corpora))
    found: list[tuple[Tensor, Tensor | None]] = []
    try:
        for number in range(-(-rows // spec.micro_batch)):
            batch = stream.micro_batch(*divmod(number, spec.batch // spec.micro_batch))
            found.append(batch.sequences)
    finally:
        release(stream)
        close(stream.corpora)
    return found
