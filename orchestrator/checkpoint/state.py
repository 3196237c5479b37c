"""The tensors of a checkpoint: captured from students and optimisers, and loaded back into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # the driver imports this module, and no modelling code
    from minilm.orchestrator.train.step import StudentState

MOMENTS = ("exp_avg", "exp_avg_sq")


def capture(
    models: Mapping[str, torch.nn.Module], students: Sequence[StudentState]
) -> dict[str, dict[str, Tensor]]:
    """The live tensors of a checkpoint by file stem: each student's whole model, and its optimiser's state."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for student in students:
        tensors[f"{student.name}.model"] = dict(models[student.name].state_dict())
        tensors[f"{student.name}.optimizer"] = optimizer_tensors(student)
    return tensors


def load(
    meta: Mapping[str, Any],
    tensors: Mapping[str, dict[str, Tensor]],
    models: Mapping[str, torch.nn.Module],
    students: Sequence[StudentState],
) -> None:
    """Load what `capture` has captured, by file name, back into `models` and `students`."""
    for student in students:
        models[student.name].load_state_dict(tensors[f"{student.name}.model.safetensors"])
        load_optimizer(student, tensors[f"{student.name}.optimizer.safetensors"], meta["step"])


def optimizer_tensors(student: StudentState) -> dict[str, Tensor]:
    """Adam's two moments of every trained parameter, named `<moment>/<parameter>` (none before the first update),
    and `refused` (`StudentState.skipped`)."""
    state = student.optimizer.state
    moments = {
        f"{moment}/{name}": state[parameter][moment]
        for name, parameter in student.parameters.items()
        if parameter in state
        for moment in MOMENTS
    }
    return moments | {"refused": student.skipped}


def load_optimizer(student: StudentState, tensors: dict[str, Tensor], step: int) -> None:
    """Put the moments back. AdamW's own counter is the number of updates that were not skipped."""
    skipped = tensors["refused"]
    student.skipped = skipped.to(student.skipped.device)
    for name, parameter in student.parameters.items():
        if f"exp_avg/{name}" not in tensors:
            continue
        state: dict[str, Tensor] = {m: tensors[f"{m}/{name}"].to(parameter.device) for m in MOMENTS}
        updates = float(step - int(skipped[0]))
        state["step"] = torch.tensor(updates, dtype=torch.float32, device=parameter.device)
        student.optimizer.state[parameter] = state
