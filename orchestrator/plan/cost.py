"""What a stage will cost, worked out before anything runs: operations, memory, storage, time, and what workers buy.

Pure functions of a few numbers. `tests/test_plan.py` holds the formulas against counted operations and parameters
and against the memory of a real step. Matrix products are counted and nothing else (2 operations a
multiply-and-add). What is estimated rather than counted says so: activations, time, the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT, INTEGER = 4, 8  # bytes
# of a worker's process on a CPU, measured: Python, PyTorch, transformers and what they load (docs/benchmarks.md)
PROGRAM = 380_000_000
LOGITS = 7  # copies of them at the peak of soft labels: logits, their log-softmax, gradients
MAPS = 3  # that a layer keeps for its backward pass where the scores have a learned bias
CHUNKS = {"cpu": 1 << 17, "cuda": 1 << 24}  # gradients that are made integers at once (train.gradient_sum)
TILES = 4 << 19  # scores of the tiles that a CPU holds at a time (model.encoder.tile_size)


@dataclass(frozen=True)
class Body:
    """An encoder as far as it runs, up to its tap.

    parameters: of all that is loaded; trained: of those that get a gradient. matrices: elements of the weight matrices
    that a token is multiplied by, of those that few tokens of a row meet (a head's, a pooler's) the share; untrained:
    the same of matrices that run and get no gradient. attentions: layers whose attention runs (the tapped one's does
    not); keeps_maps: whether their backward pass has the scores still, and does not compute them again. heads: of
    attention; vocabulary: the tokens that it knows. keeps_start: whether the weights that it started with, and the
    trained ones while others are measured, lie beside its own.
    """

    parameters: int
    trained: int
    matrices: float
    layers: int
    attentions: int
    hidden: int
    ffn: int
    untrained: float = 0.0
    keeps_maps: bool = False
    keeps_start: bool = False
    heads: int = 1
    vocabulary: int = 0


@dataclass(frozen=True)
class Work:
    """One stage. relations: how many the loss compares, in the last layers or in `every_layer` of a student; logits: of
    how many tokens of a row; exact: gradients are summed as integers.

    activation_bytes: 4, or 2 where the forward pass is in bfloat16. device: cpu or cuda. until: `steps` are the most.
    """

    stage: str
    teacher: Body
    students: tuple[Body, ...]
    relations: int
    seq_len: int
    batch: int
    micro_batch: int
    steps: int
    exact: bool
    keep: int
    keep_every: int | None
    activation_bytes: int = FLOAT
    device: str = "cpu"
    until: bool = False
    every_layer: bool = False
    logits: int = 0

    @property
    def micro_batches(self) -> int:
        return self.batch // self.micro_batch


@dataclass(frozen=True)
class Machine:
    """One worker's device and the network between workers.

    flops_per_second: what a step reaches, of every stage alike; 0 where that is not known. device, precision: what it
    computes on and in. memory: bytes of the device, 0 where that is not known. source: in words, where this is from.
    bandwidth: bytes a second between two workers, each way; latency, overhead: seconds a message, and a step beside
    its micro-batches.
    """

    flops_per_second: float = 0.0
    device: str = "cpu"
    precision: str = "float32"
    memory: float = 0.0
    source: str = ""
    bandwidth: float = 1e9
    latency: float = 5e-5
    overhead: float = 0.005


@dataclass(frozen=True)
class Flops:
    """Operations for one token, forward and backward."""

    teacher: float
    students: float
    relations: float

    @property
    def total(self) -> float:
        return self.teacher + self.students + self.relations


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker. program: of its process beside tensors, where it computes on a CPU: libraries, and memory
    that was freed and is kept. `save_copy` lies in the host memory of the main one."""

    teacher: int
    students: int
    moments: int
    sums: int
    activations: int
    batch: int
    save_copy: int
    program: int = 0

    @property
    def total(self) -> int:
        """Of the device, or of the process where that is a CPU."""
        return self.device + self.program

    @property
    def device(self) -> int:
        """All tensors that a step needs where it is computed."""
        return self.teacher + self.students + self.moments + self.sums + self.activations + self.batch


@dataclass(frozen=True)
class Scale:
    """A number of workers: the micro-batches of the busiest, seconds a step, and of what the workers could do the share
    that is had. Both are None where no speed is known."""

    workers: int
    micro_batches: int
    seconds: float | None
    efficiency: float | None


@dataclass(frozen=True)
class Plan:
    """tokens, flops: of the whole stage. checkpoint, stored: bytes of one, and of all that are kept at the end."""

    work: Work
    flops_a_token: Flops
    tokens: int
    flops: float
    memory: Memory
    checkpoint: int
    stored: int
    scaling: tuple[Scale, ...]

    def seconds(self, workers: int) -> float | None:
        """Of the whole stage with so many workers, or with the most that are of use; None where no speed is known."""
        row = max((row for row in self.scaling if row.workers <= workers), key=lambda row: row.workers)
        return None if row.seconds is None else self.work.steps * row.seconds


def plan(work: Work, machine: Machine, workers: Sequence[int]) -> Plan:
    """The stage on each number of `workers` in turn; those above its micro-batches are left out."""
    flops, tokens = flops_a_token(work), work.steps * work.batch * work.seq_len
    size = checkpoint_bytes(work)
    kept_for_good = work.steps // work.keep_every if work.keep_every else 0
    useful = sorted({number for number in workers if number <= work.micro_batches})
    return Plan(
        work,
        flops,
        tokens,
        tokens * flops.total,
        memory(work),
        size,
        size * (work.keep + kept_for_good),
        tuple(scale(work, machine, number) for number in useful),
    )


def flops_a_token(work: Work) -> Flops:
    """A product with a weight matrix: 2 operations an element forward, twice that backward. Attention over T tokens:
    4·T·hidden forward; backward 10 where the scores are computed again, else 8. A relation: 2·T·hidden for each side,
    and 4 more for the student's gradient, taken in the same pass."""
    length = work.seq_len

    def attention(body: Body) -> int:
        return length * body.hidden * body.attentions

    teacher = 2 * (work.teacher.matrices + work.teacher.untrained) + 4 * attention(work.teacher)
    students = sum(
        6 * body.matrices + 2 * body.untrained + (12 if body.keeps_maps else 14) * attention(body)
        for body in work.students
    )
    relations = sum(
        work.relations
        * (body.layers if work.every_layer else 1)
        * length
        * (2 * work.teacher.hidden + 6 * body.hidden)
        for body in work.students
    )
    return Flops(teacher, students, relations)


def memory(work: Work) -> Memory:
    """Weights, Adam's two moments, gradients (float32, beside int64 sums where exact) and activations of a micro-batch.

    Activations are those of BERT's layers: what a student keeps for its backward pass, tiles of scores, and what the
    teacher needs at once, in one layer. On a CPU that comes on top in the process: memory which the teacher has freed
    does not all go to the student.
    """
    tokens = work.micro_batch * work.seq_len
    trained = sum(body.trained for body in work.students)
    teacher_now = 6 * work.teacher.hidden + 2 * work.teacher.ffn
    taught = work.activation_bytes * 3 * work.teacher.hidden
    now = max(work.activation_bytes * teacher_now, *(bytes_kept_by(work, body) for body in work.students))
    scores = work.micro_batch * max(body.heads for body in work.students) * work.seq_len**2
    tiles = min(4 * scores, TILES) if work.device == "cpu" else 0
    logits = work.micro_batch * work.logits * LOGITS * work.teacher.vocabulary
    if work.logits:  # and the gradients of a matrix that is the embeddings and the head
        logits += 2 * max(body.vocabulary * body.hidden for body in work.students)
    return Memory(
        teacher=FLOAT * work.teacher.parameters,
        students=FLOAT * sum(body.parameters + 2 * body.keeps_start * body.trained for body in work.students),
        moments=2 * FLOAT * trained,
        sums=(FLOAT + INTEGER) * (trained + min(trained, CHUNKS[work.device]))
        if work.exact
        else FLOAT * trained,
        activations=tokens * (taught + now) + FLOAT * (logits + tiles),
        batch=2 * INTEGER * tokens,
        save_copy=checkpoint_bytes(work),
        program=PROGRAM + FLOAT * tokens * teacher_now if work.device == "cpu" else 0,
    )


def bytes_kept_by(work: Work, body: Body) -> int:
    """Bytes that a token of a student keeps until its backward pass, those of the compared layers among them.

    The projections keep their input and what they give; attention and what follows in a layer the inputs of three
    products and of gelu, and those of both normalisations, which are float32.
    """
    projections = 4 * body.hidden
    maps = MAPS * body.heads * work.seq_len if body.keeps_maps else 0
    rest = 2 * body.hidden + 2 * body.ffn + maps
    numbers = body.layers * projections + body.attentions * rest
    if work.every_layer:
        numbers += (body.layers - 1) * 6 * (work.teacher.hidden + body.hidden)
    gradients_and_embeddings = 5 * body.hidden
    floats = 2 * body.attentions * body.hidden + gradients_and_embeddings
    return work.activation_bytes * numbers + FLOAT * floats


def checkpoint_bytes(work: Work) -> int:
    """Students whole, two moments of what is trained, and the start where that is kept."""
    return FLOAT * sum(body.parameters + (2 + body.keeps_start) * body.trained for body in work.students)


def reduced_bytes(work: Work) -> int:
    """What the workers sum once a step."""
    return (INTEGER if work.exact else FLOAT) * sum(body.trained for body in work.students)


def all_reduce_seconds(num_bytes: float, workers: int, machine: Machine) -> float:
    """A ring: each worker sends and receives 2·(W-1)/W of the bytes in 2·(W-1) messages."""
    if workers == 1:
        return 0.0
    turns = 2 * (workers - 1)
    return turns / workers * num_bytes / machine.bandwidth + turns * machine.latency


def scale(work: Work, machine: Machine, workers: int) -> Scale:
    """step = ceil(M/W) micro-batches + all-reduce + overhead; nothing of it is taken to overlap."""
    share = -(-work.micro_batches // workers)
    once = all_reduce_seconds(reduced_bytes(work), workers, machine) + machine.overhead
    compute = micro_batch_seconds(work, machine)
    if compute is None:
        return Scale(workers, share, None, None)
    alone = work.micro_batches * compute + machine.overhead
    seconds = share * compute + once
    return Scale(workers, share, seconds, alone / (workers * seconds))


def micro_batch_seconds(work: Work, machine: Machine) -> float | None:
    """None where the machine's speed is not known."""
    if not machine.flops_per_second:
        return None
    return work.micro_batch * work.seq_len * flops_a_token(work).total / machine.flops_per_second


def flops_per_second(work: Work, tokens_per_second: float) -> float:
    """What a machine reaches that was measured with this stage."""
    return tokens_per_second * flops_a_token(work).total
