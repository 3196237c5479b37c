"""A tokenizer with fewer tokens: what stays, what text becomes, and ids that agree everywhere in its definition."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tokenizers import Tokenizer

from minilm.data.errors import DataError
from minilm.data.vocabulary import smaller_vocabulary
from tests.vocabularies import MAKERS, lines


@pytest.fixture(scope="module")
def definitions():
    return {kind: json.loads(make().to_str()) for kind, make in MAKERS.items()}


def counted(definition, text):
    counts = Counter()
    for encoded in Tokenizer.from_str(json.dumps(definition)).encode_batch(
        list(text), add_special_tokens=False
    ):
        counts.update(encoded.ids)
    return counts


def cut(definition, languages=(0,), **how):
    return smaller_vocabulary(definition, counted(definition, lines(400, 2, languages)), **how)


@pytest.mark.parametrize("kind", MAKERS)
def test_held_out_text_keeps_its_tokens_or_falls_apart_and_nothing_becomes_unknown(kind, definitions):
    smaller = cut(definitions[kind], languages=(0, 1), keep=900)
    assert 890 <= len(smaller.kept) <= 900
    old, new = (Tokenizer.from_str(json.dumps(one)) for one in (definitions[kind], smaller.definition))
    assert new.get_vocab_size() == len(smaller.kept) and set(new.get_vocab().values()) == set(
        range(len(smaller.kept))
    )
    number = {before: after for after, before in enumerate(smaller.kept)}
    unknown = (
        {old.token_to_id(token) for token in ("[UNK]", "<unk>")},
        {new.token_to_id(t) for t in ("[UNK]", "<unk>")},
    )
    same = apart = more = 0
    text = [*lines(1200, 3), "a ☃ in the snow", "abra-cadabra <mask> here", ""]
    for before, after in zip(old.encode_batch(text), new.encode_batch(text), strict=True):
        assert old.decode(before.ids, skip_special_tokens=False) == new.decode(
            after.ids, skip_special_tokens=False
        )
        assert sum(i in unknown[0] for i in before.ids) == sum(i in unknown[1] for i in after.ids)
        if all(i in number for i in before.ids):
            assert [number[i] for i in before.ids] == after.ids
            same += 1
        else:
            apart += 1
            more += len(after.ids) - len(before.ids)
    assert same > 150 and apart > 150 and more > apart


@pytest.mark.parametrize("kind", MAKERS)
def test_special_tokens_characters_and_what_others_are_merged_from_stay(kind, definitions):
    definition = definitions[kind]
    with pytest.raises(DataError) as caught:
        cut(definition, keep=10)
    words = str(caught.value).split()
    least = int(words[5])
    assert str(caught.value) == (
        f"given 10 tokens to keep; {least} have to stay (special tokens, single characters and bytes), so give {least} "
        "or more"
    )
    smaller = cut(definition, keep=least)
    assert len(smaller.kept) == least
    new = Tokenizer.from_str(json.dumps(smaller.definition))
    for token in definition["added_tokens"]:
        assert new.token_to_id(token["content"]) is not None
    special = new.encode("a", "b")
    assert [new.id_to_token(i) for i in special.ids] == special.tokens
    assert sum(special.special_tokens_mask) == {"wordpiece": 3}.get(kind, 4)
    if kind == "bpe":
        known = smaller.definition["model"]["vocab"]
        merges = [tuple(pair) for pair in smaller.definition["model"]["merges"]]
        whole = cut(definition, keep=1000).definition["model"]
        assert not merges and all(left in known and right in known for left, right in merges)
        made = {left + right for left, right in map(tuple, whole["merges"])}
        longer = {token for token in whole["vocab"] if len(token) > 1 and not token.startswith("<")}
        assert longer - {"abra-cadabra"} <= made


@pytest.mark.parametrize("kind", MAKERS)
def test_special_tokens_stay_that_only_the_post_processor_names(kind, definitions):
    bare = definitions[kind] | {"added_tokens": []}
    bare["post_processor"] = {"type": "Sequence", "processors": [bare["post_processor"]]}
    new = Tokenizer.from_str(json.dumps(cut(bare, min_count=3).definition))
    before, after = Tokenizer.from_str(json.dumps(bare)).encode("a", "b"), new.encode("a", "b")
    assert after.tokens == before.tokens == [new.id_to_token(number) for number in after.ids]


def test_a_count_says_what_stays(definitions):
    counts = counted(definitions["unigram"], lines(1000, 2, (0,)))
    smaller = smaller_vocabulary(definitions["unigram"], counts, min_count=4)
    assert {token for token, count in counts.items() if count >= 4} <= set(smaller.kept)
    rare = [token for token in smaller.kept if counts[token] < 4]
    pieces = definitions["unigram"]["model"]["vocab"]
    assert all(len(pieces[token][0]) == 1 or pieces[token][0].startswith("<") for token in rare)


def test_tokens_of_a_character_without_one_of_its_own_stay():
    vocabulary = {
        t: i for i, t in enumerate(["[UNK]", "a", "b", "##a", "##b", "ab", "##xa", "ax", "##ab", "y", "ya"])
    }
    definition = {
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocabulary,
                  "max_input_chars_per_word": 100},
        "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
    }  # fmt: skip
    smaller = smaller_vocabulary(definition, {}, keep=9)
    assert set(smaller.definition["model"]["vocab"]) == {
        "[UNK]",
        "a",
        "b",
        "##a",
        "##b",
        "##xa",
        "ax",
        "y",
    } | {"ab"}
    old, new = (Tokenizer.from_str(json.dumps(one)) for one in (definition, smaller.definition))
    for word in ("axa", "abxa", "baxab", "ya", "abab"):
        assert ("[UNK]" in old.encode(word).tokens) == ("[UNK]" in new.encode(word).tokens), word


def test_a_token_that_two_merges_give_stays_with_the_parts_of_both():
    """abc is a + bc in "abc", and ab + c where c follows only later in the order of merges."""
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c", "d", "bc", "ab", "cd", "abc"])}
    merges = [["c", "d"], ["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
    definition = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}, "added_tokens": []}
    smaller = smaller_vocabulary(definition, {7: 5}, keep=7)
    assert set(smaller.definition["model"]["vocab"]) == {"a", "b", "c", "d", "bc", "ab", "abc"}
    old, new = (Tokenizer.from_str(json.dumps(one)) for one in (definition, smaller.definition))
    for text in ("abc", "abcabc", "bcabc", "ab"):
        assert old.encode(text).tokens == new.encode(text).tokens
    with pytest.raises(DataError, match="7 have to stay"):
        smaller_vocabulary(definition, {}, keep=6, always=[7])


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
            {"keep": 5},
            "a vocabulary of kind WordLevel can't be cut; allowed are tokenizers of kind WordPiece, BPE, Unigram",
        ),
        (
            {},
            {"keep": 5000},
            "nothing is dropped: all 2002 tokens would stay; give a smaller number to keep",
        ),
        (
            {
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
                "added_tokens": [],
                "post_processor": None,
            },
            {"min_count": 0},
            "nothing is dropped: all 3 tokens would stay; give a larger count",
        ),
        (
            {"model": {"type": "WordPiece", "vocab": {"a": 0, "time": 1}}, "added_tokens": []},
            {"keep": 1},
            "nothing can be dropped: all 2 tokens have to stay (special tokens, single characters, bytes, and what "
            "holds a character without a token of its own); use the model as it is",
        ),
    ],
)
def test_what_can_not_be_cut(change, how, message, definitions):
    with pytest.raises(DataError) as caught:
        smaller_vocabulary(definitions["bpe"] | change, {}, **how)
    assert str(caught.value) == message
