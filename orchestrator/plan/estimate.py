"""`minilm plan RECIPE`: a recipe and the configs of its teachers → `plan`, as a table or JSON. Reads no weights.

Encoders are built without storage, so that parameters are counted and not guessed, for every architecture.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig

from minilm.data.format.manifest import load_manifest
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, count_parameters
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.shape import shape_of, tapped_layer
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.plan.cost import Body, Work
from minilm.orchestrator.recipe.references import FolderRef, HubRef, StudentRef
from minilm.orchestrator.recipe.schema import Recipe, Stage


def works(recipe: Recipe, seq_len: int | None) -> list[Work]:
    """A `Work` for each stage. Raises `UserError` where a teacher's config or the length of rows is not here."""
    length = seq_len or row_length(recipe)
    configs: dict[str, PreTrainedConfig] = {}
    found = []
    for stage in recipe.stages:
        config = teacher_config(stage, configs)
        if length > (most := shape_of(config).max_tokens):
            raise UserError(
                f"stage {stage.name}: rows are {length} tokens long, the teacher takes at most {most}; "
                f"give a smaller seq_len"
            )
        found.append(work_of(stage, recipe, config, length, configs))
    return found


def work_of(
    stage: Stage, recipe: Recipe, config: PreTrainedConfig, seq_len: int, configs: dict[str, PreTrainedConfig]
) -> Work:
    """`config`: the teacher's; the students' are added to `configs`."""
    objective, compute = Objective.named(**stage.objective_fields()), recipe.compute
    kind = AutoModelForMaskedLM if objective.needs_head else AutoModel
    with torch.device("meta"):
        model = kind.from_config(config, attn_implementation=FAMILIES[config.model_type].attention)
    teacher = TappedEncoder(model, tapped_layer(config, stage.teacher_layer))
    students = {}
    for student in stage.students:
        built = build_student(
            config,
            layers=student.layers,
            hidden=student.hidden,
            heads=student.heads,
            ffn=student.ffn,
            seed=0,
            head=objective.needs_head,
        )
        students[student.name] = TappedEncoder(built, student.layers)
        configs[student.name] = built.config
    distiller = Distiller(teacher, students, objective)
    teacher.requires_grad_(True)  # nothing is trained here: it tells what runs
    return Work(
        stage=stage.name,
        teacher=body(teacher, teacher.trained_parameters()),
        students=tuple(
            body(student, distiller.trained_parameters(name)) for name, student in students.items()
        ),
        relations=len(objective.names),
        seq_len=seq_len,
        batch=stage.batch,
        micro_batch=stage.micro_batch,
        steps=stage.steps,
        exact=compute.reduction == "exact",
        keep=compute.keep_checkpoints,
        keep_every=compute.keep_every_steps,
        activation_bytes=2 if compute.precision == "bfloat16" else 4,
    )


def body(encoder: TappedEncoder, trained: dict[str, nn.Parameter]) -> Body:
    """`trained`: what of the encoder runs."""
    running = {id(parameter) for parameter in trained.values()}
    linear = [m.weight for m in encoder.model.modules() if isinstance(m, nn.Linear)]
    config = encoder.model.config
    return Body(
        parameters=count_parameters(encoder.model),
        trained=sum(parameter.numel() for parameter in trained.values()),
        matrices=sum(weight.numel() for weight in linear if id(weight) in running),
        layers=encoder.layer,
        attentions=encoder.layer - encoder.stops_at_tap,
        hidden=config.hidden_size,
        ffn=shape_of(config).ffn,
    )


def teacher_config(stage: Stage, configs: dict[str, PreTrainedConfig]) -> PreTrainedConfig:
    match stage.teacher_ref:
        case StudentRef(name):
            return configs[name]
        case FolderRef(path):
            if not (path / "config.json").exists():
                raise UserError(
                    f"stage {stage.name}: teacher {path} is not here, or has no config.json; "
                    f"give a folder: --set stages.{stage.name}.teacher=FOLDER"
                )
            source = str(path)
        case HubRef(hub_id):
            source = hub_id
        case _:
            raise UserError(
                f"stage {stage.name}: teacher {stage.teacher} is in a registry; `minilm pull` it and give the folder: "
                f"--set stages.{stage.name}.teacher=FOLDER"
            )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"stage {stage.name}: no config of teacher {stage.teacher} here ({reason}); "
            f"give a folder: --set stages.{stage.name}.teacher=FOLDER"
        ) from error
    if config.model_type not in FAMILIES:
        raise ModelError(f"architecture {config.model_type!r} has no tap; these have: {', '.join(FAMILIES)}")
    return config


def row_length(recipe: Recipe) -> int:
    """Tokens a row: of a built data set its own, else what the recipe says."""
    shards = [corpus.shards for corpus in recipe.data.corpora or () if corpus.shards]
    if not shards:
        return recipe.data.seq_len
    if "://" in str(shards[0]) or not Path(shards[0]).is_dir():
        raise UserError(
            f"data set {shards[0]} is not here to say how long its rows are; add --seq-len TOKENS"
        )
    return load_manifest(Path(shards[0])).seq_len
