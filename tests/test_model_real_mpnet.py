"""MPNet with real, base-sized weights: the tap against a forward written by hand from the file, and a short lesson.

MINILM_MPNET names a folder with config.json, model.safetensors and a tokenizer, of microsoft/mpnet-base or of an
encoder fine-tuned from it: MINILM_MPNET=FOLDER pytest -m slow tests/test_model_real_mpnet.py. Without it nothing runs.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, load_encoder
from minilm.model.encoder.shape import load_config, shape_of
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.loss.objective import Objective

FOLDER = os.environ.get("MINILM_MPNET")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="MINILM_MPNET names no folder with MPNet's weights"),
]
HEADS, HIDDEN, LAYERS, PAD, EPS = 12, 768, 12, 1, 1e-5
SENTENCES = [
    "A student learns what its teacher attends to, not what it says.",
    "Small encoders are cheap to run; the large ones that teach them are not.",
    "Distance between two tokens adds to the score of their attention, one learned number a bucket and head.",
    "Rain.",
]


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    batch = AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    return batch["input_ids"], mask


def bucket(distance: int) -> int:
    """Of the key's place less the query's: 16 for each direction, 8 of them exact, 8 logarithmic up to 128."""
    size = abs(distance)
    if size >= 8:
        size = min(15, 8 + int(math.log(size / 8) / math.log(128 / 8) * 8))
    return size + (16 if distance > 0 else 0)


def by_hand(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [rows, heads, tokens, 64] of the last layer and the bias [heads, tokens, tokens], with whole maps."""
    tokens = ids.shape[1]

    def linear(name, x):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return functional.layer_norm(x, (HIDDEN,), weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)

    def heads(x):
        return x.view(*x.shape[:2], HEADS, HIDDEN // HEADS).transpose(1, 2)

    buckets = torch.tensor([[bucket(key - query) for key in range(tokens)] for query in range(tokens)])
    bias = weights["encoder.relative_attention_bias.weight"][buckets].permute(2, 0, 1)
    places = mask.cumsum(1) * mask + PAD
    hidden = norm(
        "embeddings.LayerNorm",
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][places],
    )
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (heads(linear(f"{at}.attention.attn.{part}", hidden)) for part in "qkv")
        if layer == LAYERS - 1:
            break
        scores = q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS) + bias
        maps = scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)
        seen = linear(f"{at}.attention.attn.o", (maps @ v).transpose(1, 2).flatten(2))
        hidden = norm(f"{at}.attention.LayerNorm", hidden + seen)
        wide = functional.gelu(linear(f"{at}.intermediate.dense", hidden))
        hidden = norm(f"{at}.output.LayerNorm", hidden + linear(f"{at}.output.dense", wide))
    return q, k, v, bias


def test_the_taps_are_those_of_a_forward_by_hand_from_the_file(rows):
    shape = shape_of(load_config(FOLDER))
    assert (shape.architecture, shape.layers, shape.hidden, shape.heads) == ("mpnet", LAYERS, HIDDEN, HEADS)
    ids, mask = rows
    with torch.inference_mode():
        taps = load_encoder(FOLDER)(ids, mask)
        weights = load_file(f"{FOLDER}/model.safetensors")
        *parts, bias = by_hand({name: weight.float() for name, weight in weights.items()}, ids, mask)
    valid = mask[:, None, :, None]
    for got, expected in zip(taps[:3], parts, strict=True):
        torch.testing.assert_close(got * valid, expected * valid, rtol=1e-4, atol=1e-4)
    assert taps.bias.abs().max() > 0.1
    torch.testing.assert_close(taps.bias.expand(1, -1, -1, -1)[0], bias)


def test_a_student_learns_from_it(rows):
    """With biases on both sides, the student's learned: half of the divergence is gone after 25 updates."""
    ids, mask = rows
    teacher = load_encoder(FOLDER)
    student = TappedEncoder(build_student(teacher.model.config, layers=3, hidden=384, dropout=0.0, seed=0), 3)
    distiller = Distiller(teacher, {"s": student}, Objective.named("minilm"))
    trained = distiller.trained_parameters("s")
    assert "encoder.relative_attention_bias.weight" in trained
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    taught = distiller.teacher_forward(ids, mask)
    start = trained["encoder.relative_attention_bias.weight"].detach().clone()
    losses = []
    for _ in range(25):
        loss = distiller.term_sums("s", taught, ids, mask).sum() / distiller.count(mask, ids.shape)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("nats a query, step by step:", " ".join(f"{loss:.3f}" for loss in losses))
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(trained["encoder.relative_attention_bias.weight"], start)
