"""From a stage's plain values to the modules that are trained: the frozen teacher, its students, their optimisers.

The order of initialisation is here: random weights from the run's seed, then, where the recipe asks for it, the
teacher's layers copied over them. A checkpoint, if there is one, replaces both (`worker.StageRun.resume`).
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from model.distiller import Distiller
from model.encoder import TappedEncoder, build_student, load_encoder
from model.initialize import from_teacher
from model.objective import Objective
from orchestrator.errors import UserError
from orchestrator.stage import StageJob
from orchestrator.step import StudentState, derive_seed, num_values


def build_distiller(job: StageJob, device: torch.device) -> Distiller:
    """The frozen teacher and the freshly initialised students of a stage, on the device.

    Raises `ModelError` for a teacher without the head that the objective needs, or that does not fit otherwise.
    """
    objective = build_objective(job)
    teacher = load_encoder(job.teacher, layer=job.teacher_layer, head=objective.needs_head).to(device)
    students = {}
    for student in job.students:
        model = build_student(
            teacher.model.config,
            layers=student.layers,
            hidden=student.hidden,
            heads=student.heads,
            ffn=student.ffn,
            dropout=student.dropout,
            seed=derive_seed(job.seed, "init", student.name),
            head=objective.needs_head,
        )
        if student.init == "teacher-layers":
            from_teacher(model, teacher.model)
        students[student.name] = TappedEncoder(model, student.layers).to(device)
    distiller = Distiller(teacher, students, objective)
    distiller.train()
    return distiller


def build_objective(job: StageJob) -> Objective:
    """The job's objective; for soft labels with the mask token and special tokens of the data set's tokenizer."""
    objective = Objective.named(**job.objective)
    if not objective.needs_head:
        return objective
    tokens = job.data.vocabulary
    if tokens.mask_id < 0:
        raise UserError(
            f"stage {job.stage}: objective {job.objective['name']} masks tokens, and the tokenizer of the data "
            f"({job.data.places}) has no mask token; choose an objective of relations, such as minilm"
        )
    special = (tokens.mask_id, tokens.cls_id, tokens.sep_id, tokens.pad_id, tokens.unk_id)
    present = tuple(sorted({token for token in special if token >= 0}))
    return replace(objective, mask_token_id=tokens.mask_id, special_ids=present)


def make_states(job: StageJob, distiller: Distiller) -> list[StudentState]:
    """Gradient sums and optimiser of every student, in the job's order."""
    return [
        StudentState(
            student.name,
            distiller.trained_parameters(student.name),
            betas=job.adam_betas,
            eps=job.adam_eps,
            weight_decay=job.weight_decay,
            reduction=job.reduction,
            num_micro_batches=job.batch // job.micro_batch,
            num_terms=num_values(distiller),
            on_nonfinite=job.on_nonfinite,
        )
        for student in job.students
    ]


def compute_deterministically() -> None:
    """Before the first kernel on a GPU: let torch pick those that add in a fixed order; it warns where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
