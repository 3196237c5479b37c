"""What an outsider adds to model/: an encoder family is one row, an objective term one class and one row."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from minilm.model.compatibility import fit_student
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student
from minilm.model.encoder.families import FAMILIES, Family
from minilm.model.encoder.initialize import from_teacher
from minilm.model.encoder.shape import shape_of
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.loss.catalogue import OBJECTIVES
from minilm.model.loss.objective import TERMS, Objective
from minilm.model.loss.terms import Term

SIZES = {"vocab_size": 40, "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 4}


def encoder(architecture="bert", layers=4, hidden=16, seed=0):
    config = AutoConfig.for_model(architecture, **SIZES, max_position_embeddings=20, pad_token_id=1)
    return TappedEncoder(build_student(config, layers=layers, hidden=hidden, seed=seed), layers)


def batch():
    ids = torch.randint(2, 40, (3, 10), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 7:] = False
    return ids, mask


@dataclass(frozen=True)
class CosineDistance(Term):
    """1 - cos of teacher and student values, head by head, through a projection where the hidden sizes differ."""

    name: str
    weight: float = 1.0

    @property
    def fields(self):
        return ("v",)

    def check(self, setting, teacher, student):
        if teacher.heads != student.heads:
            raise ModelError(f"{self.name} needs {teacher.heads} heads, not {student.heads}")

    def projection(self, teacher_hidden, student_hidden):
        return None if teacher_hidden == student_hidden else nn.Linear(student_hidden, teacher_hidden)

    def sum(self, setting, pair):
        target, got = (side.v.transpose(1, 2).flatten(-2) for side in (pair.teacher, pair.student))
        got = got if pair.projection is None else pair.projection(got)
        rows = 1 - nn.functional.cosine_similarity(got, target.detach(), dim=-1)
        return (rows if pair.mask is None else rows.masked_fill(~pair.mask, 0.0)).mean(dim=-1).sum()


def test_a_term_of_ones_own_is_a_class_and_a_row(monkeypatch):
    monkeypatch.setitem(TERMS, "cosine", CosineDistance)
    terms = ({"name": "attention", "x": "q", "y": "k"}, {"term": "cosine", "name": "cosine", "weight": 2.0})
    monkeypatch.setitem(OBJECTIVES, "with-cosine", {"relations": terms, "layer_to_layer": True})
    objective = Objective.named("with-cosine")
    assert objective.names == ("attention", "cosine") and objective.weights.tolist() == [1.0, 2.0]
    with pytest.raises(ModelError, match=r"^student 's': cosine needs 4 heads, not 2$"):
        fit_student(
            "s",
            Objective.named(relations=terms[1:]),
            shape_of(encoder().model.config),
            layers=2,
            hidden=8,
            heads=2,
        )

    teacher, student = encoder(), encoder(layers=2, hidden=8, seed=1)
    distiller = Distiller(teacher, {"s": student}, objective)
    ids, mask = batch()
    output = distiller.teacher_forward(ids, mask)
    student.eval()
    assert len(output.taps.earlier) == 1 and distiller.head_shape == (
        1,
        4,
    )  # layer 2 of 4; the cosine has no heads
    sums = distiller.term_sums("s", output, ids, mask)
    sums[1].backward()
    trained = distiller.trained_parameters("s")
    assert trained["projection.cosine.weight"].grad.abs().sum() > 0
    assert trained["encoder.layer.1.attention.self.value.weight"].grad.abs().sum() > 0
    assert trained["encoder.layer.1.attention.self.query.weight"].grad.abs().sum() == 0


def test_a_family_of_ones_own_is_a_row(monkeypatch):
    with pytest.raises(ModelError, match=r"^architecture 'ernie' has no tap; these have: bert, "):
        encoder("ernie")
    monkeypatch.setitem(FAMILIES, "ernie", Family(ffn_ratio=2.0))
    teacher, student = encoder("ernie"), encoder("ernie", layers=2, hidden=8, seed=1)
    assert shape_of(student.model.config).ffn == 16
    assert set(from_teacher(student.model, teacher.model)) == set(student.model.state_dict())
    distiller = Distiller(teacher, {"s": student}, Objective.named("minilm"))
    ids, mask = batch()
    student.train()
    distiller.term_sums("s", distiller.teacher_forward(ids, mask), ids, mask).sum().backward()
    assert all(p.grad is not None for p in distiller.trained_parameters("s").values())
