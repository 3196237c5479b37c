"""Packing "sentence": a text becomes its sentences, each a row of its own.

The rules are those of `sentencex` for the text's language: they know common abbreviations and the full stops of all
scripts, and load nothing; a language without rules has those of English. What a rule does not know is cut once too
often (in German text, by English rules, "3. Januar") or not at all; a row stays text either way.
"""

import re
from collections.abc import Iterable

import sentencex

from minilm.data.errors import DataError

# The splitter's time grows with the square of a text that is not of ASCII, so it is given windows of this many
# characters at most, cut behind a full stop, else at white space, else anywhere.
WINDOW = 1 << 14
_WINDOWS = re.compile(
    rf".{{1,{WINDOW}}}(?:\Z|(?<=[。！？])|(?<=[.!?])(?=\s))|.{{1,{WINDOW}}}(?=\s)|.{{1,{WINDOW}}}", re.DOTALL
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*")
TOKEN_SOURCES = ("megatron", "fairseq", "fairseq-legacy")  # they hold ids and no text


def split_sentences(text: str, language: str = "en") -> list[str]:
    """The sentences of a text in order, without what is white space alone. language: a code of Wikipedia's, as de."""
    found: Iterable[str] = (
        sentence for window in _WINDOWS.findall(text) for sentence in sentencex.segment(language, window)
    )
    return [sentence for sentence in found if not sentence.isspace()]


def check_language(language: str, packing: str) -> None:
    """DataError for what is no code of a language, and for a language where nothing is split."""
    if not _LANGUAGE.fullmatch(language):
        raise DataError(
            f"language {language!r} is no code of a language; allowed: small letters, as en, de or pt-br"
        )
    if language != "en" and packing != "sentence":
        raise DataError(
            f"language {language!r} says how sentences end, and packing {packing!r} splits none; give packing "
            "sentence, or leave the language out"
        )


def texts_of_rows(text: str, packing: str, language: str) -> list[str]:
    """What is tokenized on its own: the sentences, or with another packing the whole text."""
    return split_sentences(text, language) if packing == "sentence" else [text]


def no_sentences(source: str) -> DataError:
    """The error of a source that has token ids where sentences are wanted."""
    return DataError(
        f"source {source!r} holds token ids, and packing 'sentence' splits text; give the text that they were made "
        "of, or packing document"
    )
