"""Soft labels: which tokens are masked, what is compared, and the same loop as every other objective."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, load_encoder
from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.loss.masking import mask_tokens
from minilm.model.loss.objective import Objective
from minilm.model.loss.soft_labels import soft_label_rows

MASK_ID, SPECIAL = 4, (0, 2, 3)


def rows(batch=64, tokens=40):
    ids = torch.randint(5, 50, (batch, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 9] = 2, 3
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, 20:] = False
    mask[1] = False
    return ids.masked_fill(~mask, 0), mask


def test_a_share_of_each_row_is_masked_and_nothing_else_changes():
    ids, mask = rows()
    masked = mask_tokens(ids, mask, MASK_ID, SPECIAL)
    assert masked.positions.shape == (64, 6)  # 15 % of 40
    changed = masked.ids != ids
    assert changed.sum(-1).tolist() == masked.valid.sum(-1).tolist() == [3, 0] + [6] * 62
    assert torch.equal(masked.ids[changed], torch.full((3 + 6 * 62,), MASK_ID))
    assert not (changed & ~mask).any() and not (changed & ((ids == 2) | (ids == 3))).any()
    assert all(len(set(row)) == 6 for row in masked.positions.tolist())


def test_the_choice_is_the_rows_own():
    ids, mask = rows()
    whole = mask_tokens(ids, mask, MASK_ID, SPECIAL)
    torch.manual_seed(9)
    order = torch.randperm(64)
    shuffled = mask_tokens(ids[order], mask[order], MASK_ID, SPECIAL)
    assert torch.equal(shuffled.ids, whole.ids[order])
    share = (mask_tokens(rows(4000)[0], None, MASK_ID, SPECIAL).ids == MASK_ID).double().mean(0)
    assert share[0] == share[9] == 0  # special tokens; the others all alike
    others = share[[i for i in range(40) if i not in (0, 9)]]
    assert others.min() > 0.12 and others.max() < 0.20


def test_the_choice_does_not_depend_on_the_padding_nor_on_what_stands_there():
    """Of a short row 15 % of its own tokens are masked: not 15 % of the width, which can be all it has."""
    ids, mask = rows()
    trimmed = mask_tokens(ids[:1, :20], None, MASK_ID, SPECIAL)
    assert trimmed.valid.sum() == 3
    for junk in (0, 17):
        padded = mask_tokens(ids[:1].masked_fill(~mask[:1], junk), mask[:1], MASK_ID, SPECIAL)
        assert torch.equal(padded.ids[:, :20], trimmed.ids)


def test_rows_are_kl_over_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(
        -1
    )
    torch.testing.assert_close(soft_label_rows(teacher, student), expected)
    assert torch.count_nonzero(soft_label_rows(teacher, teacher)) == 0


def config(architecture="bert"):
    values = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "pad_token_id": 1}
    return AutoConfig.for_model(architecture, vocab_size=50, max_position_embeddings=60, **values)


def objective(**changes):
    return Objective.named("soft-label-mlm", mask_token_id=MASK_ID, special_ids=SPECIAL, **changes)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_at_the_masked_positions_and_their_training(architecture, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(config(architecture)).save_pretrained(tmp_path)
    teacher = load_encoder(tmp_path, head=True)
    student = TappedEncoder(build_student(config(architecture), layers=1, hidden=8, seed=1, head=True), 1)
    distiller = Distiller(teacher, {"s": student}, objective())
    student.eval()
    ids, mask = (part[2:6] for part in rows())
    mask[2, 30:] = False
    masked = mask_tokens(ids, mask, MASK_ID, SPECIAL)
    output = distiller.teacher_forward(ids, mask)
    assert torch.equal(output.masked.ids, masked.ids)
    whole = teacher.model(masked.ids, attention_mask=mask).logits
    at = masked.positions[..., None].expand(-1, -1, 50)
    torch.testing.assert_close(output.taps.logits, whole.gather(1, at), rtol=1e-4, atol=1e-5)

    sums = distiller.term_sums("s", output, ids, mask)
    student_logits = student.model(masked.ids, attention_mask=mask).logits.gather(1, at)
    divergences = soft_label_rows(output.taps.logits, student_logits)
    assert masked.valid.sum(1).tolist() == [6, 6, 5, 6]
    expected = sum(row[valid].mean() for row, valid in zip(divergences, masked.valid, strict=True))
    torch.testing.assert_close(sums, expected[None])
    sums.sum().backward()
    with_gradient = {name for name, p in student.model.named_parameters() if p.grad is not None}
    assert set(distiller.trained_parameters("s")) == with_gradient
    assert len(with_gradient) == len(dict(student.model.named_parameters()))


def test_what_soft_labels_need(tmp_path):
    plain = TappedEncoder(build_student(config(), layers=1, hidden=8, seed=1), 1)
    headed = [
        TappedEncoder(build_student(config(), layers=1, hidden=8, seed=s, head=True), 1) for s in (1, 2)
    ]
    with pytest.raises(
        ModelError, match=r"^soft labels need a masked-language-model head, and student 's' has none"
    ):
        Distiller(headed[0], {"s": plain}, objective())
    with pytest.raises(ModelError, match=r"^soft labels need mask_token_id; give the tokenizer's$"):
        Distiller(headed[0], {"s": headed[1]}, Objective.named("soft-label-mlm")).teacher_forward(*rows(3))
    with pytest.raises(ModelError, match=r"^soft labels count by sequence"):
        objective(reduction="token")
    plain.model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"lacks \d+ weights of a bert encoder with its head \(cls\.predictions"
    ):
        load_encoder(tmp_path, head=True)
