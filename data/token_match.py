"""The tokens of one tokenizer in another one: what a table of the other's tokens has for each of them.

Tokens are compared by the text they stand for and whether a word begins with it, so that "##ing" of WordPiece, "ing" of
byte-level BPE and of Unigram are one, and "Ġthe", "▁the" and "the" are. Special tokens are matched by their role. What
the other tokenizer lacks is made of the pieces that it cuts the text into.
Left out: how often a text uses a token.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from minilm.data.errors import DataError
from minilm.data.tokenizer import special_ids

_SPACE = "▁"  # of sentencepiece
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
    words, kept = _words(tokenizer), _by_word(other)
    found = _roles(tokenizer, other)
    special = len(found)
    for token in tokenizer.get_added_vocab():
        if token in theirs:
            found.setdefault(own[token], [theirs[token]])
    for token, number in own.items():
        keys = [key for key in words(token) if key in kept]
        if keys:
            found.setdefault(number, [kept[keys[0]]])
    matched = len(found) - special
    rest = {number: words(token)[-1] for token, number in own.items() if number not in found}
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
    """Ids by what the tokens stand for; those that stand alone, wherever they are, before others of the same text."""
    words, added = _words(tokenizer), tokenizer.get_added_vocab()
    listed = [(words(token), number) for token, number in tokenizer.get_vocab().items() if token not in added]
    found: dict[Word, int] = {}
    for keys, number in sorted(listed, key=lambda entry: (-len(entry[0]), entry[1])):
        for key in keys:
            found.setdefault(key, number)
    return found


def _words(tokenizer: Any) -> Callable[[str], list[Word]]:
    """What a token stands for: one word, or two of the same text where the tokenizer lets it stand alone."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if '"ByteLevel"' in json.dumps(definition.get("pre_tokenizer")):
        return _of_bytes()
    if model["type"] in ("BPE", "Unigram"):
        return lambda token: [(_one_byte(token).removeprefix(_SPACE), token.startswith(_SPACE))]
    prefix, alone = model.get("continuing_subword_prefix") or "", _standing_alone(tokenizer)

    def word(token: str) -> list[Word]:
        inner = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
        if inner:
            return [(token.removeprefix(prefix), False)]
        return [(token, False), (token, True)] if token in alone else [(token, True)]

    return word


def _of_bytes() -> Callable[[str], list[Word]]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte = {sign: number for number, sign in bytes_to_unicode().items()}

    def word(token: str) -> list[Word]:
        if not byte.keys() >= set(token):
            return [(token, False)]
        text = bytes(byte[sign] for sign in token).decode("utf-8", "surrogateescape")
        return [(text.removeprefix(" "), text.startswith(" "))]

    return word


def _one_byte(token: str) -> str:
    """The token, or where it is a byte that is no character alone, as <0xE2>, that byte as `_of_bytes` has it."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            number = int(token[3:5], 16)
        except ValueError:
            return token
        return bytes([number]).decode("utf-8", "surrogateescape") if number >= 0x80 else token
    return token


def _standing_alone(tokenizer: Any) -> set[str]:
    """Single characters that are cut off from a word around them: punctuation, and of BERT Chinese characters."""
    vocabulary = tokenizer.get_vocab()
    signs = [token for token in vocabulary if len(token) == 1]
    cut = tokenizer([f"a{sign}" for sign in signs], add_special_tokens=False)["input_ids"] if signs else []
    return {
        sign for sign, ids in zip(signs, cut, strict=True) if len(ids) == 2 and ids[1] == vocabulary[sign]
    }


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
