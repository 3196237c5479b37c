"""A text as the tokenizer takes it, and its token ids without ids of special tokens that are only written in it.

Half surrogates (JSON can hold them, UTF-8 cannot) become U+FFFD, a NUL becomes a space, a byte order mark at the begin
goes. Names of special tokens in the text stay text: the tokenizer's own switch does that, except where the model itself
holds the name as a piece; there the name is written apart. All of it is counted.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from minilm.data.errors import DataError, one_line

SURROGATES = "halves of surrogate pairs, replaced by U+FFFD"
NULS = "NUL characters, read as spaces"
MARKS = "byte order marks at the begin of a document, left out"
NAMES = "names of special tokens in the text, kept as text"
NAMES_TAKEN = "names of special tokens in the text, taken as tokens"


def clean(text: str) -> tuple[str, dict[str, int]]:
    """The text without what no tokenizer takes, and how often that was met."""
    seen: dict[str, int] = {}
    if text.startswith("\ufeff"):
        text = text.removeprefix("\ufeff").lstrip()
        seen[MARKS] = 1
    if "\0" in text:
        seen[NULS] = text.count("\0")
        text = text.replace("\0", " ").strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        before = text.count("\ufffd")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if halves := text.count("\ufffd") - before:  # 0: written as pairs
            seen[SURROGATES] = halves
    return text, seen


class Encoder:
    """Encodes batches of texts by `tokenizer`, which is changed for it. `special_tokens` is "text" or "tokens"."""

    def __init__(self, tokenizer: Tokenizer, special_tokens: str):
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._as_text = special_tokens == "text"
        self._tokenizer.encode_special_tokens = self._as_text
        added = self._tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        self._names = sorted(special.values())
        self._first = {name[0] for name in self._names if name}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._ids = frozenset(special) - {self._tokenizer.token_to_id(unknown) if unknown else None}
        tried = [text for name in self._names for text in (name, f"a {name} a", f"a{name}a")]
        self._model_holds_names = self._as_text and any(map(self._has_own_ids, self._ids_of(tried)))

    def names_in(self, text: str) -> int:
        """How many names of special tokens a text holds."""
        if not any(first in text for first in self._first):
            return 0
        return sum(text.count(name) for name in self._names if name)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts."""
        encoded = self._ids_of(texts)
        if self._model_holds_names:  # a normalizer makes names too, such as of letters in full width
            for number, text in enumerate(texts):
                if self._has_own_ids(encoded[number]):
                    encoded[number] = self._encode_apart(text)
        return encoded

    def _has_own_ids(self, ids: list[int]) -> bool:
        return not self._ids.isdisjoint(ids)

    def _encode_apart(self, text: str) -> list[int]:
        [ids] = self._ids_of([self._apart(text)])
        if self._has_own_ids(ids) and (normalizer := self._tokenizer.normalizer) is not None:
            [ids] = self._ids_of([self._apart(normalizer.normalize_str(text))])
        return ids

    def _apart(self, text: str) -> str:
        for name in self._names:
            if len(name) > 1:
                text = text.replace(name, f"{name[0]} {name[1:]}")
        return text

    def _ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        try:
            return list(self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))
        except BaseException as error:  # the Rust side raises plain Exceptions, and panics that are none
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
                raise
            raise NotEncoded(f"the tokenizer cannot encode it ({one_line(error)})") from error


class NotEncoded(DataError):
    """A text that the tokenizer refuses."""
