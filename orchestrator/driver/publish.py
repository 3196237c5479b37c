"""After a stage's training: pictures, registration, and the stage's entry in the summary.

Runs in the driver once a stage is done; repeating it after a kill registers nothing twice. `published.json` is
written last and says that the stage needs no further look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from numpy.typing import NDArray

from minilm.data.tokenizer import load_tokenizer
from minilm.model.encoder.build import count_parameters, load_encoder
from minilm.model.encoder.shape import shape_of
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.loss.relations import relation_maps
from minilm.orchestrator.driver.inference_speed import inference_speed
from minilm.orchestrator.driver.model_cards import complete_card
from minilm.orchestrator.driver.summary import ModelEntry, terms
from minilm.orchestrator.feed.corpora import close, open_held_out
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.tracking import plots as pictures
from minilm.orchestrator.tracking import registry
from minilm.orchestrator.tracking.promotion import MAX_TAG_CHARS
from minilm.orchestrator.tracking.tracking import StageRun, Tracking

PICTURE_TOKENS, REPORT_TOKENS = 24, 16
SPEED_BATCH, SPEED_TOKENS = 8, 128


def publish(
    recipe: Recipe,
    spec: StageSpec,
    folder: StageFolder,
    licences: Sequence[str],
    tracking: Tracking,
    run: StageRun,
    show: Callable[[str], None],
) -> list[ModelEntry]:
    """Picture, register and describe the stage's teacher and students; the teacher's entry comes first.

    licences: what there is to say of them, for cards and versions. `show` is told what is done now.
    """
    show("drawing attention maps and loss curves")
    teacher = load_encoder(spec.teacher, layer=spec.teacher_layer)
    students = {s.name: load_encoder(folder.student(s.name)) for s in spec.students}
    run.artifact(draw_maps(spec, teacher, students, folder), "pictures")
    heldout = read_all_metrics(folder.heldout_metrics)
    first = {} if heldout[0].step else heldout[0].metrics  # lost with another work directory
    curves = folder.root / "loss_curves.png"
    pictures.loss_curves(read_all_metrics(folder.step_metrics), heldout, curves)
    run.artifact(curves, "pictures")

    show("measuring the speed of teacher and students")
    models = [teacher.model, *(encoder.model for encoder in students.values())]
    speeds = inference_speed(
        models,
        batch=SPEED_BATCH,
        tokens=min(SPEED_TOKENS, *(shape_of(model.config).max_tokens for model in models)),
        vocab_size=teacher.model.config.vocab_size,
    )
    entries = [entry(spec.teacher_name, "teacher", teacher, speeds[0], spec.teacher)]
    final = {name: divergences(terms(heldout[-1].metrics, name)) for name in students}
    for number, ((name, encoder), speed) in enumerate(
        zip(students.items(), speeds[1:], strict=True), start=1
    ):
        show(f"registering {recipe.registered_name(name)} ({number}/{len(students)})")
        complete_card(recipe, folder, name, licences)
        registered = registry.register(
            tracking.uri,
            recipe.registered_name(name),
            folder.student(name),
            alias=recipe.tracking.alias,
            tags={
                "minilm.stage_digest": spec.digest,
                "minilm.teacher": spec.teacher_name,
                "minilm.steps": str(spec.steps),
                **({"minilm.licence": "; ".join(licences)[:MAX_TAG_CHARS]} if licences else {}),
                **registry.shape_tags(shape_of(encoder.model.config), count_parameters(encoder.model)),
                **{f"minilm.{key}": f"{value:.4g}" for key, value in final[name].items()},
            },
            run_id=run.run_id,
        )
        entries.append(
            entry(
                name,
                f"stage {spec.stage}",
                encoder,
                speed,
                str(folder.student(name)),
                before=terms(first, name),
                after=terms(heldout[-1].metrics, name),
                registered=f"{registered.name} v{registered.version}",
            )
        )
    compared = {f"{name}/{key}": value for name, values in final.items() for key, value in values.items()}
    tracking.metrics(compared, spec.steps)
    run.finish()
    write_json(folder.published, {"digest": spec.digest, "models": [asdict(e) for e in entries]})
    return entries


def entry(
    name: str,
    role: str,
    encoder: TappedEncoder,
    speed: float,
    folder: str,
    *,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
    registered: str = "",
) -> ModelEntry:
    shape = shape_of(encoder.model.config)
    return ModelEntry(
        name=name,
        role=role,
        layers=shape.layers,
        hidden=shape.hidden,
        parameters=count_parameters(encoder.model),
        tokens_per_second=speed,
        before=before or {},
        after=after or {},
        registered=registered,
        folder=folder,
    )


def divergences(by_term: dict[str, float]) -> dict[str, float]:
    """As they are called in the registry and in the recipe's run: of each term, and their sum."""
    return {f"heldout/{term}": value for term, value in by_term.items()} | {
        "heldout_sum": sum(by_term.values())
    }


def draw_maps(
    spec: StageSpec, teacher: TappedEncoder, students: dict[str, TappedEncoder], folder: StageFolder
) -> Path:
    """The picture of the query-key maps of teacher and students on the beginning of the first held-out row; beside it
    their means over heads, for the report."""
    held_out = open_held_out(spec.data)
    batch = held_out[0].rows.read(range(1))
    close(held_out)
    ids, mask = batch.sequences
    ids, mask = ids[:1, :PICTURE_TOKENS], None if mask is None else mask[:1, :PICTURE_TOKENS]
    tokenizer = load_tokenizer(spec.data.tokenizer)

    def maps(encoder: TappedEncoder) -> NDArray:
        with torch.inference_mode():
            taps = encoder.eval()(ids, mask)
            return relation_maps(taps.q, taps.k, mask)[0].numpy()

    found = {"teacher": maps(teacher)} | {name: maps(encoder) for name, encoder in students.items()}
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    means = {name: heads.mean(axis=0)[:REPORT_TOKENS, :REPORT_TOKENS] for name, heads in found.items()}
    shown = {
        name: [[round(float(value), 4) for value in row] for row in mean] for name, mean in means.items()
    }
    write_json(folder.attention_maps, {"tokens": tokens[:REPORT_TOKENS], "maps": shown})
    own = found.pop("teacher")
    return pictures.attention_maps(own, found, tokens, folder.root / "attention_maps.png")
