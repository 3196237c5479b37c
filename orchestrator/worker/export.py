"""The end of a stage: exports every student as a `transformers` folder; `done.json`, written last, says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from minilm.model.distiller import Distiller
from minilm.model.encoder.build import load_encoder
from minilm.model.encoder.initialize import INITIALIZATIONS, copy_positions, has_table
from minilm.model.encoder.shape import shape_of
from minilm.model.export import export_student, model_card, weights_digest
from minilm.orchestrator.feed.corpora import check_exported_tokenizer
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.system.versions import code_version, processor_name


def longest_row(model: PreTrainedModel, student: StudentSpec, seq_len: int) -> str:
    """How long rows may be, and how long they were in training, for the card."""
    shape = shape_of(model.config)
    if shape.max_tokens <= seq_len:
        return f"{shape.max_tokens} tokens, as in training"
    if not has_table(shape):
        return f"{shape.max_tokens} tokens; trained on rows of {seq_len}"
    if student.start and student.init not in INITIALIZATIONS:
        rest = "were not trained in this run"
    elif student.positions == "teacher":
        rest = "are the teacher's, not trained here"
    elif student.init != "random":
        rest = "started as the teacher's and were not trained"
    else:
        rest = "hold random numbers, so do not use them"
    return f"{shape.max_tokens} tokens; trained on rows of {seq_len}: positions behind these {rest}"


def finish_stage(
    spec: StageSpec,
    distiller: Distiller,
    *,
    data: str,
    ledger: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Export every student and write `done.json`. `data`: fingerprint; `ledger`: running digest (hex);
    `progress(done, total)` is told of students."""
    stage = StageFolder(Path(spec.folder))
    check_exported_tokenizer(spec.data)
    digests = {}
    for number, student in enumerate(spec.students):
        progress(number, len(spec.students))
        encoder = distiller.students[student.name]
        folder = stage.student(student.name)
        if student.positions == "teacher" and student.init in INITIALIZATIONS:
            source = distiller.teacher.model
            if student.start:  # made of the teacher (`driver.made_starts`)
                source = load_encoder(student.start, head=distiller.objective.needs_head).model
            copy_positions(encoder.model, source, first=spec.data.seq_len)
        facts = {}
        if student.start:
            facts["Started from"] = f"{student.init} (weights {student.start_digest[:12]})"
        if student.start_share:
            facts["Share of the start in the weights"] = f"{student.start_share:g} of {student.init}"
        card = model_card(
            student.name,
            encoder.model,
            trained=encoder.trained_parameters(),
            teacher=f"{spec.teacher_name}, layer {spec.teacher_layer}",
            teacher_card=Path(spec.teacher) / "README.md",
            head=encoder.head,
            facts=facts
            | {
                "Objective": spec.objective["name"],
                "Steps": f"{spec.steps:,} of {spec.batch} rows x {spec.data.seq_len} tokens",
                "Peak learning rate": f"{spec.learning_rate.peak_lr:g}",
                "Longest row": longest_row(encoder.model, student, spec.data.seq_len),
            },
        )
        export_student(encoder.model, Path(spec.data.tokenizer), folder, card, encoder.head)
        digests[student.name] = weights_digest(folder)
    made = {"code": code_version(), "hardware": hardware(encoder.model.device)}
    write_json(
        stage.done,
        {"digest": spec.digest, "data": data, "students": digests, "steps": spec.steps, "ledger": ledger}
        | made,
    )


def hardware(device: torch.device) -> str:
    """What the last attempt computed on, for the card: workers, and the device of rank 0."""
    workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{workers} x {name}"
