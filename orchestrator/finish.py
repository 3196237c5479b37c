"""The end of a stage's training: every student as a `transformers` folder, and a record that says so, written last."""

from __future__ import annotations

from pathlib import Path

from model.distiller import Distiller
from model.export import export_student, model_card, weights_digest
from orchestrator.files import write_json
from orchestrator.stage import StageFolder, StageJob


def finish_stage(job: StageJob, distiller: Distiller, *, data: str, ledger: str) -> None:
    """Export every student and write `done.json`. `data`: fingerprint; `ledger`: running digest (hex)."""
    stage = StageFolder(Path(job.folder))
    digests = {}
    for student in job.students:
        encoder = distiller.students[student.name]
        folder = stage.student(student.name)
        card = model_card(
            student.name,
            encoder.model,
            trained=encoder.trained_parameters(),
            teacher=f"{job.teacher_name}, layer {job.teacher_layer}",
            facts={
                "Objective": job.objective["name"],
                "Steps": f"{job.steps:,} of {job.batch} rows x {job.data.seq_len} tokens",
                "Peak learning rate": f"{job.peak_lr:g}",
            },
        )
        export_student(encoder.model, Path(job.data.tokenizer), folder, card)
        digests[student.name] = weights_digest(folder)
    write_json(
        stage.done,
        {"digest": job.digest, "data": data, "students": digests, "steps": job.steps, "ledger": ledger},
    )
