"""Whether text holds a row to train on and, where a share is held out, one to measure on: before it is tokenized.

A build would find out at its end. Here text is read until both splits have a row, and of each split no more is
tokenized than that takes: of a large corpus a few documents. Only where a split stays short is everything read.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from minilm.data.builder.clean import Encoder
from minilm.data.builder.tokenization import is_held_out, pieces
from minilm.data.builder.work import SPLITS
from minilm.data.errors import DataError
from minilm.data.format.pack import content_len
from minilm.data.sources import text
from minilm.data.sources.accounts import Accounts

_LEAST_SEQ_LEN = 8  # that a recipe may ask for


def check_enough(
    inputs: Sequence[str | Path],
    tokenizer: Any,
    *,
    options: dict[str, Any],
    special_tokens: str,
    seq_len: int,
    packing: str,
    held_out: float,
    seed: int,
) -> None:
    """DataError, in the words of a build with these arguments, where it would end without a row in a split.

    tokenizer: as `load_tokenizer` gives it; it is not changed. options: the source's, as `import_data` takes them.
    """
    plan = text.plan(inputs, tokenizer, options)
    encoder = Encoder(deepcopy(tokenizer.backend_tokenizer), special_tokens)
    needed = content_len(seq_len) if packing == "full" else 1
    splits = SPLITS if held_out else SPLITS[:1]
    documents, tokens = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    items = (item for unit in plan.units for item in text.read(plan.spec, unit))
    split, has_ids = SPLITS[0], False
    for piece in pieces(items, Accounts()):
        assert isinstance(piece.content, str)
        if not piece.continues:
            split, has_ids = SPLITS[is_held_out(piece.content, held_out, seed)], False
        if tokens[split] < needed and (num_tokens := len(encoder.encode([piece.content])[0])):
            documents[split] += not has_ids
            tokens[split] += num_tokens + (packing == "full" and not has_ids)  # there SEP ends a document
            has_ids = True
        if min(tokens.values()) >= needed:
            return
    if not any(documents.values()):
        raise DataError(no_text(plan.files))
    for split in splits:
        if tokens[split] < needed:
            raise DataError(too_little(split, tokens[split], documents[split], seq_len))


def no_text(files: Sequence[str]) -> str:
    """What is said of files that hold no document."""
    return f"no text in {', '.join(map(repr, files[:3]))}; give files with text"


def too_little(split: str, num_tokens: int, num_documents: int, seq_len: int) -> str:
    """What is said of a split, one of `SPLITS`, that has no row."""
    what, way = ("held-out split", " or a larger held_out")
    if split == "train":
        what, way = ("text", " or a smaller seq_len" if content_len(_LEAST_SEQ_LEN) <= num_tokens else "")
    documents = f"{num_documents} document{'' if num_documents == 1 else 's'}"
    return f"the {what} has {documents} with {num_tokens} tokens, less than one row of {seq_len}; give more text{way}"
