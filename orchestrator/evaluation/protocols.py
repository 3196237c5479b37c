"""How a task is trained and how often: the protocols, which are never mixed in one table.

glue-minilm   the MiniLM papers': a grid of learning rates and epochs, 4 seeds, the best setting's mean. It is chosen on
              the dev set that is reported, as the papers do; that favours every model alike, and the result says so.
glue-fixed    one setting for every task, for daily work: 5 seeds on small sets, 3 on the others.
squad2, xnli  the MiniLM papers' for these tasks.
embed-fast    no training: the similarity of vectors, minutes on a CPU; a search among them, hours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.tasks import TASKS, Task

SMALL_ROWS = 10_000


@dataclass(frozen=True)
class Setting:
    """How one model is trained on one task. `epochs` is 0 where nothing is trained; `stride` is SQuAD's.

    The rest is BERT's: AdamW with weight decay 0.01 but for biases and norms, gradients clipped to 1, a learning rate
    that rises over a tenth of the steps and falls to 0 linearly, the model's own dropout.
    """

    learning_rate: float
    epochs: int
    tokens: int
    batch: int
    stride: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"lr {self.learning_rate:g}, {self.epochs} epochs" if self.epochs else "no training"


@dataclass(frozen=True)
class Protocol:
    """kinds: of the tasks that it is for. settings: tried for each task. seeds: None for 5 on small sets, else 3."""

    name: str
    tasks: tuple[str, ...]
    settings: tuple[Setting, ...]
    seeds: int | None
    chosen: str = ""  # how the reported setting was chosen, where there are several

    def settings_of(self, task: Task) -> tuple[Setting, ...]:
        if self.name == "glue-minilm" and task.long_training:
            return (*self.settings, *_grid((10,)))
        if task.kind == "retrieval":
            return (_SEARCH,)
        return self.settings

    def seeds_of(self, rows: int) -> int:
        """How many seeds a task with so many training rows gets, where the user has not said."""
        return self.seeds or (5 if rows < SMALL_ROWS else 3)


def _grid(epochs: tuple[int, ...]) -> tuple[Setting, ...]:
    return tuple(Setting(lr, n, 128, 32) for n in epochs for lr in (2e-5, 3e-5, 4e-5, 5e-5))


_SEARCH = Setting(0.0, 0, 512, 32)  # at most, as the folder says; texts are long
_GLUE = tuple(n for n, task in TASKS.items() if task.kind in ("classes", "score") and not task.trained_on)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "glue-minilm",
            _GLUE,
            _grid((3, 4, 5)),
            4,
            "the setting with the best mean over seeds on the reported dev set",
        ),
        Protocol("glue-fixed", _GLUE, (Setting(5e-5, 3, 128, 32),), None),
        Protocol("squad2", ("squad2",), (Setting(6e-5, 3, 384, 32, stride=128),), 3),
        Protocol("xnli", ("xnli",), (Setting(5e-5, 3, 128, 32),), 3),
        Protocol("embed-fast", ("stsb-embed", "nanobeir"), (Setting(0.0, 0, 256, 64),), 1),
    )
}


def protocol_of(task: Task, asked: str | None) -> Protocol:
    """The protocol of a task: the one asked for where it has the task, else the only one that has it.

    UserError where the one asked for is another kind: fine-tuned and pooled scores have nothing to do with each other.
    """
    fitting = [protocol for protocol in PROTOCOLS.values() if task.name in protocol.tasks]
    if asked is None:
        return PROTOCOLS["glue-fixed"] if len(fitting) > 1 else fitting[0]
    if task.name in PROTOCOLS[asked].tasks:
        return PROTOCOLS[asked]
    if asked.startswith("glue") and len(fitting) == 1:  # named beside GLUE's tasks, it has a table of its own
        return fitting[0]
    raise UserError(
        f"protocol {asked} does not have task {task.name}; it has {', '.join(PROTOCOLS[asked].tasks)}, and "
        f"{task.name} goes by {' or '.join(protocol.name for protocol in fitting)}"
    )
