"""Whether a teacher, a student and an objective fit together, from their configs alone: no weights are read.

A recipe is checked with these functions before anything runs, and the distiller calls them for the models it is
given, so that the two agree.
"""

from dataclasses import replace

from minilm.model.encoder.initialize import check_positions, check_start, picked_layers
from minilm.model.encoder.sentence_layout import MODULES, DenseLayer, SentenceLayout
from minilm.model.encoder.shape import EncoderShape, student_shape
from minilm.model.encoder.warm_start import started_shape
from minilm.model.errors import ModelError
from minilm.model.loss.embedding import VectorTerm
from minilm.model.loss.objective import Objective


def check_teacher(objective: Objective, teacher: EncoderShape, layer: int | str = "last") -> None:
    """ModelError unless the teacher can be tapped at `layer` (from 1, or "last") and has the head that is needed."""
    number = teacher.tapped_layer(layer)
    if objective.embeds and number != teacher.layers:
        raise ModelError(
            f"vectors are made of the teacher's last layer, {teacher.layers}, and teacher_layer is {layer}; leave it"
            " out"
        )
    _check_head(objective, "the teacher", teacher)


def fit_student(
    name: str,
    objective: Objective,
    teacher: EncoderShape,
    *,
    layers: int,
    hidden: int,
    heads: int | None = None,
    ffn: int | None = None,
    layer: int | str = "last",
    init: str = "random",
    start: EncoderShape | None = None,
    positions: str = "cut",
    seq_len: int | None = None,
) -> EncoderShape:
    """The shape of a student of these sizes, checked: `student_shape`, then `check_student`.

    start: of the model whose weights it begins with, instead of `init` and `positions`; see `started_shape`.
    positions: one of `POSITIONS`. seq_len: tokens of the rows that it is trained on, None where that is not known yet.
    """
    try:
        if start is not None:
            sizes = {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn}
            student = started_shape(teacher, start, **sizes, any_family=objective.embeds)  # type: ignore[arg-type]
        else:
            student = student_shape(
                teacher,
                layers=layers,
                hidden=hidden,
                heads=heads,
                ffn=ffn,
                has_head=objective.needs_head,
                max_tokens=seq_len if positions == "cut" else None,
            )
            check_positions(teacher, student, positions, init)
    except ModelError as error:
        raise ModelError(f"student {name!r}: {error}") from None
    check_student(name, objective, teacher, student, layer=layer, init=init)
    return student


def check_student(
    name: str,
    objective: Objective,
    teacher: EncoderShape,
    student: EncoderShape,
    *,
    layer: int | str = "last",
    init: str = "random",
) -> None:
    """ModelError, with the student's name, unless it can learn from this teacher.

    student: a shape that `student_shape` gave. layer: the teacher's that is imitated. init: how the student starts,
    one of `INITIALIZATIONS`.
    """
    if teacher.vocab_size != student.vocab_size:
        raise ModelError(
            f"student {name!r} has a vocabulary of {student.vocab_size} and the teacher of {teacher.vocab_size};"
            " both must read the same tokens"
        )
    _check_head(objective, f"student {name!r}", student)
    try:
        objective.check(teacher, student)
        if objective.layer_to_layer:
            mapped_layers(teacher, teacher.tapped_layer(layer), student.layers)
        check_start(teacher, student, init)
    except ModelError as error:
        raise ModelError(f"student {name!r}: {error}") from None


def teacher_layout(
    objective: Objective, whose: str, own: SentenceLayout | None, hidden: int
) -> SentenceLayout:
    """How the teacher's vectors are made. whose: its name, for errors; own: what its folder says, None for nothing;
    hidden: its size.

    ModelError where that is not known, or an objective compares more numbers than they have.
    """
    if own is None and objective.pooling is None:
        raise ModelError(
            f"{whose} does not say how its vectors are pooled (it has no {MODULES}); give a sentence-transformers"
            " model, or embedding: {pooling: mean} (or cls) in the stage, if it was trained to be pooled so"
        )
    found = own or SentenceLayout(objective.pooling or "")
    width = found.width(hidden)
    vectors = [term for term in objective.relations if isinstance(term, VectorTerm)]
    dims = sorted({term.dims for term in vectors if term.dims is not None}, reverse=True)
    if dims and dims[0] != width:
        fitting = [width, *(size for size in dims if size < width)]
        raise ModelError(
            f"dims {dims}: the teacher's vectors have {width} numbers, and the first of dims is all of them; give"
            f" dims: {fitting}"
        )
    return found


def student_layout(
    name: str,
    objective: Objective,
    teacher: SentenceLayout,
    teacher_hidden: int,
    hidden: int,
    start: SentenceLayout | None = None,
) -> SentenceLayout:
    """How a student's vectors are made: its own pooling, and a dense layer to the teacher's width where it needs one.

    hidden: the student's size. start: the layout of the model it goes on from, whose dense layers it keeps. The pooling
    is the objective's, else the start's, else the teacher's. A dense layer is there where the start has one, where the
    widths differ, or where the objective asks for one. ModelError where that cannot be.
    """
    width = teacher.width(teacher_hidden)
    pooling = objective.pooling or (start or teacher).pooling
    if start is not None and start.dense:
        if objective.dense is False or start.width(hidden) != width:
            raise ModelError(
                f"student {name!r}: the model that it starts from has a dense layer to {start.width(hidden)} numbers,"
                f" and the teacher's vectors have {width}"
                + (", with dense: false" if objective.dense is False else "")
                + f"; start from a model without (a copy of it without {MODULES})"
                + (", or leave dense out" if objective.dense is False else "")
            )
        return replace(start, pooling=pooling, normalize=True)
    if objective.dense is False and hidden != width:
        raise ModelError(
            f"student {name!r} has a hidden size of {hidden} and the teacher's vectors {width} numbers, with dense:"
            f" false; leave dense out, or give hidden: {width}"
        )
    wanted = objective.dense or hidden != width
    return SentenceLayout(pooling, (DenseLayer(hidden, width),) if wanted else (), normalize=True)


def mapped_layers(teacher: EncoderShape, layer: int, student_layers: int) -> list[int]:
    """The teacher's layers for layers 1 to M-1 of the student; its last is compared with the teacher's `layer`."""
    if student_layers > layer:
        raise ModelError(
            f"it has {student_layers} layers and the teacher {layer} up to its tap; layer-to-layer needs a student"
            " that is not deeper"
        )
    *earlier, _ = picked_layers(layer, student_layers)
    return [teacher.tapped_layer(number) for number in earlier]


def _check_head(objective: Objective, whose: str, shape: EncoderShape) -> None:
    if objective.needs_head and shape.has_head is False:
        raise ModelError(
            f"soft labels need a masked-language-model head, and {whose} has none; give a model that was saved"
            " with its head, or an objective of relations, such as minilm"
        )
