"""A recipe and its teachers' configs become the numbers that `cost` reckons with. Reads no weights, reckons nothing.

Encoders are built without storage, so that parameters are counted and not guessed, for every architecture.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedConfig

from minilm.data.format.manifest import load_manifest
from minilm.model.compatibility import student_layout
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, count_parameters
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.sentence_head import SentenceHead
from minilm.model.encoder.sentence_layout import SentenceLayout
from minilm.model.encoder.shape import load_config, shape_of, tapped_layer
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.loss.objective import Objective
from minilm.orchestrator.errors import RecipeErrors, UserError
from minilm.orchestrator.plan.cost import Body, Work
from minilm.orchestrator.recipe.references import FolderRef, HubRef, parse_reference
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve.stages import ResolvedStage, check_data, resolve_stages


def works(recipe: Recipe, seq_len: int | None, device: str = "cpu", precision: str = "float32") -> list[Work]:
    """A `Work` for each stage, computed on `device` in `precision`. Raises as `planned_stages`."""
    length = seq_len or row_length(recipe)
    configs: dict[str, PreTrainedConfig] = {}
    return [
        work_of(resolved, recipe, length, configs, device, precision)
        for resolved in planned_stages(recipe, length)
    ]


def planned_stages(recipe: Recipe, seq_len: int) -> list[ResolvedStage]:
    """The stages, resolved. Raises `UserError` where a teacher's config is not here or a stage can't be."""
    stages, problems = resolve_stages(recipe, config_source, seq_len=seq_len)
    if problems or (problems := check_data(stages, seq_len, None, "")):
        raise RecipeErrors(problems)
    return stages


def config_source(reference: str) -> str:
    """Where a model's config can be read: its folder, or a hub id. Raises `UserError` without."""
    match parse_reference(reference):
        case HubRef(hub_id):
            return hub_id
        case FolderRef(path) if (path / "config.json").exists():
            return str(path)
        case FolderRef(path):
            reason = f"{path} is not here, or has no config.json"
        case _:
            reason = f"{reference} is in a registry; `minilm pull` it"
    raise UserError(
        f"{reason}; give the model's folder: --set stages.NAME.teacher=FOLDER, or student.init=FOLDER"
    )


def work_of(
    resolved: ResolvedStage,
    recipe: Recipe,
    seq_len: int,
    configs: dict[str, PreTrainedConfig],
    device: str,
    precision: str,
) -> Work:
    """`configs`: of the students so far; this stage's are added."""
    stage, compute = resolved.stage, recipe.compute
    distiller = build_stage(resolved, configs, "meta").eval()
    bodies = {
        name: body(distiller, student, seq_len, device, distiller.trained_parameters(name))
        for name, student in distiller.students.items()
    }
    starts = [student.name for student in stage.students if student.start_share]
    return Work(
        stage=stage.name,
        teacher=body(distiller, distiller.teacher, seq_len, device, {}),
        students=tuple(
            replace(with_projections(distiller, name, one), keeps_start=name in starts)
            for name, one in bodies.items()
        ),
        relations=len(distiller.objective.relation_names),
        every_layer=distiller.objective.layer_to_layer,
        logits=masked_tokens(distiller.objective, seq_len),
        seq_len=seq_len,
        batch=stage.batch,
        micro_batch=stage.micro_batch,
        steps=stage.steps,
        exact=compute.gradient_sum == "exact",
        keep=compute.keep_checkpoints,
        keep_every=compute.keep_every_steps,
        activation_bytes=2 if precision == "bfloat16" else 4,
        device=device,
        until=stage.until is not None,
    )


def build_stage(resolved: ResolvedStage, configs: dict[str, PreTrainedConfig], device: str) -> Distiller:
    """Teacher and students of a stage with weights at random, or on the device "meta" with none; see `work_of`."""
    stage = resolved.stage
    config = load_config(resolved.source) if resolved.source else configs[stage.teacher]
    objective = Objective.named(**stage.objective_fields())
    kind = AutoModelForMaskedLM if objective.needs_head else AutoModel
    with torch.device(device):
        model = kind.from_config(config, attn_implementation=FAMILIES[config.model_type].attention)
    teacher = TappedEncoder(model.eval(), tapped_layer(config, stage.teacher_layer))
    vectors = resolved.teacher_layout or SentenceLayout()  # of a hub id that is not here
    if objective.embeds:
        teacher.head = SentenceHead(vectors).to(device)
    students = {}
    for student in stage.students:
        start, shape = resolved.starts.get(student.name), resolved.students[student.name]
        base = load_config(start) if start else copy.copy(config)
        base.vocab_size = shape.vocab_size
        built = build_student(
            base,
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            ffn=shape.ffn,
            dropout=student.dropout,
            seed=0,
            head=objective.needs_head,
            max_tokens=shape.max_tokens,
            device="meta" if device == "meta" else "cpu",
        )
        students[student.name] = TappedEncoder(built, student.layers)
        if objective.embeds:
            sizes = config.hidden_size, shape.hidden
            layout = resolved.layouts.get(student.name) or student_layout("", objective, vectors, *sizes)
            students[student.name].head = SentenceHead(layout).to(built.device)
        configs[student.name] = built.config
    return Distiller(teacher, students, objective)


def body(
    distiller: Distiller, encoder: TappedEncoder, seq_len: int, device: str, trained: dict[str, nn.Parameter]
) -> Body:
    """trained: the parameters that get a gradient. The matrices are those that a row of `seq_len` tokens meets, on the
    device "meta"."""
    learns = {id(parameter) for parameter in trained.values()}
    products = {True: 0, False: 0}  # whether a matrix learns: elements x tokens

    def count(linear: nn.Module, _: object, output: torch.Tensor) -> None:
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        products[id(weight) in learns] += weight.numel() * (output.numel() // output.shape[-1])

    modules = [*encoder.model.modules(), *(encoder.head.modules() if encoder.head else ())]
    hooks = [m.register_forward_hook(count) for m in modules if isinstance(m, nn.Linear)]
    ids = torch.zeros(1, seq_len, dtype=torch.int64, device="meta")
    with torch.no_grad():
        encoder(ids, None, ids[:, : masked_tokens(distiller.objective, seq_len)])
    for hook in hooks:
        hook.remove()
    config = encoder.model.config
    return Body(
        parameters=count_parameters(encoder.model),
        trained=sum(parameter.numel() for parameter in trained.values()),
        matrices=products[True] / seq_len,
        untrained=products[False] / seq_len,
        layers=encoder.layer,
        attentions=encoder.layer - encoder.stops_at_tap,
        hidden=config.hidden_size,
        ffn=shape_of(config).ffn,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        keeps_maps=device == "cpu" and FAMILIES[config.model_type].position_bias,
    )


def masked_tokens(objective: Objective, seq_len: int) -> int:
    """Of a row, whose logits are computed; 0 without soft labels."""
    masked = replace(objective, mask_token_id=0).mask_tokens(torch.zeros(1, seq_len, dtype=torch.int64), None)
    return masked.positions.shape[1] if masked else 0


def with_projections(distiller: Distiller, name: str, found: Body) -> Body:
    """The body of student `name` with what it is compared through."""
    sizes = distiller.teacher.model.config.hidden_size, found.hidden
    projections = distiller.objective.projections(*sizes).values()
    layers = found.layers if distiller.objective.layer_to_layer else 1
    return replace(found, matrices=found.matrices + layers * sum(p.weight.numel() for p in projections))


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
