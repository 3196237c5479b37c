"""Which of a tokenizer's tokens another one has: across kinds, by text and beginning of a word, and by role."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minilm.data.errors import DataError
from minilm.data.token_match import TokenMatch, match_tokens
from minilm.data.tokenizer import load_tokenizer
from tests import vocabularies


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    root = tmp_path_factory.mktemp("kinds")
    for kind, make in vocabularies.MAKERS.items():
        vocabularies.save(make(), root / kind, kind)
    return {kind: load_tokenizer(str(root / kind)) for kind in vocabularies.MAKERS}


def matched(own, other) -> tuple[TokenMatch, dict[str, list[str]]]:
    match = match_tokens(own, other, len(own))
    assert match.matched + match.averaged + match.unknown + 5 == len(own)  # of five roles
    names = {
        token: other.convert_ids_to_tokens(match.rows[number]) for token, number in own.get_vocab().items()
    }
    return match, names


@pytest.mark.parametrize("kind", vocabularies.MAKERS)
def test_a_tokenizer_has_all_tokens_of_its_own(kinds, kind):
    match, names = matched(kinds[kind], kinds[kind])
    assert (match.share, match.averaged, match.unknown) == (1.0, 0, 0)
    assert all(found == [token] for token, found in names.items())


MARKS = {"wordpiece": ("", "##"), "bpe": ("Ġ", ""), "unigram": ("▁", "")}


@pytest.mark.parametrize(
    ("own", "other"), [(a, b) for a in vocabularies.MAKERS for b in vocabularies.MAKERS if a != b]
)
def test_words_and_their_parts_are_found_across_kinds_and_others_made_of_pieces(kinds, own, other):
    match, names = matched(kinds[own], kinds[other])
    assert match.share > 0.4
    (begin, inner), (their_begin, their_inner) = MARKS[own], MARKS[other]
    tokens, theirs = (set(kinds[kind].get_vocab()) for kind in (own, other))
    compared = 0
    for text in ("ab", "do", "en", "re", "st", "a", "e"):
        for mark, their_mark in ((begin, their_begin), (inner, their_inner)):
            if mark + text in tokens and their_mark + text in theirs:
                assert names[mark + text] == [their_mark + text]
                compared += 1
    assert compared >= 4
    several = [(token, found) for token, found in names.items() if len(found) > 1]
    assert len(several) == match.averaged > 0
    plain = [  # in letters of ASCII, which byte-level BPE writes as they are
        (token.lstrip("".join(MARKS[own])), "".join(piece.lstrip("".join(MARKS[other])) for piece in found))
        for token, found in several
        if token.isascii()
    ]
    assert len(plain) > 20 and all(text == pieces for text, pieces in plain)
    roles = ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token")
    assert all(names[getattr(kinds[own], role)] == [getattr(kinds[other], role)] for role in roles)


def test_a_full_stop_behind_a_word_is_one_wherever_a_kind_has_it(kinds):
    assert matched(kinds["bpe"], kinds["wordpiece"])[1]["."] == ["."]
    assert matched(kinds["wordpiece"], kinds["bpe"])[1]["."] == ["."]


def test_ids_without_a_token_are_unknown_and_fewer_than_the_tokens_are_refused(kinds):
    own, other = kinds["unigram"], kinds["wordpiece"]
    match = match_tokens(own, other, len(own) + 3)
    assert match.rows[len(own) :] == [[other.unk_token_id]] * 3
    with pytest.raises(DataError, match=r"the tokenizer has \d+ tokens, and 7 are asked for"):
        match_tokens(own, other, 7)


def test_a_byte_that_is_no_character_alone_is_that_byte_everywhere(tmp_path: Path):
    llama = {"<unk>": 0, **{f"<0x{n:02X}>": n + 1 for n in range(256)}, "▁a": 257, "a": 258, "▁▁": 259}
    falling_back = Tokenizer(models.BPE(llama, [], unk_token="<unk>", byte_fallback=True))
    falling_back.pre_tokenizer = pre_tokenizers.Metaspace()
    falling_back.decoder = decoders.ByteFallback()
    alphabet = {sign: n for n, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    more = {"<unk>": 256, "Ġa": 257, "ĠĠ": 258}
    of_bytes = Tokenizer(models.BPE({**alphabet, **more}, [("Ġ", "a"), ("Ġ", "Ġ")], unk_token="<unk>"))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    loaded = []
    for name, tokenizer in (("llama", falling_back), ("bytes", of_bytes)):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
            tmp_path / name
        )
        loaded.append(load_tokenizer(str(tmp_path / name)))
    own, other = loaded
    match = match_tokens(own, other, len(own))

    def named(token: str) -> list[str]:
        return other.convert_ids_to_tokens(match.rows[own.get_vocab()[token]])

    assert named("<0xE2>") == ["â"] and named("<0x80>") == ["Ģ"] and named("<0x41>") == ["A"]
    assert named("a") == ["a"] and named("▁a") == ["Ġa"] and named("▁▁") == ["ĠĠ"]
    back = match_tokens(other, own, len(other)).rows
    assert own.convert_ids_to_tokens(back[other.get_vocab()["a"]]) == ["a"]  # not <0x61>, of the same text


LISTED = {  # each with the words "to" and "top", "p" that goes on a word, and a full stop
    "wordpiece": (
        models.WordPiece,
        {"continuing_subword_prefix": "##"},
        ["to", "top", "##p", "t", "##o", "."],
    ),
    "bpe, inner marked": (
        models.BPE,
        {"continuing_subword_prefix": "##", "merges": [("t", "##o"), ("to", "##p")]},
        ["to", "top", "##p", "t", "##o", "."],
    ),
    "bpe, end marked": (
        models.BPE,
        {"end_of_word_suffix": "</w>", "merges": [("t", "o</w>"), ("t", "o"), ("to", "p</w>")]},
        ["to", "to</w>", "top</w>", "p</w>", "t", "o", "o</w>", ".</w>"],
    ),
    "bpe, nothing marked": (
        models.BPE,
        {"merges": [("t", "o"), ("to", "p")]},
        ["to", "top", "p", "t", "o", "."],
    ),
    "bpe, of bytes by its normalizer": (
        models.BPE,
        {"merges": [("t", "o"), ("Ġ", "to"), ("Ġto", "p"), ("to", "p")]},
        ["to", "Ġto", "Ġtop", "top", "p", "t", "o", "Ġ", "."],
    ),
}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    loaded = {}
    for kind, (model, options, tokens) in LISTED.items():
        vocabulary = {token: number for number, token in enumerate([*vocabularies.BERT, *tokens])}
        tokenizer = Tokenizer(model(vocab=vocabulary, unk_token="[UNK]", **options))
        if "bytes" in kind:
            tokenizer.normalizer = normalizers.ByteLevel()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        folder = tmp_path_factory.mktemp("listed")
        vocabularies.save(tokenizer, folder, "wordpiece")
        loaded[kind] = load_tokenizer(str(folder))
    return loaded


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ("bpe, end marked", "wordpiece", {"to</w>": "to", "top</w>": "top", "p</w>": "##p", ".</w>": "."}),
        ("wordpiece", "bpe, end marked", {"to": "to</w>", "top": "top</w>", "##p": "p</w>", ".": ".</w>"}),
        ("bpe, inner marked", "wordpiece", {"to": "to", "top": "top", "##p": "##p", ".": "."}),
        ("wordpiece", "bpe, inner marked", {"to": "to", "top": "top", "##p": "##p", ".": "."}),
        ("bpe, nothing marked", "wordpiece", {"to": "to", "top": "top", "p": "##p", ".": "."}),
        ("wordpiece", "bpe, nothing marked", {"to": "to", "top": "top", "##p": "p", ".": "."}),
        ("wordpiece", "bpe, of bytes by its normalizer", {"to": "Ġto", "top": "Ġtop", "##p": "p", ".": "."}),
        ("bpe, end marked", "bpe, end marked", {"to": "to", "to</w>": "to</w>", "o": "o", "o</w>": "o</w>"}),
    ],
)
def test_marks_of_words_are_those_of_the_kind(listed, own, other, expected):
    _, names = matched(listed[own], listed[other])
    assert {token: names[token] for token in expected} == {t: [name] for t, name in expected.items()}
