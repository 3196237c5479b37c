"""A whole training step, ours against one written by hand and those of published projects (peers.py).

All ways take the same rows, objective, sizes, dropout and fused AdamW over all parameters, in turns in one process.
FLOP: those that the objective needs with nothing computed after the tap, the same figure for all ways, so that
fractions of the peak can be compared.
"""

import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.loss.objective import Objective
from minilm.orchestrator.bench.loss import Row, Way, matmul_peak, measure
from minilm.orchestrator.bench.peers import PEERS, Peer


@dataclass(frozen=True)
class Size:
    """An encoder's size, written 6x384."""

    layers: int
    hidden: int

    @staticmethod
    def parse(text: str) -> "Size":
        """ "6x384" -> Size(6, 384)."""
        try:
            layers, hidden = (int(part) for part in text.split("x"))
        except ValueError:
            raise ModelError(f"{text!r} is no encoder size; write layers x hidden, as in 6x384") from None
        return Size(layers, hidden)

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}"


def bench_step(
    *,
    teacher: Size = Size(12, 768),
    students: Sequence[Size] = (Size(6, 384),),
    micro_batches: int = 1,
    batch: int = 8,
    tokens: int = 512,
    heads: int = 12,
    ways: Sequence[str] = ("by-hand", "ours"),
    objective: str = "minilm",
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vocabulary: int = 30522,
) -> list[Row]:
    """A whole training step: teacher, students, loss, gradients, update; float32 weights, `dtype` by autocast.

    A step is `micro_batches` of `batch` rows, then one update. ways: "ours", "ours-compiled" with compiled blocks, and
    those of `PEERS`, for every student alone. With several students a last row trains all of them on one teacher pass.
    objective: "minilm", or "minilmv2" with four relation heads for each of `heads`, as the paper has.
    """
    if unknown := [way for way in ways if way not in _STEPS]:
        raise ModelError(f"way {unknown[0]!r} is not known; use {', '.join(_STEPS)}")
    if objective == "minilm" and (cannot := [way for way in ways if way in PEERS and not PEERS[way].mixes]):
        raise ModelError(
            f"{cannot[0]} compares queries, keys and values with themselves only, and minilm queries with keys; use"
            " --objective minilmv2, or leave it out"
        )
    compared = _objective(objective, heads, [teacher, *students])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (micro_batches, batch, tokens), generator=generator).to(device)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=vocabulary,
        num_hidden_layers=teacher.layers,
        hidden_size=teacher.hidden,
        num_attention_heads=heads,
        intermediate_size=4 * teacher.hidden,
        max_position_embeddings=max(512, tokens),
    )
    peak = matmul_peak(device, dtype)
    groups = [[size] for size in students] + ([list(students)] if len(students) > 1 else [])
    rows = []
    for group in groups:
        flop = step_flop(teacher, group, micro_batches * batch, tokens, len(compared.relations))
        rows_text = f"{batch}x{tokens}" if micro_batches == 1 else f"{micro_batches} of {batch}x{tokens}"
        shape = f"{teacher} to {' + '.join(map(str, group))}, {rows_text}"
        if objective != "minilm":
            shape += f", {objective}"
        steps = {  # a model keeps its config
            way: _STEPS[way](copy.deepcopy(config), group, ids, dtype, compared)
            for way in ways
            if way not in PEERS or len(group) == 1
        }
        rows += measure("step", steps, shape, device, dtype, ids.numel(), flop, peak, repeats)
        del steps
        gc.collect()
    return rows


def _objective(name: str, heads: int, sizes: Iterable[Size]) -> Objective:
    if name == "minilm":
        return Objective.named(name)
    relation_heads = 4 * heads
    if uneven := [size.hidden for size in sizes if size.hidden % relation_heads]:
        raise ModelError(
            f"{name} is measured with {relation_heads} relation heads, four for each attention head, which do not"
            f" divide a hidden size of {uneven[0]}; give sizes that are multiples of it"
        )
    return Objective.named(name, relation_heads=relation_heads)


def step_flop(
    teacher: Size, students: Iterable[Size], batch: int, tokens: int, num_relations: int = 2
) -> float:
    """Floating-point operations of a step: two per multiplication, and a backward counts twice its forward."""

    def forward(size: Size) -> float:
        layer = 2 * 12 * size.hidden**2 + 4 * tokens * size.hidden
        return (size.layers - 1) * layer + 2 * 3 * size.hidden**2

    def relations(size: Size) -> float:
        return 2 * num_relations * tokens * (teacher.hidden + 3 * size.hidden)

    a_token = forward(teacher) + sum(3 * forward(size) + relations(size) for size in students)
    return batch * tokens * a_token


def _autocast(ids: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)


def _step_of_ours(
    config: Any,
    sizes: Sequence[Size],
    ids: Tensor,
    dtype: torch.dtype,
    objective: Objective,
    *,
    compiled: bool = False,
) -> Way:
    teacher = TappedEncoder(
        AutoModel.from_config(config, attn_implementation="sdpa"), config.num_hidden_layers
    )
    students = {}
    for i, size in enumerate(sizes):
        student = build_student(config, layers=size.layers, hidden=size.hidden, seed=i)
        students[f"{i}-{size}"] = TappedEncoder(student, size.layers)
    distiller = Distiller(teacher, students, objective).to(ids.device)
    distiller.train()
    if dtype != torch.float32:
        teacher.compute_in(dtype)
    if compiled:
        for encoder in (teacher, *students.values()):
            encoder.compile_blocks()
    optimizers = {name: _adamw(distiller.trained_parameters(name).values()) for name in students}

    def step() -> None:
        for rows in ids:
            with _autocast(ids, dtype):
                teacher_output = distiller.teacher_forward(rows, None)
            for name in optimizers:
                with _autocast(ids, dtype):
                    sums = distiller.term_sums(name, teacher_output, rows, None)
                (sums.sum() / ids[..., 0].numel()).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    return Way(step, [distiller, teacher, *optimizers.values(), ids])


def _step_of_peer(
    peer: Peer,
    config: Any,
    sizes: Sequence[Size],
    ids: Tensor,
    dtype: torch.dtype,
    objective: Objective,
) -> Way:
    size = sizes[0]
    teacher = AutoModel.from_config(config, attn_implementation=peer.attention).eval().to(ids.device)
    shape = build_student(config, layers=size.layers, hidden=size.hidden, seed=0).config
    student = AutoModel.from_config(shape, attn_implementation=peer.attention).train().to(ids.device)
    optimizer = _adamw(student.parameters())

    def step() -> None:
        for rows in ids:
            with _autocast(ids, dtype):
                loss = peer.loss(teacher, student, rows, objective)
            loss.div(len(ids)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return Way(step, [student, teacher, optimizer, ids])


_STEPS: dict[str, Callable[..., Way]] = {
    "ours": _step_of_ours,
    "ours-compiled": partial(_step_of_ours, compiled=True),
    **{name: partial(_step_of_peer, peer) for name, peer in PEERS.items()},
}
