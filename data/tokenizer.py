"""The tokenizer of a data set: loaded once through `transformers`, checked, and fingerprinted.

A stream that was tokenized otherwise than the teacher expects is the commonest silent error of distillation. Two
fingerprints find it: of the token -> id map, and of the pipeline that turns text into tokens (lower-casing, accents,
pre-tokenizer, the model's rules). Both travel in every manifest and are compared with the teacher's.
Left out: training a tokenizer.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from minilm.data.errors import DataError, one_line

log = logging.getLogger("minilm.data")

_XLM_R_FILE = "sentencepiece.bpe.model"
_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    _XLM_R_FILE,
)
_RARE = "\U00012000"  # a cuneiform letter, which no vocabulary of today's languages holds
_NUM_KNOWN = 256
_PROBES = (
    "Straße İstanbul ISPARTA",
    "Crème brûlée, naïve café",
    "Ελληνικά ΑΒΓ ς",
    "Ёлка и Йод",
    "汉字かなカナ ไทย",
    "ﬁne ²½ Ｆｕｌｌ",
    "don't  stop-now\t3,141.5 £€😀",
)


class SpecialIds(NamedTuple):
    """Ids that packing and masking need; -1 where the tokenizer has no such token."""

    cls: int
    sep: int
    pad: int
    unk: int
    mask: int


def load_tokenizer(path_or_hub_id: str) -> Any:
    """A fast tokenizer from a folder or hub id. DataError when it cannot be loaded, has no unknown token
    for what its vocabulary does not hold, or does not know its own tokens."""
    where = os.path.expanduser(path_or_hub_id)  # noqa: PTH111 (Path.expanduser raises for a user that is not there)
    if (where.startswith((".", "/", "~")) or Path(where).exists()) and not has_tokenizer(Path(where)):
        raise DataError(
            f"tokenizer {path_or_hub_id!r}: no tokenizer.json or vocabulary file there; "
            "give a folder written by save_pretrained, or a hub id"
        )
    try:
        tokenizer = _load(where)
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


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files, sound or not."""
    return folder.is_dir() and any((folder / name).exists() for name in _FILES)


def _load(where: str) -> Any:
    from transformers import AutoTokenizer  # seconds to import: the build's worker processes do without it

    folder = Path(where)
    if any(folder.glob("*.model")) and not (folder / "tokenizer.json").exists():
        import sentencepiece  # noqa: F401  (transformers reads such files with it, and misnames what is wrong without)
    alone = not any(
        (folder / name).exists() for name in ("config.json", "tokenizer_config.json", "tokenizer.json")
    )
    if alone and (folder / _XLM_R_FILE).exists():
        from transformers import XLMRobertaTokenizer

        log.warning(
            "tokenizer %r: no config.json says whose %s this is; taken as XLM-RoBERTa's", where, _XLM_R_FILE
        )
        return XLMRobertaTokenizer.from_pretrained(where)
    return AutoTokenizer.from_pretrained(where)


def _check(tokenizer: Any, name: str) -> None:
    num_special = len(set(tokenizer.all_special_ids))
    if len(tokenizer) <= num_special:
        raise DataError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, {num_special} of them special: "
            "its vocabulary file is missing; give the folder of a complete tokenizer"
        )
    backend = tokenizer.backend_tokenizer
    normalized = backend.normalizer.normalize_str(_RARE) if backend.normalizer is not None else _RARE
    try:
        rare = _ids(tokenizer, _RARE)
    except Exception as error:  # the Rust side raises plain Exceptions
        raise DataError(f"tokenizer {name!r} {_NO_UNKNOWN} ({error}); {_ADD_ONE}") from error
    if normalized.strip() and not rare:
        raise DataError(f"tokenizer {name!r} {_NO_UNKNOWN}: they would be dropped from the text; {_ADD_ONE}")
    if not _knows_itself(tokenizer):
        raise DataError(
            f"tokenizer {name!r} recognizes none of its own tokens in text: its files do not belong together; "
            "give the folder of a complete tokenizer"
        )


_NO_UNKNOWN = "has no unknown token in its vocabulary for characters that it does not hold"
_ADD_ONE = "give a tokenizer whose unk_token is in its vocabulary, or one that falls back to bytes"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"])


def _knows_itself(tokenizer: Any) -> bool:
    """Whether any of some tokens of the vocabulary, decoded and encoded again, gives a token that is not special."""
    special = set(tokenizer.all_special_ids)
    ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
    step = max(1, len(ordinary) // _NUM_KNOWN)
    return any(set(_ids(tokenizer, tokenizer.decode([token]))) - special for token in ordinary[::step])


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


def pipeline_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) of how text becomes tokens, beyond the token -> id map: normalizer, pre-tokenizer, rules and scores
    of the model, added tokens. What only decodes, or puts special tokens around, is no part of it."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    if isinstance(model.get("vocab"), dict):  # a map of ids; Unigram has a list of scores here
        model = {key: value for key, value in model.items() if key != "vocab"}
    added = [
        {key: value for key, value in token.items() if key != "id"}
        for token in definition.get("added_tokens", [])
        if not token["special"]
    ]
    parts = [definition.get("normalizer"), definition.get("pre_tokenizer"), model, added]
    canonical = json.dumps(_without_nulls(parts), ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_nulls(value: Any) -> Any:
    """Nulls left out, so that an optional key that a later `tokenizers` writes changes no fingerprint."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def pipeline_difference(one: Any, other: Any) -> str:
    """A text that two tokenizers of one vocabulary cut differently, with both results; empty where none is found."""
    for text in _PROBES:
        tokens = [loaded.convert_ids_to_tokens(_ids(loaded, text)) for loaded in (one, other)]
        if tokens[0] != tokens[1]:
            return f"{text!r} becomes {' '.join(tokens[0])!r} there and {' '.join(tokens[1])!r} here"
    return ""
