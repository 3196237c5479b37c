"""How fast this machine trains a stage of a recipe: a few real steps with weights and rows at random."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from minilm.orchestrator.plan.cost import Work
from minilm.orchestrator.plan.estimate import build_stage, planned_stages
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.numerics import AUTOCAST
from minilm.orchestrator.train.step import StudentState, num_values, train_step

MICRO_BATCHES = 4  # of a step, at most: their number does not change a rate
SECONDS, STEPS = 5.0, 3  # measured until both are over


def stage_tokens_per_second(recipe: Recipe, work: Work, device: torch.device, precision: str) -> float:
    """Tokens a second of one worker in the stage of `work`: the median of the measured steps."""
    torch.set_num_threads(recipe.compute.threads or len(os.sched_getaffinity(0)))
    configs: dict[str, PreTrainedConfig] = {}
    for resolved in planned_stages(recipe, work.seq_len):
        found = resolved.stage.name == work.stage
        distiller = build_stage(resolved, configs, str(device) if found else "meta")
        if found:
            break
    if distiller.objective.needs_head:  # any token will do
        distiller.objective = replace(distiller.objective, mask_token_id=4, special_ids=(0, 1, 2, 3, 4))
    distiller.to(device).train()
    number = min(work.micro_batches, MICRO_BATCHES)
    states = [
        StudentState(
            name,
            distiller.trained_parameters(name),
            betas=resolved.stage.adam_betas,
            eps=resolved.stage.adam_eps,
            weight_decay=resolved.stage.weight_decay,
            gradient_sum=recipe.compute.gradient_sum,
            num_micro_batches=number,
            num_terms=num_values(distiller),
        )
        for name in distiller.students
    ]
    vocabulary = distiller.teacher.model.config.vocab_size
    rows = torch.randint(5, vocabulary, (number, work.micro_batch, work.seq_len))
    world = World(rank=0, size=1, device=device, control=None)

    def seconds(step: int) -> float:
        began = time.perf_counter()
        train_step(
            distiller,
            states,
            [(i, ids, None) for i, ids in enumerate(rows)],
            step=step,
            seed=0,
            learning_rate=1e-6,
            max_gradient_norm=resolved.stage.max_gradient_norm,
            autocast=AUTOCAST[precision],
            world=world,
            seq_len=work.seq_len,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(0)
    times: list[float] = []
    while len(times) < STEPS or sum(times) < SECONDS:
        times.append(seconds(len(times) + 1))
    return rows.numel() / statistics.median(times)
