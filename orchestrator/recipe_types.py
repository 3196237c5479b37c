"""The types of a recipe: every key that may stand in the YAML, its default and its bounds.

This file is the reference for recipe authors: recipes/schema.json is made from it, field comments
included. It leaves out how a file is read (recipe_source.py) and rules that span keys
(recipe_checks.py).

Invariant: unknown keys are refused, and everything is frozen once read.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from orchestrator.errors import UserError
from orchestrator.references import check_form


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")  # pydantic would read true as 1
    return value


def _slug(value: Any) -> Any:
    text = value if isinstance(value, str) else ""
    words = text.replace("_", "-").split("-")
    if (
        len(text) > 63
        or text.isdecimal()
        or not all(w.isascii() and w.isalnum() and w == w.lower() for w in words)
    ):
        raise ValueError("a name of a-z, 0-9, - and _, not a number alone, 63 characters at most")
    return value


def _reference(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("a reference written as text")
    try:
        check_form(value)
    except UserError as error:
        raise ValueError(str(error).partition("allowed: ")[2]) from None
    return value


def _local_path(value: Any) -> Any:
    if not isinstance(value, str) or not value or "://" in value:
        raise ValueError("a path on this machine")
    return value


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _last_or_number(value: Any) -> Any:
    if value == "last" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("last, or a layer's number counted from 1")


def _auto_or_number(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("auto, or an integer of at least 1")


Slug = Annotated[str, BeforeValidator(_slug), Field(pattern=r"^[a-z0-9]+([-_][a-z0-9]+)*$", max_length=63)]
ReferenceText = Annotated[str, BeforeValidator(_reference)]
LocalPath = Annotated[str, BeforeValidator(_local_path)]
Whole = Annotated[int, BeforeValidator(_not_bool)]
Count = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
TextPaths = Annotated[
    tuple[LocalPath, ...],
    BeforeValidator(_one_or_several),
    Field(min_length=1),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Data(_Section):
    """What the student reads: a built data set (`shards`), or `text` that the run builds one from."""

    shards: LocalPath | None = None
    """Folder of a built data set (`minilm data build`); it already fixes all the other keys."""
    text: TextPaths | None = None
    """Files or globs: txt, json, jsonl, csv, parquet, plain or gz/xz/zst; `package:NAME/file` for a
    file of an installed package."""
    tokenizer: ReferenceText | None = None
    """Tokenizer with the teacher's vocabulary: a folder, a hub id, `package:NAME/folder` or a
    registered model."""
    seq_len: Annotated[Whole, Field(ge=8, le=65_536)] = 512
    """Tokens a row."""
    packing: Literal["full", "document"] = "full"
    """full: rows filled to the end, no padding; document: a row never crosses documents."""
    held_out: Annotated[Number, Field(ge=0, le=0.5)] = 0.01
    """Share of the documents kept out of training and used to measure the divergence."""
    text_field: str | None = None
    """Field or column that holds the text in json, jsonl, csv and parquet; default: found by itself."""

    @model_validator(mode="after")
    def _shards_or_text(self) -> "Data":
        given = {key for key in self.model_fields_set if getattr(self, key) is not None}
        if ("shards" in given) == ("text" in given):
            raise ValueError("either shards: FOLDER, or text: FILES with tokenizer: REFERENCE")
        if "shards" in given and given != {"shards"}:
            others = ", ".join(sorted(given - {"shards"}))
            raise ValueError(f"shards alone, because the data set was built with its own; remove {others}")
        if "text" in given and "tokenizer" not in given:
            raise ValueError("text: FILES with tokenizer: REFERENCE, the teacher's own")
        return self


class Student(_Section):
    """The shape of one student and how it starts."""

    name: Slug
    """Unique in the recipe: a later stage's `teacher` may be this name. With `student:` the default is
    the stage's name."""
    layers: Count
    """Transformer layers."""
    hidden: Count
    """Hidden size."""
    ffn: Count = Field(default_factory=lambda known: 4 * known["hidden"])
    """Inner size of the feed-forward part; default: 4 × hidden."""
    heads: Count | None = None
    """Attention heads; default: the teacher's."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Dropout of the student while it trains."""
    init: Literal["random"] = "random"
    """How the weights start."""


class Stage(_Section):
    """One teacher and the student, or students, that learn from it."""

    name: Slug
    """Unique in the recipe."""
    teacher: ReferenceText
    """An earlier student's name, a folder, a hub id, `package:NAME/folder`, `models:/NAME@ALIAS` or
    `models:/NAME/VERSION`."""
    teacher_layer: Annotated[Literal["last"] | Count, BeforeValidator(_last_or_number)] = "last"
    """The teacher's layer that is imitated, counted from 1."""
    students: Annotated[tuple[Student, ...], Field(min_length=1)]
    """Students that share the teacher's forward pass; `student:` is the short form for one."""
    objective: Literal["minilm", "minilmv2"] = "minilm"
    """minilm: Q-K and V-V relations; minilmv2: Q-Q, K-K and V-V relations."""
    batch: Count
    """Rows a step, over all workers."""
    micro_batch: Count | None = None
    """Rows computed at once; default: compute.micro_batch."""
    steps: Count
    """Optimiser updates."""
    peak_lr: Positive
    """Learning rate at the end of the warm-up."""
    warmup_steps: Annotated[Whole, Field(ge=0)]
    """Steps in which the learning rate rises from 0 to its peak."""
    schedule: Literal["linear"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of Adam's two averages."""
    adam_eps: Positive = 1e-6
    """Adam's epsilon."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    """Decoupled weight decay (none on biases and norms)."""
    max_gradient_norm: Positive | None = None
    """Gradients of a greater norm are scaled down to it; default: never."""
    eval_every: Count | None = None
    """Steps between measurements on held-out rows; default: at the first and the last step only."""
    held_out_rows: Annotated[Whole, Field(ge=0)] = 256
    """Held-out rows that a measurement reads at most; 0 measures nothing."""

    @model_validator(mode="before")
    @classmethod
    def _student_is_short_for_students(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "student" not in given:
            return given
        if "students" in given:
            raise ValueError("student: (one) or students: (a list), not both")
        student, rest = given["student"], {key: value for key, value in given.items() if key != "student"}
        if isinstance(student, dict) and "name" in given:
            student = {"name": given["name"], **student}
        return rest | {"students": [student]}


class Compute(_Section):
    """Where and how it is computed. Only `micro_batch` and `precision` change the result."""

    workers: Count = 1
    """Processes that share a step's micro-batches, one device each."""
    micro_batch: Count = 32
    """Rows computed at once, the unit of determinism; divides every stage's batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward pass; auto: bfloat16 where the device computes in it."""
    threads: Annotated[Literal["auto"] | Count, BeforeValidator(_auto_or_number)] = "auto"
    """CPU threads a worker."""
    checkpoint_every_steps: Count | None = None
    """Steps between checkpoints, beside the time between them; default: by time alone."""
    checkpoint_every_seconds: Positive = 300.0
    """Seconds between checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints kept for each stage."""


class Tracking(_Section):
    """How the run shows in MLflow."""

    experiment: Annotated[str, Field(min_length=1)]
    """MLflow experiment; default: the recipe's name."""
    log_every: Count = 10
    """Steps between points."""
    alias: Slug = "newest"
    """Alias that the registered students get."""


class Recipe(_Section):
    """What to distil: data, then stages in order, each with one teacher and its students."""

    name: Slug
    """Registered models are called NAME-STUDENT."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Fixes the rows of every step, the first weights and dropout."""
    data: Data
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """In order; a stage's student may teach a later stage."""
    compute: Compute = Field(default_factory=Compute)
    tracking: Tracking

    _as_written: dict[str, str] = PrivateAttr(default_factory=dict)  # absolute path → as the file has it

    @model_validator(mode="before")
    @classmethod
    def _experiment_defaults_to_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            return given
        tracking = given.get("tracking")
        if not isinstance(tracking, dict | None):
            return given
        return given | {"tracking": {"experiment": given["name"], **(tracking or {})}}

    @property
    def student_names(self) -> tuple[str, ...]:
        """All students in the order of their stages."""
        return tuple(student.name for stage in self.stages for student in stage.students)

    def micro_batch(self, stage: Stage) -> int:
        """Rows that `stage` computes at once."""
        return stage.micro_batch or self.compute.micro_batch

    def registered_name(self, student: Student) -> str:
        """The student's name in the model registry."""
        return f"{self.name}-{student.name}"

    def result_fields(self) -> dict[str, Any]:
        """Everything in the recipe that determines the result, as JSON values in canonical form.

        Two spellings of the same recipe (defaults written out, `student:` for `students:`) give the same
        value. Left out: workers, device, threads, checkpointing, tracking, how often is measured. Local
        paths stand as the file has them, so that moving recipe and data together changes nothing.
        """
        fields = self.model_dump(mode="json", exclude={"compute", "tracking"})
        fields["compute"] = {"precision": self.compute.precision}
        data = fields["data"]
        for key in ("shards", "tokenizer"):
            data[key] = self._as_written.get(data[key], data[key])
        data["text"] = data["text"] and [self._as_written.get(path, path) for path in data["text"]]
        for stage, out in zip(self.stages, fields["stages"], strict=True):
            out["micro_batch"] = self.micro_batch(stage)
            out["teacher"] = self._as_written.get(stage.teacher, stage.teacher)
            del out["eval_every"]
        return fields


SECTIONS: dict[str, type[_Section]] = {
    "": Recipe,
    "data": Data,
    "stages": Stage,
    "students": Student,
    "compute": Compute,
    "tracking": Tracking,
}
