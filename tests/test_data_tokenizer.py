"""Tokenizers of any language load, broken ones are named, and the fingerprints tell what cuts text differently."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minilm.data.errors import DataError
from minilm.data.format.manifest import TokenizerInfo, load_manifest
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Corpus
from minilm.data.stream import Stream
from minilm.data.tokenizer import (
    load_tokenizer,
    pipeline_difference,
    pipeline_fingerprint,
    special_ids,
    vocabulary_fingerprint,
)
from minilm.model.encoder.shape import EncoderShape
from minilm.orchestrator.feed.corpora import describe
from minilm.orchestrator.resolve.stages import ResolvedStage, check_data
from minilm.orchestrator.stage.data import CorpusSpec, DataSpec
from tests.data_cases import SPECIAL, make_data, make_tokenizer

TEXTS = {
    "greek": "γάτα κάθεται στο χαλί και κοιτάζει τη θάλασσα",
    "chinese": "猫坐在垫子上看着大海 今天天气很好",
    "thai": "แมวนั่งบนเสื่อและมองทะเล",
    "turkish": "kedi halının üstünde oturuyor ığdır çöşü",
    "russian": "кошка сидит на ковре и смотрит на море",
}


def save(tokenizer: Tokenizer, folder: Path, **names) -> str:
    named = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(named | names)).save_pretrained(folder)
    return str(folder)


def trained(kind: str, text: str) -> Tokenizer:
    """A tokenizer whose vocabulary holds the letters of `text` and no others."""
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="[UNK]")
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL)
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
@pytest.mark.parametrize("language", TEXTS)
def test_a_vocabulary_without_latin_letters_is_no_damage(tmp_path, kind, language):
    loaded = load_tokenizer(save(trained(kind, TEXTS[language]), tmp_path))
    ids = loaded(TEXTS[language], add_special_tokens=False)["input_ids"]
    assert ids and special_ids(loaded).unk not in ids


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram", "WordLevel", "dropping BPE"])
def test_a_vocabulary_without_unknown_token_is_named(tmp_path, kind):
    letters = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "a", "b"])}
    model = {
        "WordPiece": lambda: models.WordPiece(letters, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(letters, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([(token, -1.0) for token in letters]),
        "BPE": lambda: models.BPE(letters, [], unk_token="[UNK]"),
        "dropping BPE": lambda: models.BPE(letters, []),
    }[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = save(tokenizer, tmp_path)
    dropped = "they would be dropped from the text" if "dropping" in kind else ""
    with pytest.raises(
        DataError,
        match=rf"has no unknown token in its vocabulary .*{dropped}.*; give a tokenizer whose unk_token is",
    ):
        load_tokenizer(folder)


def test_bytes_need_no_unknown_token(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    loaded = load_tokenizer(save(tokenizer, tmp_path, unk_token=None))
    assert len(loaded("γ", add_special_tokens=False)["input_ids"]) == 2


def test_a_normalizer_that_takes_foreign_letters_out_is_the_makers_choice(tmp_path):
    tokenizer = trained("bpe", "only latin letters live here")
    tokenizer.normalizer = normalizers.Replace(Regex("[^a-z ]"), "")
    assert load_tokenizer(save(tokenizer, tmp_path))("xγ")["input_ids"]


def test_a_vocabulary_that_its_own_rules_never_reach_is_refused(tmp_path):
    vocab = {token: i for i, token in enumerate([*SPECIAL, "ALPHA", "BETA"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="recognizes none of its own tokens in text: its files do not belong"):
        load_tokenizer(save(tokenizer, tmp_path))


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "XLMRobertaTokenizer"}])
def test_a_sentencepiece_file_alone_loads_as_xlm_roberta(tmp_path, settings, caplog):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS.values()) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=85, minloglevel=3
    )
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(tmp_path / "m.model", folder / "sentencepiece.bpe.model")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(str(folder))
    assert ("taken as XLM-RoBERTa's" in caplog.text) == (settings is None)
    ids = loaded("γάτα 猫", add_special_tokens=False)["input_ids"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert ids == [number + 1 for number in pieces.encode("γάτα 猫")]  # fairseq's numbering is one ahead
    assert (special_ids(loaded).cls, special_ids(loaded).pad, special_ids(loaded).sep) == (0, 1, 2)


def variants() -> dict[str, dict]:
    bert = {"lowercase": True, "strip_accents": None, "handle_chinese_chars": True, "clean_text": True}
    return {
        "cased": bert | {"lowercase": False},
        "accents": bert | {"strip_accents": False},
        "chinese": bert | {"handle_chinese_chars": False},
        "clean": bert | {"clean_text": False},
    }


def with_normalizer(folder: str, out: Path, normalizer=None, pre_tokenizer=None) -> str:
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return save(tokenizer, out)


def test_the_pipeline_fingerprint_covers_all_that_changes_ids(tmp_path):
    base = make_tokenizer(tmp_path / "base")
    others = [
        with_normalizer(base, tmp_path / name, normalizers.BertNormalizer(**settings))
        for name, settings in variants().items()
    ]
    others.append(with_normalizer(base, tmp_path / "pre", None, pre_tokenizers.Whitespace()))
    others.append(
        with_normalizer(
            base,
            tmp_path / "sequence",
            normalizers.Sequence([normalizers.BertNormalizer(), normalizers.Replace("a", "b")]),
        )
    )
    loaded = [load_tokenizer(folder) for folder in (base, *others)]
    assert len({vocabulary_fingerprint(tokenizer) for tokenizer in loaded}) == 1
    assert len({pipeline_fingerprint(tokenizer) for tokenizer in loaded}) == len(loaded)


def test_the_pipeline_fingerprint_is_blind_to_what_changes_no_ids(tmp_path):
    folder = make_tokenizer(tmp_path / "base")
    loaded = load_tokenizer(folder)
    before = pipeline_fingerprint(loaded)
    loaded.save_pretrained(tmp_path / "saved")
    assert pipeline_fingerprint(load_tokenizer(str(tmp_path / "saved"))) == before
    file = tmp_path / "saved" / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["truncation"] = definition["padding"] = definition["decoder"] = None
    file.write_text(json.dumps(definition, indent=3))
    assert pipeline_fingerprint(load_tokenizer(str(tmp_path / "saved"))) == before


SHAPE = EncoderShape("bert", 2, 16, 2, 32, 512, 100)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("set"), held_out=0.2)


def complaints(teacher: Path, data: DataSpec) -> list[str]:
    """What is said of a stage "a" with a teacher that has the tokenizer in this folder."""
    fields = {"evaluate": (), "objective": "minilm", "objective_fields": lambda: {"name": "minilm"}}
    stage = SimpleNamespace(name="a", **fields)
    resolved = ResolvedStage(stage, str(teacher), SHAPE, {}, {})
    return check_data([resolved], data.seq_len, data.vocabulary, data.tokenizer)


def without_pins(data: Path, out: Path) -> Path:
    """The data set as it was written before there were pins."""
    shutil.copytree(data, out)
    for folder in (out, out / "held-out"):
        whole = json.loads((folder / "manifest.json").read_text())
        old = {name: whole[name] for name in ("fingerprint", "manifest")}
        (folder / "manifest.json").write_text(json.dumps(old))
    return out


@pytest.mark.parametrize("pinned", [True, False])
def test_data_made_with_another_lower_casing_are_refused_with_an_example(tmp_path, data, pinned):
    folder = data if pinned else without_pins(data, tmp_path / "old")
    spec = describe([CorpusSpec("a", str(folder))])
    assert bool(spec.vocabulary.pipeline_fingerprint) == pinned
    same = Path(make_tokenizer(tmp_path / "same"))
    assert not complaints(same, spec)
    for name, settings in variants().items():
        other = Path(with_normalizer(str(same), tmp_path / name, normalizers.BertNormalizer(**settings)))
        (line,) = complaints(other, spec)
        assert line.startswith(
            f"stage a: the data's tokenizer is another one than the teacher's in {other} (another lower-casing, "
            f"normalization or pre-tokenization"
        )
        assert line.endswith(f"; give that as data.tokenizer, or make the data with `--tokenizer {other}`")
    cased = load_tokenizer(str(tmp_path / "cased"))
    assert "becomes" in pipeline_difference(load_tokenizer(str(same)), cased)


def test_a_damaged_tokenizer_of_the_teacher_is_an_error_and_none_is_not(tmp_path, data):
    spec = describe([CorpusSpec("a", str(data))])
    assert not complaints(tmp_path, spec)
    (tmp_path / "tokenizer.json").write_text('{"cut')
    with pytest.raises(DataError, match="cannot be loaded"):
        complaints(tmp_path, spec)


def test_corpora_of_different_lower_casing_are_not_mixed(tmp_path, data):
    def mix(one, other):
        return Stream([Corpus(one, 1), Corpus(other, 1)], seed=0, batch=4, micro_batch=4)

    def altered(fingerprint):
        reader = RowReader(data)
        info = replace(reader.manifest, tokenizer=reader.tokenizer._replace(pipeline_fingerprint=fingerprint))
        reader.manifest, reader.tokenizer = info, info.tokenizer
        return reader

    mix(RowReader(data), RowReader(data))
    mix(RowReader(data), altered(""))  # made before it was kept
    with pytest.raises(
        DataError,
        match="corpus 2 was tokenized with another normalization or pre-tokenization than the first",
    ):
        mix(RowReader(data), altered("0" * 64))


def test_tokenizers_of_one_vocabulary_differ_in_a_word():
    info = TokenizerInfo("v", 10, 1, 2, 3, 4, 5, "p")
    assert info.difference(info) == "" and info.difference(info._replace(pipeline_fingerprint="")) == ""
    assert info.difference(info._replace(vocab_size=11)) == "vocabulary"
    assert info.difference(info._replace(pipeline_fingerprint="q")) == "normalization or pre-tokenization"


def test_a_built_data_set_carries_the_pipeline(data, tmp_path):
    expected = pipeline_fingerprint(load_tokenizer(make_tokenizer(tmp_path / "t")))
    assert load_manifest(data).tokenizer.pipeline_fingerprint == expected
