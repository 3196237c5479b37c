"""`init: teacher-pca`: the start of a student is made before its workers begin, once, as the folder of a model.

So every worker, however many there are and wherever they run, begins with the same bits. The sample of rows is the
first that the stage trains on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.model.export import weights_digest, whole_folder
from minilm.orchestrator.feed.corpora import close, load_quarantine, open_stream, release
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.spec import StageSpec, StudentSpec
from minilm.orchestrator.system.files import sha256_json

if TYPE_CHECKING:
    from torch import Tensor

PROJECTED = "teacher-pca"
SAMPLE_TOKENS = 32_768


def with_projected_starts(spec: StageSpec) -> StageSpec:
    """The stage with the folder of each student's start that has to be made, which is there then."""
    students = [_made(spec, s) if s.init == PROJECTED and not s.start else s for s in spec.students]
    return replace(spec, students=tuple(students))


def _made(spec: StageSpec, student: StudentSpec) -> StudentSpec:
    own = sha256_json([spec.digest, student.name])[:12]  # of all that determines the weights
    folder = StageFolder(Path(spec.folder)).start(student.name, own)
    if not folder.is_dir():
        _make(spec, student, folder)
    return replace(student, start=str(folder), start_digest=weights_digest(folder))


def _make(spec: StageSpec, student: StudentSpec, folder: Path) -> None:
    from minilm.model.encoder.build import load_encoder, quiet_transformers
    from minilm.model.encoder.principal_start import from_principal_directions
    from minilm.orchestrator.train.build import build_objective, build_random

    head = build_objective(spec).needs_head
    teacher = load_encoder(spec.teacher, layer=spec.teacher_layer, head=head).model
    model = build_random(spec, student, teacher.config, head=head)
    from_principal_directions(model, teacher, _sample(spec))
    with whole_folder(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary)


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
            found.append((batch.input_ids, batch.mask))
    finally:
        release(stream)
        close(stream.corpora)
    return found
