"""Whether a student can learn from a teacher, by their configs and the objective alone: nothing is loaded or built.

Whatever `Distiller`, `build_student` and `initialize` would refuse later, is refused here first.
"""

from transformers import PreTrainedConfig

from minilm.model.encoder.shape import picked_layers, shape_of, tapped_layer
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective


def has_head(config: PreTrainedConfig) -> bool | None:
    """Whether the model that this config was saved with has a masked-language-model head; None if it does not say."""
    architectures = config.architectures or ()
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in architectures) or (
        False if architectures else None
    )


def check_student(
    objective: Objective,
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    *,
    layer: int | str = "last",
    init: str = "random",
) -> None:
    """ModelError where the student cannot be compared with the teacher's `layer`, or cannot start as `init` says."""
    t, s = shape_of(teacher), shape_of(student)
    tapped = tapped_layer(teacher, layer)
    objective.check(t.heads, t.hidden, s.heads, s.hidden)
    if (
        objective.needs_bias
        and teacher.model_type == "mpnet"
        and objective.relation_heads not in (None, t.heads)
    ):
        raise ModelError(
            f"{objective.relation_heads} relation heads cannot carry a position bias made for {t.heads} heads; leave "
            f"relation_heads out for q-k"
        )
    if objective.layer_to_layer:
        if s.layers > tapped:
            raise ModelError(
                f"{s.layers} layers, and the teacher has {tapped} up to its tap; layer-to-layer needs a student that "
                f"is not deeper"
            )
        for number in picked_layers(tapped, s.layers):
            tapped_layer(teacher, number)
    if init == "teacher-layers":
        _check_start(teacher, student)


def _check_start(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """`init: teacher-layers` takes a slice of the teacher's layers (`initialize.from_teacher`)."""
    t, s = shape_of(teacher), shape_of(student)
    picked_layers(t.layers, s.layers)
    if t.heads != s.heads:
        raise ModelError(
            f"{s.heads} student heads cannot start from {t.heads} teacher heads; give both the same number"
        )
    for what, ours, theirs in (("hidden", s.hidden, t.hidden), ("ffn", s.ffn, t.ffn)):
        if ours > theirs:
            raise ModelError(
                f"{what} {ours} cannot start from the teacher's layers, which have {theirs}; give at most that, or "
                f"init: random"
            )
    if t.architecture == "modernbert" and s.hidden != t.hidden:
        raise ModelError(
            "modernbert keeps q, k and v in one matrix: no slice is defined; give both one hidden size"
        )
