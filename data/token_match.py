"""The tokens of one tokenizer in another one: what a table of the other's tokens has for each of them.

Tokens are compared by the text they stand for and whether a word begins with it, so that "##ing" of WordPiece, "ing" of
byte-level BPE and of Unigram are one, and "Ġthe", "▁the" and "the" are. Where a kind does not mark that beginning (it
marks the end, as "the</w>", or nothing), a token is both. Special tokens are matched by their role. What the other
tokenizer lacks is made of the pieces that it cuts the text into.
Left out: how often a text uses a token.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from minilm.data.errors import DataError
from minilm.data.tokenizer import special_ids

_SPACE = "▁"  # of sentencepiece
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
Word = tuple[str, bool]  # text, whether a word begins with it


class TokenMatch(NamedTuple):
    """rows: by id of the one tokenizer, the ids of the other whose mean stands for it. matched, averaged, unknown: how
    many tokens have one of the other's, several, or none, for which its unknown token stands."""

    rows: list[list[int]]
    matched: int
    averaged: int
    unknown: int

    @property
    def share(self) -> float:
        """Of tokens with one of the other's, from 0 to 1."""
        return self.matched / max(1, self.matched + self.averaged + self.unknown)


def match_tokens(tokenizer: Any, other: Any, size: int) -> TokenMatch:
    """What `other` has for each of `tokenizer`'s tokens, both as `load_tokenizer` gives them.

    size: rows that are wanted; ids without a token get the other's unknown token. DataError for fewer than there are.
    """
    own = tokenizer.get_vocab()
    if max(own.values()) >= size:
        raise DataError(f"the tokenizer has {max(own.values()) + 1} tokens, and {size} are asked for")
    ids, theirs = special_ids(other), other.get_vocab()
    nothing = [next((number for number in (ids.unk, ids.pad) if number >= 0), 0)]
    marks, kept = _marks(tokenizer), _by_word(other)
    words = _words(tokenizer, marks)
    found = _roles(tokenizer, other)
    special = len(found)
    for token in own if marks == _marks(other) else tokenizer.get_added_vocab():
        if token in theirs:
            found.setdefault(own[token], [theirs[token]])
    for token, number in own.items():
        keys = [key for key in words(token) if key in kept]
        if keys:
            found.setdefault(number, [kept[keys[0]]])
    matched = len(found) - special
    rest = {number: words(token)[0] for token, number in own.items() if number not in found}
    pieces = dict(zip(rest, _cut(other, rest.values()), strict=True))
    matched += sum(len(cut) == 1 for cut in pieces.values())
    unknown = sum(not cut for cut in pieces.values())
    rows = [found.get(number) or pieces.get(number) or nothing for number in range(size)]
    return TokenMatch(rows, matched, len(own) - special - matched - unknown, unknown)


def _roles(tokenizer: Any, other: Any) -> dict[int, list[int]]:
    """The other's special tokens by the id of what has the same role here."""
    found: dict[int, list[int]] = {}
    for own, theirs in zip(special_ids(tokenizer), special_ids(other), strict=True):
        if own >= 0 and theirs >= 0:
            found.setdefault(own, [theirs])
    return found


def _by_word(tokenizer: Any) -> Mapping[Word, int]:
    """Ids by what the tokens stand for. Of the same text, first those that stand alone, wherever they are, then those
    that end a word, and bytes last."""
    marks, added = _marks(tokenizer), tokenizer.get_added_vocab()
    words = _words(tokenizer, marks)
    listed = [
        (
            -len(keys := words(token)),
            not token.endswith(marks.end),
            bool(_BYTE.fullmatch(token)),
            number,
            keys,
        )
        for token, number in tokenizer.get_vocab().items()
        if token not in added
    ]
    found: dict[Word, int] = {}
    for *_, number, keys in sorted(listed):
        for key in keys:
            found.setdefault(key, number)
    return found


class _Marks(NamedTuple):
    """How a kind of tokenizer writes its tokens. of_bytes: a sign for each byte; spaces: one before a word belongs to
    it; inner: before what goes on a word, as ##; end: behind what ends one, as </w>."""

    of_bytes: bool
    spaces: bool
    inner: str
    end: str

    def text(self, token: str) -> str:
        """What a token stands for, its space too. A byte that is no character is a lone surrogate."""
        bare = token.removesuffix(self.end)
        if self.of_bytes:
            byte = _byte_of_sign()
            return _of_bytes(byte[sign] for sign in bare) if byte.keys() >= set(bare) else bare
        if one := _BYTE.fullmatch(bare):
            return _of_bytes([int(one[1], 16)])
        return bare.replace(_SPACE, " ") if self.spaces else bare


def _marks(tokenizer: Any) -> _Marks:
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    inner, end = (
        definition["model"].get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    steps = json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")])
    of_bytes = '"ByteLevel"' in steps
    spaces = of_bytes or any(token.startswith(_SPACE) for token in tokenizer.get_vocab())
    return _Marks(of_bytes, spaces and not (inner or end), inner, end)


def _words(tokenizer: Any, marks: _Marks) -> Callable[[str], list[Word]]:
    """What a token stands for: one word, or two of the same text where it may begin a word or go on one, the likelier
    first."""
    alone = set() if marks.spaces else _standing_alone(tokenizer, map(marks.text, tokenizer.get_vocab()))

    def word(token: str) -> list[Word]:
        text = marks.text(token)
        if marks.spaces:
            return [(text.removeprefix(" "), text.startswith(" "))]
        if marks.inner and text.startswith(marks.inner) and text != marks.inner:
            return [(text.removeprefix(marks.inner), False)]
        if text in alone:
            return [(text, False), (text, True)]
        return [(text, True)] if marks.inner else [(text, True), (text, False)]

    return word


@cache
def _byte_of_sign() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {sign: number for number, sign in bytes_to_unicode().items()}


def _of_bytes(numbers: Iterable[int]) -> str:
    return bytes(numbers).decode("utf-8", "surrogateescape")


def _standing_alone(tokenizer: Any, texts: Iterable[str]) -> set[str]:
    """Single characters that are cut off from a word around them: punctuation, and of BERT Chinese characters."""
    signs = sorted({text for text in texts if len(text) == 1 and not "\ud800" <= text <= "\udfff"})
    cut = tokenizer.backend_tokenizer.encode_batch([f"a{sign}" for sign in signs], add_special_tokens=False)
    return {sign for sign, encoded in zip(signs, cut, strict=True) if encoded.word_ids == [0, 1]}


def _cut(tokenizer: Any, words: Iterable[Word]) -> list[list[int]]:
    """The ids of each word's pieces; none where one of them would be unknown."""
    texts = [f"{' ' * begins}{text}" for text, begins in words]
    unknown = tokenizer.unk_token_id
    sound = [text.encode("utf-8", "ignore").decode("utf-8") for text in texts]  # without half characters
    cut = tokenizer(sound, add_special_tokens=False)["input_ids"] if sound else []
    return [
        ids if given == text and unknown not in ids else []
        for text, given, ids in zip(texts, sound, cut, strict=True)
    ]
