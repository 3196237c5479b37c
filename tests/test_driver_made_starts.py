"""A student that starts from a model of another family, with another tokenizer than its teacher's."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from minilm.data.token_match import match_tokens
from minilm.data.tokenizer import load_tokenizer
from minilm.model.encoder.other_vocabulary import with_vocabulary
from minilm.model.encoder.shape import load_config, shape_of
from minilm.orchestrator import cli
from minilm.orchestrator.plan.estimate import works
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.resolve.starts import special_keys
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from tests.conftest import WORDS, make_embedder, make_teacher

TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=4 + seed)) + "." for seed in range(6)]


def mpnet_tokenizer(folder: Path, words: list[str], pad: str = "<pad>") -> None:
    """WordPiece with MPNet's special tokens, in another order than BERT's."""
    listed = ["<s>", pad, "</s>", "[UNK]", *words, ".", "<mask>"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(listed)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    named = {"cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    named |= {"pad_token": pad, "unk_token": "[UNK]", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of MPNet that makes vectors; a word of its has no token in the start."""
    folder = tmp_path_factory.mktemp("mpnet") / "mpnet"
    words = [*sorted(WORDS, reverse=True), "timeless"]
    mpnet_tokenizer(folder, words)
    torch.manual_seed(5)
    MPNetModel(MPNetConfig(vocab_size=len(words) + 6, pad_token_id=1, **SIZES)).save_pretrained(folder)
    return make_embedder(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "bert"
    return make_teacher(folder, layers=2, hidden=24, heads=2, extra_words=("##less",))


def states(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.inference_mode():
        found = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    return [row[mask.bool()] for row, mask in zip(found, batch["attention_mask"], strict=True)]


def recipe(folder: Path, text: Path, teacher: Path, start: Path, **stage: object) -> Path:
    student = {"name": "small", "layers": 2, "hidden": 24, "init": str(start), "dropout": 0.0}
    values = {
        "name": "vectors",
        "teacher": str(teacher),
        "objective": "embedding",
        "student": student,
        "batch": 8,
        "steps": 2,
        "peak_lr": 1e-9,
        "warmup_steps": 1,
        "held_out_rows": 8,
        **stage,
    }
    data = {"text": str(text), "tokenizer": str(teacher), "seq_len": 32, "packing": "sentence"}
    path = folder / "start.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "start",
                "data": data | {"held_out": 0.1},
                "stages": [values],
                "compute": {"micro_batch": 4, "threads": 1},
            }
        )
    )
    return path


def test_a_bert_start_learns_from_an_mpnet_teacher(mpnet, start, text, empty_store, tmp_path, capsys):
    path, work = recipe(tmp_path, text, mpnet, start), tmp_path / "work"
    work.mkdir()
    (work / "mlflow.db").write_bytes(empty_store.read_bytes())
    known = len(set(WORDS)) + 1
    note = f"starts from a model with another tokenizer: it has {known} of the data's tokens, 1 begin as the mean"
    assert cli.main(["check", str(path)]) == 0
    assert note in capsys.readouterr().out
    assert works(load_recipe(path), 32)[0].students[0].parameters > 0
    assert cli.main(["run", str(path), "--launcher", "inline", "--workdir", str(work)]) == 0
    assert note in capsys.readouterr().err
    stage = StageFolder(work / "stages" / "vectors")
    spec = StageSpec.from_json(stage.spec.read_text())
    made, student = Path(spec.students[0].start), stage.student("small")
    for folder in (made, student):  # the learning rate moves nothing that could be seen
        for own, moved in zip(states(start, TEXTS), states(folder, TEXTS), strict=True):
            torch.testing.assert_close(own, moved, rtol=0, atol=1e-5)
    shape = shape_of(load_config(student))
    assert (shape.architecture, shape.vocab_size) == ("bert", load_config(mpnet).vocab_size)
    table = AutoModel.from_pretrained(made).get_input_embeddings().weight
    old = AutoModel.from_pretrained(start).get_input_embeddings().weight
    ids, theirs = AutoTokenizer.from_pretrained(made).get_vocab(), AutoTokenizer.from_pretrained(start)
    pieces = theirs.convert_tokens_to_ids(["time", "##less"])
    torch.testing.assert_close(table[ids["timeless"]], old[pieces].mean(dim=0))
    assert torch.equal(table[ids["<mask>"]], old[theirs.mask_token_id])
    curve = read_all_metrics(stage.heldout_metrics)
    assert curve[0].metrics["small/heldout/cosine_distance"] < 0.7  # 1 with a dense layer drawn at random
    listed = [module["path"] for module in json.loads((student / "modules.json").read_text())]
    assert listed == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    assert "Started from" in (student / "README.md").read_text()
    assert spec.students[0].start_digest[:12] in (student / "README.md").read_text()


def test_what_cannot_be_a_start_is_refused_in_a_line(mpnet, start, text, tmp_path, capsys):
    def said(path: Path) -> str:
        assert cli.main(["check", str(path)]) == 2
        return capsys.readouterr().err

    relations = recipe(tmp_path, text, mpnet, start, objective="minilm")
    assert (
        "it starts from a bert and learns from a mpnet; start from a model of the teacher's family"
        in said(relations)
    )
    foreign = make_teacher(tmp_path / "foreign", layers=2, hidden=24, heads=2)
    mpnet_tokenizer(foreign, [f"слово{number}" for number in range(80)])
    assert (
        "starts from, in " in (line := said(recipe(tmp_path, text, mpnet, foreign)))
        and "tokens of the data's tokenizer, less than a quarter; start from a model with a tokenizer of the same"
        in line
    )
    for file in foreign.glob("*token*"):
        file.unlink()
    line = said(recipe(tmp_path, text, mpnet, foreign))
    assert "and without its tokenizer nobody knows which are the same; put the files of its tokenizer" in line
    small = tmp_path / "small"
    mpnet_tokenizer(small, WORDS)
    MPNetModel(
        MPNetConfig(vocab_size=len(set(WORDS)) + 7, **{**SIZES, "hidden_size": 24, "intermediate_size": 96})
    ).save_pretrained(small)
    bert = make_embedder(make_teacher(tmp_path / "bert"))
    line = said(recipe(tmp_path, text, bert, small))
    assert (
        "begin behind its padding token 1, and the data's tokenizer pads with token 0; start from a" in line
    )


def test_positions_that_begin_behind_the_padding_move_with_it(tmp_path):
    """A RoBERTa, whose padding is token 1, for a tokenizer that pads with token 0."""
    words = list(dict.fromkeys(WORDS))
    mpnet_tokenizer(tmp_path / "roberta", words)
    torch.manual_seed(1)
    config = RobertaConfig(vocab_size=len(words) + 6, pad_token_id=1, type_vocab_size=1, **SIZES)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    other = make_teacher(tmp_path / "bert")
    tokenizers = [load_tokenizer(str(folder)) for folder in (other, tmp_path / "roberta")]
    match = match_tokens(*tokenizers, len(tokenizers[0]))
    model = AutoModel.from_pretrained(tmp_path / "roberta")
    special = special_keys(str(tmp_path / "roberta"), str(other))
    moved = with_vocabulary(model, match.rows, special)
    moved.save_pretrained(tmp_path / "moved")
    tokenizers[0].save_pretrained(tmp_path / "moved")
    shapes = [shape_of(load_config(tmp_path / name)) for name in ("roberta", "moved")]
    assert shapes[1] == replace(shapes[0], vocab_size=len(tokenizers[0]))
    assert moved.config.pad_token_id == 0 and moved.config.max_position_embeddings == 65
    for own, new in zip(states(tmp_path / "roberta", TEXTS), states(tmp_path / "moved", TEXTS), strict=True):
        torch.testing.assert_close(own, new, rtol=0, atol=1e-5)
