"""Token ids of another program -> ids of the teacher's tokenizer, or a refusal.

A stream tokenized for another vocabulary is the commonest silent error, so ids are mapped by what their tokens are
called, never by number; a token that occurs and has no namesake in the teacher's vocabulary ends the import.
Left out: re-tokenizing (decode to text and build from that instead).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.tokenizer import (
    load_tokenizer,
    pipeline_difference,
    pipeline_fingerprint,
    special_ids,
    vocabulary_fingerprint,
)

END = -3  # ends a document of the source; packing puts its own separators
DROPPED = -2  # begin of sequence and padding of the source
UNMAPPED = -1


class Mapping(NamedTuple):
    """`ids[i]`: the teacher's id of the source's token i, or UNMAPPED, DROPPED or END; `names[i]` what it is called."""

    ids: list[int]
    names: list[str]
    note: str


def from_tokenizer(source: str, teacher: Any) -> Mapping:
    """For streams made with the tokenizer `source` (folder or hub id): tokens of the same name are the same."""
    loaded = load_tokenizer(source)
    vocabulary, target = loaded.get_vocab(), teacher.get_vocab()
    names = [""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        names[number] = token
    ids = [target.get(name, UNMAPPED) if name else UNMAPPED for name in names]
    special = special_ids(loaded)
    ours = special_ids(teacher)
    for theirs, our in ((special.unk, ours.unk), (special.mask, ours.mask)):
        if theirs >= 0:
            ids[theirs] = our
    for dropped in (special.cls, special.pad, loaded.bos_token_id):
        if dropped is not None and dropped >= 0:
            ids[dropped] = DROPPED
    ends = sorted({end for end in (special.sep, loaded.eos_token_id) if end is not None and end >= 0})
    for end in ends:
        ids[end] = END
    same = vocabulary_fingerprint(loaded) == vocabulary_fingerprint(teacher)
    if same and pipeline_fingerprint(loaded) != pipeline_fingerprint(teacher):
        example = pipeline_difference(loaded, teacher)
        raise DataError(
            f"source_tokenizer {source!r} has the teacher's vocabulary, but another lower-casing, normalization or "
            f"pre-tokenization{example and f' ({example})'}; if the ids are the teacher's own nevertheless, name the "
            "teacher's tokenizer as `source_tokenizer`"
        )
    how = "the teacher's own vocabulary" if same else "tokens mapped by name to the teacher's vocabulary"
    cuts = ", ".join(f"{names[end]!r} (id {end})" for end in ends)
    return Mapping(
        ids, names, f"{how} (tokenized with {source}); a document ends at {cuts or 'bounds of the index'}"
    )


def from_fairseq_dict(path: Path, teacher: Any, encoder: Path | None) -> Mapping:
    """For fairseq's `dict.txt` (`symbol count` a line behind <s> <pad> </s> <unk>). Where symbols are numbers of
    a byte-pair `encoder.json` (token -> number), that file is needed too."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *_symbols(path)]
    if encoder is not None:
        by_number = {str(number): token for token, number in _json_object(encoder).items()}
        names[4:] = [by_number.get(name, name) for name in names[4:]]
    elif all(name.isdigit() or name.startswith("madeupword") for name in names[4:]):
        raise DataError(
            f"the symbols of {str(path)!r} are numbers of another vocabulary; name its encoder.json as `encoder`"
        )
    target, ours = teacher.get_vocab(), special_ids(teacher)
    ids = [DROPPED, DROPPED, END, ours.unk, *(target.get(name, UNMAPPED) for name in names[4:])]
    return Mapping(ids, names, f"symbols of {path.name} mapped by name to the teacher's vocabulary")


def _symbols(path: Path) -> list[str]:
    try:
        lines = (
            path.read_bytes().decode("utf-8").split("\n")
        )  # symbols may be what else Unicode calls a line end
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"dictionary {str(path)!r} cannot be read ({error}); name fairseq's dict.txt"
        ) from error
    if not lines[-1]:
        lines.pop()
    symbols = []
    for number, line in enumerate(lines, start=1):
        parts = line.removesuffix("\r").removesuffix(" #fairseq:overwrite").rsplit(" ", 1)
        if len(parts) != 2:  # the count may be anything: nothing is made of it
            raise DataError(
                f"dictionary {str(path)!r}, line {number}: `symbol count` is expected, got {line[:40]!r}"
            )
        symbols.append(parts[0])
    if not symbols:
        raise DataError(f"dictionary {str(path)!r} is empty; name fairseq's dict.txt")
    return symbols


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read as JSON ({error}); name the encoder.json") from error
    if not isinstance(found, dict):
        raise DataError(f"{str(path)!r} is no JSON object; name the encoder.json (token -> number)")
    return found


class Mapper:
    """Applies a mapping to arrays of source ids."""

    def __init__(self, ids: list[int], names: list[str], where: str):
        self._ids, self._names, self._where = np.array(ids, dtype=np.int64), names, where

    def __call__(self, tokens: npt.NDArray) -> npt.NDArray[np.uint32]:
        """Teacher ids of the tokens that are kept. DataError names a token that cannot be mapped."""
        mapped = self.map_all(tokens)
        return mapped[mapped >= 0].astype(np.uint32)

    def map_all(self, tokens: npt.NDArray) -> npt.NDArray[np.int64]:
        """As above, with DROPPED and END left in place."""
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= len(self._ids)):
            wrong = int(tokens[(tokens < 0) | (tokens >= len(self._ids))][0])
            raise DataError(
                f"{self._where}: token id {wrong} is outside the named vocabulary of {len(self._ids)}; "
                "it was made with another tokenizer"
            )
        mapped = self._ids[tokens]
        if (mapped == UNMAPPED).any():
            wrong = int(tokens[mapped == UNMAPPED][0])
            raise DataError(
                f"{self._where}: token {self._names[wrong]!r} (id {wrong}) is not in the teacher's vocabulary; "
                "build from the text instead, with the teacher's tokenizer"
            )
        return mapped


def needs_tokenizer(source: str) -> DataError:
    return DataError(
        f"files of {source} do not say which vocabulary their token ids belong to; "
        "name the tokenizer they were made with as `source_tokenizer`"
    )
