"""A stage's plain values → the frozen teacher, its students and their optimisers.

The order of initialisation is decided here: random weights from the run's seed, then, where the recipe asks for it,
the teacher's layers or another model's weights copied over them. A checkpoint, if there is one, replaces all of this
(`worker.loop.StageRun.resume`).
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from minilm.model.compatibility import student_layout, teacher_layout
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, load_encoder
from minilm.model.encoder.initialize import initialize
from minilm.model.encoder.sentence_head import SentenceHead, load_head
from minilm.model.encoder.sentence_layout import SentenceLayout, read_layout
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.encoder.warm_start import load_start
from minilm.model.loss.objective import Objective
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.train.step import StudentState, derive_seed, num_values


def build_distiller(spec: StageSpec, device: torch.device) -> Distiller:
    """The frozen teacher and the freshly initialised students of a stage, on the device.

    Raises `ModelError` when the teacher lacks a head that the objective needs, or teacher and students do not fit.
    """
    objective = build_objective(spec)
    teacher = load_encoder(spec.teacher, layer=spec.teacher_layer, head=objective.needs_head).to(device)
    vectors = _teacher_head(spec, objective, teacher) if objective.embeds else None
    students = {}
    for student in spec.students:
        head = objective.needs_head
        if student.start:
            model = load_student_start(spec, student, head=head)
        else:
            model = build_random(spec, student, teacher.model.config, head=head)
            initialize(model, teacher.model, student.init, student.positions)
        encoder = TappedEncoder(model, student.layers)
        if vectors is not None:
            encoder.head = _student_head(spec, student, objective, vectors, teacher)
        students[student.name] = encoder.to(device)
    distiller = Distiller(teacher, students, objective)
    distiller.train()
    return distiller


def _teacher_head(spec: StageSpec, objective: Objective, teacher: TappedEncoder) -> SentenceLayout:
    """Give the teacher the modules of its folder, or the pooling that the recipe says; returns their layout."""
    hidden = teacher.model.config.hidden_size
    own = read_layout(spec.teacher, hidden)
    layout = teacher_layout(objective, f"the teacher {spec.teacher_name}", own, hidden)
    head = load_head(spec.teacher, layout) if own else SentenceHead(layout)
    teacher.head = head.to(teacher.model.device)
    return layout


def _student_head(
    spec: StageSpec,
    student: StudentSpec,
    objective: Objective,
    vectors: SentenceLayout,
    teacher: TappedEncoder,
) -> SentenceHead:
    """The student's pooling and dense layers: those of the model it goes on from, or new ones."""
    start = read_layout(student.start, student.hidden) if student.start else None
    sizes = teacher.model.config.hidden_size, student.hidden
    layout = student_layout(student.name, objective, vectors, *sizes, start)
    if start and start.dense:
        return load_head(student.start, layout)
    return SentenceHead(layout, seed=derive_seed(spec.seed, "dense", student.name))


def build_random(
    spec: StageSpec, student: StudentSpec, teacher_config: PreTrainedConfig, *, head: bool
) -> PreTrainedModel:
    """A student of the stage with the random weights that its seed gives."""
    return build_student(
        teacher_config,
        layers=student.layers,
        hidden=student.hidden,
        heads=student.heads,
        ffn=student.ffn,
        dropout=student.dropout,
        seed=_seed(spec, student),
        head=head,
        max_tokens=spec.data.seq_len if student.positions == "cut" else None,
    )


def load_student_start(spec: StageSpec, student: StudentSpec, *, head: bool) -> PreTrainedModel:
    """The model that a student of the stage goes on from."""
    return load_start(student.start, dropout=student.dropout, head=head, seed=_seed(spec, student))


def _seed(spec: StageSpec, student: StudentSpec) -> int:
    return derive_seed(spec.seed, "init", student.name)


def build_objective(spec: StageSpec) -> Objective:
    """The stage's objective; soft labels get the mask token and special tokens of the data set's tokenizer."""
    objective = Objective.named(**spec.objective)
    if not objective.needs_head:
        return objective
    vocabulary = spec.data.vocabulary
    if vocabulary.mask_id < 0:
        raise UserError(
            f"stage {spec.stage}: objective {spec.objective['name']} masks tokens, and the tokenizer of the data "
            f"({spec.data.places}) has no mask token; choose an objective of relations, such as minilm"
        )
    special = (
        vocabulary.mask_id,
        vocabulary.cls_id,
        vocabulary.sep_id,
        vocabulary.pad_id,
        vocabulary.unk_id,
    )
    present = tuple(sorted({token for token in special if token >= 0}))
    return replace(objective, mask_token_id=vocabulary.mask_id, special_ids=present)


def make_states(spec: StageSpec, distiller: Distiller) -> list[StudentState]:
    """Gradient sums and optimiser of every student, in the stage's order."""
    return [
        StudentState(
            student.name,
            distiller.trained_parameters(student.name),
            betas=spec.optimizer.adam_betas,
            eps=spec.optimizer.adam_eps,
            weight_decay=spec.optimizer.weight_decay,
            gradient_sum=spec.runtime.gradient_sum,
            num_micro_batches=spec.batch // spec.micro_batch,
            num_terms=num_values(distiller),
            on_nonfinite=spec.runtime.on_nonfinite,
        )
        for student in spec.students
    ]


def compute_deterministically() -> None:
    """Before the first kernel: let torch pick GPU kernels that add in a fixed order; it warns where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
