"""The whole model card of a student: what the worker wrote, and what only the recipe, the run and its evaluation know.

The worker's card says what the model can be used for and what was not trained (`model/export.py`); here come metadata
in the hub's format, provenance, licence and scores. Writing it again gives the same card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from minilm.data.errors import DataError
from minilm.data.format.manifest import MANIFEST, load_manifest
from minilm.orchestrator.evaluation.comparison import Comparison, Score
from minilm.orchestrator.evaluation.report.page import markdown
from minilm.orchestrator.evaluation.tasks import TASKS
from minilm.orchestrator.recipe.references import HubRef
from minilm.orchestrator.recipe.schema import Recipe, Stage
from minilm.orchestrator.stage.data import CorpusSpec
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import read_json, sha256_json, write_atomic
from minilm.orchestrator.system.text import duration

CARD = "README.md"
KINDS = {
    "classes": "text-classification",
    "score": "text-classification",
    "cosine": "sentence-similarity",
    "retrieval": "information-retrieval",
    "spans": "question-answering",
}  # what the hub calls a task of ours
_HUB_DATA = re.compile(r"(?:hf://datasets/|https://huggingface\.co/datasets/)(?P<id>[^/]+/[^/@]+)")


def complete_card(
    recipe: Recipe,
    folder: StageFolder,
    student: str,
    notes: Sequence[str],
    comparison: Comparison | None = None,
) -> bool:
    """Write the card of a student of a stage that is done; whether that changed it.

    notes: on licences, which the card repeats. comparison: with the student's scores, where it was evaluated.
    """
    path = folder.student(student) / CARD
    before = path.read_text(encoding="utf-8")
    spec = StageSpec.from_json(folder.spec.read_text(encoding="utf-8"))
    card = ModelCard(before)
    scores = [s for s in comparison.scores if s.model == student] if comparison else []
    known = metadata(recipe, spec, card.data.to_dict(), student, scores)
    parts = [_without_sections(card.text), *provenance(recipe, spec, folder)]
    if notes:
        parts += ["## Licence", "\n".join(f"- {note}" for note in notes)]
    if comparison and scores:
        parts += ["## Evaluation", markdown(comparison, {}, "").strip()]
    text = f"---\n{known.to_yaml().strip()}\n---\n" + "\n\n".join(part.strip() for part in parts) + "\n"
    if text != before:
        write_atomic(path, text)
    return text != before


def metadata(
    recipe: Recipe, spec: StageSpec, known: Mapping[str, Any], student: str, scores: Sequence[Score]
) -> ModelCardData:
    """The head of the card. known: what the worker took over from the teacher's card, which the recipe overrides."""
    stated = recipe.stated.model_dump(mode="json", exclude_none=True, exclude={"data_license"})
    values = {key: value for key, value in known.items() if key != "model-index"}
    if recipe.stated.license:
        values = {key: value for key, value in values.items() if not key.startswith("license")}
    stage = next(stage for stage in recipe.stages if stage.name == spec.stage)
    if base := hub_teacher(recipe, stage):
        values |= {"base_model": base}
    ids = [found["id"] for corpus in spec.data.corpora if (found := _HUB_DATA.match(corpus.place))]
    if ids:
        values |= {"datasets": list(dict.fromkeys(ids))}
    values |= stated
    if (
        "base_model" in values
    ):  # the hub knows finetune, adapter, merge and quantized; distilled is not among them
        values |= {"base_model_relation": "finetune"}
    values.setdefault("pipeline_tag", "feature-extraction")
    if scores:
        values |= {"model_name": student, "eval_results": [result(score) for score in scores]}
    return ModelCardData(**values)


def hub_teacher(recipe: Recipe, stage: Stage) -> str | None:
    """The hub's id of the first teacher of a stage's students, through assistants; None where none is named."""
    while stage.teacher in recipe.student_names:
        stage = next(s for s in recipe.stages if any(one.name == stage.teacher for one in s.students))
    reference = recipe.teacher_ref(stage)
    return reference.id if isinstance(reference, HubRef) else None


def result(score: Score) -> EvalResult:
    return EvalResult(
        task_type=KINDS[TASKS[score.task].kind],
        dataset_type=score.task,
        dataset_name=score.task,
        dataset_revision=score.data_digest[:36],
        metric_type=score.metric,
        metric_name=f"{score.metric}, mean over {len(score.scores)} seeds"
        if len(score.scores) > 1
        else score.metric,
        metric_value=round(score.mean, 6),
        dataset_args={"protocol": score.protocol},
    )


def provenance(recipe: Recipe, spec: StageSpec, folder: StageFolder) -> list[str]:
    """How the model came about, as a section."""
    done = read_json(folder.done) or {}
    steps, code = done["steps"], done.get("code", {})
    most = "" if spec.data.packing == "full" else "at most "  # the rest is padding
    rows = {
        "Recipe": f"{recipe.name}, digest {sha256_json(recipe.result_fields())}",
        "Stage": f"{spec.stage}, digest {spec.digest}",
        "Steps": f"{steps:,} done of {spec.steps:,} planned",
        "Tokens": f"{most}{steps * spec.batch * spec.data.seq_len:,} ({spec.batch} rows x {spec.data.seq_len} a step)",
        "Time": f"{duration(training_seconds(folder, spec))} of training steps",
        "Hardware": done.get("hardware", "not recorded"),
        "Code": ", ".join(f"{name} {version}" for name, version in code.items()) or "not recorded",
        **{f"Data: {corpus.name}": describe_data(corpus, spec.data.seq_len) for corpus in spec.data.corpora},
    }
    table = "\n".join(f"| {key} | {' '.join(str(value).split())} |" for key, value in rows.items())
    return ["## Provenance", f"| | |\n|---|---|\n{table}"]


def training_seconds(folder: StageFolder, spec: StageSpec) -> float:
    """Seconds that the steps took, by the rates that were logged: pauses between two attempts are none of it."""
    total, before = 0.0, 0
    for point in read_all_metrics(folder.step_metrics):
        if rate := point.metrics.get("rows_per_second"):
            total += (point.step - before) * spec.batch / rate
        before = point.step
    return total


def describe_data(corpus: CorpusSpec, seq_len: int) -> str:
    """Fingerprint, and the counts of a data set that lies here."""
    text = f"fingerprint {corpus.fingerprint}"
    if corpus.pair is None and (Path(corpus.place) / MANIFEST).is_file():
        try:
            manifest = load_manifest(Path(corpus.place))
        except DataError:
            return text  # it has changed since
        return f"{manifest.rows:,} rows of {seq_len}, {manifest.tokens:,} tokens; {text}"
    return text


def _without_sections(text: str) -> str:
    """The worker's own part of a card that was completed before."""
    return re.split(r"^## (?:Provenance|Licence|Evaluation)$", text, maxsplit=1, flags=re.MULTILINE)[
        0
    ].strip()
