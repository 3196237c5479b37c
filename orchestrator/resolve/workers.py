"""How many workers a recipe asks for, with `compute.workers: auto` as numbers."""

from __future__ import annotations

from typing import NamedTuple

from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.system.numa import numa_nodes


class Workers(NamedTuple):
    """The fewest and the most. reason: a line that says how `auto` was decided; "" for a recipe that has numbers."""

    least: int
    most: int
    reason: str = ""


def workers_of(recipe: Recipe, *, joins: bool = False) -> Workers:
    """`auto`: one for each GPU where the device may be one, else one for each NUMA node; never more than a step of any
    stage has micro-batches. joins: on a cluster that is not there yet, as many as it will have places for."""
    asked = recipe.compute.workers
    if asked != "auto":
        return Workers(*asked)
    most = min(stage.batch // stage.micro_batch for stage in recipe.stages)
    if joins:
        return Workers(
            1, most, f"compute.workers: auto is [1, {most}] on a cluster, as many as it has places"
        )
    found, what = places_here(recipe.compute.device)
    number = min(found, most)
    at_most = f", and a step has {most} micro-batch{'es' * (most > 1)}" if most < found else ""
    return Workers(
        number,
        number,
        f"compute.workers: auto is {number}, because this machine has {found} {what}{'s' * (found > 1)}{at_most}",
    )


def places_here(device: str) -> tuple[int, str]:
    """Of what each worker on this machine gets one, and its name."""
    if device != "cpu":
        import torch  # takes seconds

        if torch.cuda.is_available():
            return torch.cuda.device_count(), "GPU"
    return len(numa_nodes()), "NUMA node"
