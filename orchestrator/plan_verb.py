"""`minilm plan RECIPE`: a recipe and the configs of its teachers → `plan`, as a table or JSON. Reads no weights.

Encoders are built without storage, so that parameters are counted and not guessed, for every architecture.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig

from data.manifest import load_manifest
from model.distiller import Distiller
from model.encoder import TappedEncoder, build_student, count_parameters
from model.errors import ModelError
from model.objective import Objective
from model.shape import FAMILIES, shape_of, tapped_layer
from orchestrator.errors import UserError
from orchestrator.plan import Body, Machine, Plan, Work, plan
from orchestrator.progress import duration
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.recipe_types import Stage
from orchestrator.references import FolderRef, HubRef, StudentRef


def plan_recipe(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.set)
    machine = machine_of(options)
    least, most = recipe.compute.workers
    plans = []
    for work in works(recipe, options.seq_len):
        numbers = {least, most, *(2**n for n in range(work.micro_batches.bit_length()))}
        plans.append(plan(work, machine, sorted(numbers | {work.micro_batches})))
    if options.json:
        print("\n".join(json.dumps(as_json(one)) for one in plans))
    else:
        print("\n\n".join(table(one, machine) for one in plans))
    return 0


def machine_of(options: argparse.Namespace) -> Machine:
    network = {"bandwidth": options.interconnect * 1e9}
    if options.tokens_per_second:
        return Machine(tokens_per_second=options.tokens_per_second, **network)
    if options.measure:
        from model.bench import matmul_peak

        device = "cuda" if torch.cuda.is_available() else "cpu"
        peak = matmul_peak(device, torch.bfloat16 if device == "cuda" else torch.float32)
        return Machine(flops_per_second=peak, **network)
    return Machine(**network)


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
    to_the_end = bool({"hidden", "logits"} & objective.parts)
    return Work(
        stage=stage.name,
        teacher=body(teacher, teacher.trained_parameters(), to_the_end),
        students=tuple(
            body(student, distiller.trained_parameters(name), to_the_end)
            for name, student in students.items()
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


def body(encoder: TappedEncoder, trained: dict[str, nn.Parameter], to_the_end: bool) -> Body:
    """`trained`: what of the encoder runs."""
    running = {id(parameter) for parameter in trained.values()}
    linear = [m.weight for m in encoder.model.modules() if isinstance(m, nn.Linear)]
    config = encoder.model.config
    return Body(
        parameters=count_parameters(encoder.model),
        trained=sum(parameter.numel() for parameter in trained.values()),
        matrices=sum(weight.numel() for weight in linear if id(weight) in running),
        layers=encoder.layer,
        attentions=encoder.layer - (not to_the_end),
        hidden=config.hidden_size,
        ffn=getattr(config, FAMILIES[config.model_type].ffn),
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


def as_json(found: Plan) -> dict[str, Any]:
    values = asdict(found)
    values["flops_a_token"]["total"] = found.flops_a_token.total
    values["memory"]["device"] = found.memory.device
    return values


def table(found: Plan, machine: Machine) -> str:
    """The plan in lines for people."""
    work, flops, memory = found.work, found.flops_a_token, found.memory
    lines = [
        f"stage {work.stage}: {work.steps:,} steps of {work.batch} x {work.seq_len} tokens = {found.tokens:,} tokens",
        f"  operations    {found.flops:.2e} FLOP; MFLOP a token: teacher {flops.teacher / 1e6:.1f}, "
        f"students {flops.students / 1e6:.1f}, relations {flops.relations / 1e6:.1f}",
        f"  parameters    teacher {work.teacher.parameters:,}, students "
        + ", ".join(f"{s.parameters:,} ({s.trained:,} trained)" for s in work.students),
        f"  memory        about {size(memory.device)} a worker: teacher {size(memory.teacher)}, students "
        f"{size(memory.students)}, moments {size(memory.moments)}, gradients {size(memory.sums)}, "
        f"activations about {size(memory.activations)}; the main one {size(memory.save_copy)} of host memory more",
        f"  checkpoints   {size(found.checkpoint)} each, {size(found.stored)} at the end",
    ]
    known = found.scaling[0].seconds > 0
    if not known:
        lines.append(
            "  time          unknown; add --tokens-per-second X, or --measure on the machine that will run it"
        )
    elif machine.flops_per_second:
        lines.append(
            f"  time          from {machine.flops_per_second / 1e9:,.0f} GFLOP/s of matrix products here, of which a "
            f"step is taken to reach {machine.share_of_peak:.0%}"
        )
    lines.append(
        "  workers  micro-batches each" + ("  seconds a step  stage takes" if known else "") + "  efficiency"
    )
    for row in found.scaling:
        time = f"{row.seconds:>16.3g}{duration(found.seconds(row.workers)):>13}" if known else ""
        lines.append(f"  {row.workers:>7}{row.micro_batches:>20}{time}{row.efficiency:>12.0%}")
    lines.append(
        f"  more than {work.micro_batches} workers are refused: a step has {work.micro_batches} micro-batches of "
        f"{work.micro_batch} rows; a smaller micro_batch makes room for more"
    )
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """`1234567` → `1.2 MB`."""
    power = min(4, int(math.log(max(num_bytes, 1), 1000)))
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
