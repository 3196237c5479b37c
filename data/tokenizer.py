"""The tokenizer of a data set: loaded once through `transformers`, checked, and fingerprinted.

A stream that was tokenized for another vocabulary is the commonest silent error of distillation, so the
fingerprint of the token -> id map travels in every manifest and is compared with the teacher's.
Left out: training a tokenizer.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from minilm.data.errors import DataError, one_line

_PROBE = "the quick brown fox 42"


class SpecialIds(NamedTuple):
    """Ids that packing and masking need; -1 where the tokenizer has no such token."""

    cls: int
    sep: int
    pad: int
    unk: int
    mask: int


def load_tokenizer(path_or_hub_id: str) -> Any:
    """A fast tokenizer from a folder or hub id. DataError when it cannot be loaded or fails a round trip."""
    from transformers import AutoTokenizer  # seconds to import: the build's worker processes do without it

    where = str(Path(path_or_hub_id).expanduser()) if path_or_hub_id.startswith("~") else path_or_hub_id
    if (where.startswith((".", "/")) or Path(where).exists()) and not _looks_like_tokenizer(Path(where)):
        raise DataError(
            f"tokenizer {path_or_hub_id!r}: no tokenizer.json or vocabulary file there; "
            "give a folder written by save_pretrained, or a hub id"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:
        raise DataError(
            f"tokenizer {path_or_hub_id!r} cannot be loaded ({one_line(error)}); "
            "give a folder written by save_pretrained, or a hub id that this machine can reach"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"tokenizer {path_or_hub_id!r} has no tokenizer.json (fast tokenizer); convert it first"
        )
    _check(tokenizer, path_or_hub_id)
    return tokenizer


def _looks_like_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
    return folder.is_dir() and any((folder / name).exists() for name in names)


def _check(tokenizer: Any, name: str) -> None:
    num_special = len(set(tokenizer.all_special_ids))
    if len(tokenizer) <= num_special:
        raise DataError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, {num_special} of them special: "
            "its vocabulary file is missing; give the folder of a complete tokenizer"
        )
    ids = tokenizer(_PROBE, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    again = tokenizer(
        tokenizer.decode(ids, skip_special_tokens=False),
        add_special_tokens=False,
        truncation=False,
        padding=False,
    )["input_ids"]
    decodes = tokenizer.backend_tokenizer.decoder is not None  # without one, decoding joins pieces by spaces
    if not ids or (decodes and ids != again):
        raise DataError(
            f"tokenizer {name!r} does not survive a round trip ({_PROBE!r} -> {ids[:8]} -> {again[:8]}); "
            "its files do not belong together; give the folder of a complete tokenizer"
        )


def special_ids(tokenizer: Any) -> SpecialIds:
    """The ids of CLS, SEP, PAD, UNK and MASK; begin and end of sequence stand in for CLS and SEP."""

    def pick(*names: str) -> int:
        for name in names:
            value = getattr(tokenizer, name, None)
            if value is not None:
                return int(value)
        return -1

    return SpecialIds(
        cls=pick("cls_token_id", "bos_token_id"),
        sep=pick("sep_token_id", "eos_token_id"),
        pad=pick("pad_token_id"),
        unk=pick("unk_token_id"),
        mask=pick("mask_token_id"),
    )


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) over the token -> id map, sorted by id: equal exactly where the vocabularies are equal."""
    pairs = sorted((int(number), token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()
