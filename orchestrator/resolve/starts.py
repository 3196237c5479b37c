"""A student that goes on from a model with another tokenizer than the data's, for `objective: embedding`.

That objective compares vectors of texts, so that the student may be of any family, and its table of tokens is put into
the data's order before it is trained (driver/made_starts.py). Here is told whether that can be, and how much is lost.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from minilm.data.format.manifest import TokenizerInfo
from minilm.data.token_match import TokenMatch, match_tokens
from minilm.data.tokenizer import has_tokenizer, load_tokenizer, special_ids, vocabulary_fingerprint
from minilm.model.encoder.shape import EncoderShape, family_of, load_config
from minilm.model.errors import ModelError

ENOUGH = 0.25  # of the data's tokens: two kinds of tokenizers, trained on one text, have half in common


def with_tokens_of(teacher: EncoderShape, name: str, shape: EncoderShape, start: str) -> EncoderShape:
    """The shape of the model in `start` with a row for each of the teacher's tokens, as student `name` will have it.

    ModelError where it lacks some, and nothing tells which it has.
    """
    if shape.vocab_size != teacher.vocab_size and Path(start).is_dir() and not has_tokenizer(Path(start)):
        raise ModelError(
            f"the model that student {name!r} starts from, in {start}, has {shape.vocab_size} tokens and the teacher "
            f"{teacher.vocab_size}, and without its tokenizer nobody knows which are the same; put the files of its "
            f"tokenizer beside it"
        )
    return replace(shape, vocab_size=teacher.vocab_size)


@lru_cache(maxsize=8)
def other_vocabulary(start: str, tokenizer: str, size: int) -> TokenMatch | None:
    """What the model in the folder `start` has for each token of another `tokenizer` (a folder); None where both are
    one, and where that can't be told.

    size: tokens that the student is to have. DataError for a tokenizer that can't be loaded.
    """
    if not (tokenizer and Path(tokenizer).is_dir() and has_tokenizer(Path(start))):
        return None
    own, other = load_tokenizer(tokenizer), load_tokenizer(start)
    alike = vocabulary_fingerprint(own) == vocabulary_fingerprint(other)
    if alike and load_config(start).vocab_size == size:
        return None
    return match_tokens(own, other, size)


def special_keys(start: str, tokenizer: str) -> dict[str, int]:
    """The config's ids of special tokens for a student of `start` that reads the rows of `tokenizer`."""
    ids = special_ids(load_tokenizer(tokenizer))
    roles = {"bos": ids.cls, "cls": ids.cls, "eos": ids.sep, "sep": ids.sep, "pad": ids.pad, "mask": ids.mask}
    named = {f"{role}_token_id": number for role, number in roles.items() if number >= 0}
    config = load_config(start)
    return {key: number for key, number in named.items() if getattr(config, key, None) is not None}


def start_problem(name: str, start: str, tokenizer: TokenizerInfo, folder: str, size: int) -> str:
    """Why the student can't go on from the model in `start`, "" where it can. folder: of the data's tokenizer."""
    match = other_vocabulary(start, folder, size) if tokenizer.vocab_size <= size else None
    if match is None:
        return ""
    config = load_config(start)
    family, what = family_of(config), f"the model that student {name!r} starts from, in {start}"
    if family.positions_after_padding and tokenizer.pad_id != (family.padding or max(0, tokenizer.pad_id)):
        needs = "token" if family.padding is None else f"token {family.padding}"
        given = "has none" if tokenizer.pad_id < 0 else f"pads with token {tokenizer.pad_id}"
        return (
            f"positions of {what}, begin behind its padding {needs}, and the data's tokenizer {given}; start from a "
            f"model of another family than {config.model_type}"
        )
    if match.share < ENOUGH:
        return (
            f"{what}, has {match.matched:,} of the {match.matched + match.averaged + match.unknown:,} tokens of the "
            f"data's tokenizer, less than a quarter; start from a model with a tokenizer of the same languages"
        )
    return ""


def vocabulary_note(name: str, start: str, folder: str, size: int) -> str:
    """How much of the data's tokenizer the model in `start` has, "" where it has the same one."""
    match = other_vocabulary(start, folder, size)
    if match is None:
        return ""
    return (
        f"student {name!r} starts from a model with another tokenizer: it has {match.matched:,} of the data's tokens, "
        f"{match.averaged:,} begin as the mean of the pieces of their text, {match.unknown:,} as its unknown token"
    )
