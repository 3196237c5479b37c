"""Recipes that are wrong in one way each: `check` and `run` refuse all of them, with the same sentence.

Each row is an override, or a list of them, and the sentence; `«name»` stands for a folder that the test has made.
Whatever the row is about, nothing has been built, fetched or written when it is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from minilm.data.builder.build import build
from minilm.orchestrator import cli
from tests.broken_recipes import MENDED, ROWS
from tests.conftest import make_embedder, make_teacher

STAGE = {"batch": 8, "steps": 40, "peak_lr": 1e-3, "warmup_steps": 4, "held_out_rows": 8}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, text: Path, teacher: Path, shards: Path
) -> dict[str, Path]:
    """Teachers by what is odd about them; where that is their config alone, it is checked before their weights."""
    root = tmp_path_factory.mktemp("teachers")
    found = {"text": text, "teacher": teacher, "shards": shards}

    def odd(name: str, **changes: object) -> None:
        folder = found[name] = root / name
        shutil.copytree(teacher, folder)
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    def other(name: str, kind: str, **values: object) -> None:
        folder = found[name] = root / name
        shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        vocabulary = json.loads((teacher / "config.json").read_text())["vocab_size"]
        values = {"vocab_size": vocabulary, "pad_token_id": 0} | values
        config = AutoConfig.for_model(kind, **values)
        AutoModel.from_config(config).save_pretrained(folder)

    odd("decoder", is_decoder=True)
    odd("headless", architectures=["BertModel"])
    odd("masked")
    config = AutoConfig.from_pretrained(teacher)
    AutoModelForMaskedLM.from_config(config).save_pretrained(found["masked"])
    odd("shallow", num_hidden_layers=1)
    odd("unknown", model_type="llama4all")
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    other("modernbert", "modernbert", **sizes, max_position_embeddings=64)
    other("short", "bert", **sizes, max_position_embeddings=16)
    other("small-vocabulary", "bert", **sizes, vocab_size=20)
    other("mpnet", "mpnet", **sizes, max_position_embeddings=66)
    other("gpt2", "gpt2", n_embd=48, n_layer=2, n_head=4)
    for name, dense in {"embedder": None, "dense-96": 96, "pickled": 48, "last-token": None}.items():
        odd(name)
        make_embedder(found[name], dense=dense)
    (found["pickled"] / "2_Dense" / "model.safetensors").rename(
        found["pickled"] / "2_Dense" / "pytorch_model.bin"
    )
    (found["last-token"] / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    found["other-tokenizer"] = make_teacher(root / "other-tokenizer", extra_words=("zebra", "yak"))
    found["other-shards"] = root / "other-shards"
    build([text], str(found["other-tokenizer"]), found["other-shards"], seq_len=32, held_out=0.1, processes=1)
    found["empty"] = root / "empty"
    found["empty"].mkdir()
    for name, words in {"one-word": b"time\n", "latin": b"caf\xe9\n\n" * 20, "empty-text": b""}.items():
        found[name] = root / f"{name}.txt"
        found[name].write_bytes(words)
    found["records"] = root / "records.jsonl"
    found["records"].write_text('{"id": "1", "text": "time"}\n')
    odd("broken")
    (found["broken"] / "config.json").write_text("{not json")
    return found


@pytest.fixture
def recipe(tmp_path: Path, folders: dict[str, Path]) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "broken",
                "data": {
                    "text": str(folders["text"]),
                    "tokenizer": str(folders["teacher"]),
                    "seq_len": 32,
                    "held_out": 0.1,
                },
                "stages": [
                    {
                        "name": "assistant",
                        "teacher": str(folders["teacher"]),
                        "student": {"layers": 3, "hidden": 24},
                        **STAGE,
                    },
                    {
                        "name": "small",
                        "teacher": "assistant",
                        "student": {"layers": 1, "hidden": 24},
                        **STAGE,
                    },
                ],
                "compute": {"micro_batch": 4, "threads": 1},
            },
            sort_keys=False,
        )
    )
    return path


@pytest.mark.parametrize(("overrides", "sentence"), ROWS, ids=[" ".join(row[0])[:70] for row in ROWS])
def test_check_and_run_refuse_with_the_same_sentence(
    overrides, sentence, recipe, folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [re.sub("«(.*?)»", lambda m: str(folders[m[1]]), override) for override in overrides]
    changes = [word for override in words for word in ("--set", override)]
    checked = refusals(recipe, tmp_path, changes, capsys)
    short = "\n".join(line.removeprefix("minilm: error: ") for line in checked).replace(f"{recipe}", "FILE")
    for name, folder in sorted(folders.items(), key=lambda item: -len(str(item[1]))):
        short = short.replace(str(folder), f"«{name}»")
    assert short == sentence


@pytest.mark.parametrize(("broken", "advised"), MENDED, ids=[" ".join(row[0])[:70] for row in MENDED])
def test_advice_that_is_followed_leads_to_no_other_error(broken, advised, recipe, folders, capsys):
    assert broken in [overrides for overrides, _ in ROWS], "its sentence is pinned"
    words = [re.sub("«(.*?)»", lambda m: str(folders[m[1]]), override) for override in [*broken, *advised]]
    assert (
        cli.main(["check", str(recipe), *[word for override in words for word in ("--set", override)]]) == 0
    )
    assert not capsys.readouterr().err


def refusals(recipe, tmp_path, changes, capsys) -> list[str]:
    """What `check` and `run` say, which is the same, before anything is written."""
    said = []
    for verb in (["check"], ["run", "--launcher", "inline", "--workdir", str(tmp_path / "work")]):
        assert cli.main([verb[0], str(recipe), *verb[1:], *changes]) == 2
        said.append(capsys.readouterr().err)
    checked, ran = ([line for line in text.splitlines() if line.startswith("minilm: ")] for text in said)
    assert checked == ran and "Traceback" not in "".join(said)
    assert not (tmp_path / "work" / "data").exists() and not (tmp_path / "work" / "stages").exists()
    return checked


def without_held_out(data: Path) -> None:
    shutil.rmtree(data / "held-out")


def damaged_tokenizer(data: Path) -> None:
    file = data / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"time"', '"tine"', 1))


def damaged_manifest(data: Path) -> None:
    file = data / "manifest.json"
    file.write_text(file.read_text().replace('"seq_len":32', '"seq_len":33', 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (without_held_out, "has no held-out split, which every stage is measured on; build it again with"),
        (damaged_tokenizer, "is damaged: tokenizer/tokenizer.json: its bytes do not have the pinned sha256"),
        (damaged_manifest, "manifest.json"),
    ],
)
def test_check_opens_data_sets_that_are_here_as_run_does(wrong, words, recipe, shards, tmp_path, capsys):
    data = tmp_path / "rows"
    shutil.copytree(shards, data)
    values = yaml.safe_load(recipe.read_text()) | {"data": {"shards": str(data)}}
    recipe.write_text(yaml.safe_dump(values))
    assert cli.main(["check", str(recipe)]) == 0
    capsys.readouterr()
    wrong(data)
    (line,) = refusals(recipe, tmp_path, [], capsys)
    assert line.startswith(f"minilm: error: {recipe}: data: ") and words in line


def test_a_source_that_is_not_known_is_refused_though_nothing_else_is_here(recipe, capsys):
    hub = ["--set", "stages.assistant.teacher=owner/teacher", "--set", "data.tokenizer=owner/teacher"]
    assert cli.main(["check", str(recipe), *hub]) == 0
    assert cli.main(["check", str(recipe), *hub, "--set", "data.source=dots"]) == 2
    assert "data: source 'dots' is not known; there are: " in capsys.readouterr().err
