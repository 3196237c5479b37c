"""Whether text holds a row to train on and, where a share is held out, one to measure on: before it is tokenized.

A build would find out at its end. Here text is read until both splits have a row, and of each split no more is
tokenized than that takes: of a large corpus a few documents. Only where a split stays short is everything read.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from minilm.data.builder.clean import clean
from minilm.data.builder.tokenization import is_held_out
from minilm.data.builder.work import SPLITS
from minilm.data.errors import DataError
from minilm.data.format.pack import content_len
from minilm.data.sources import text

_LOOKED_AT = 1 << 20  # characters of a document; far more than a row


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

    tokenizer: as `load_tokenizer` gives it; it is not changed.
    """
    coder = deepcopy(tokenizer.backend_tokenizer)
    coder.no_truncation()
    coder.no_padding()
    coder.encode_special_tokens = special_tokens == "text"
    needed = content_len(seq_len) if packing == "full" else 1
    splits = SPLITS if held_out else SPLITS[:1]
    documents, tokens = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    split, counted = SPLITS[0], False
    for document in text.all_documents(inputs, options):
        content, _ = clean(str(document.content))
        if not document.continues:
            split, counted = SPLITS[is_held_out(content, held_out, seed)], False
        if tokens[split] >= needed:
            continue
        if num_tokens := len(coder.encode(content[:_LOOKED_AT], add_special_tokens=False).ids):
            documents[split] += not counted
            tokens[split] += num_tokens + (packing == "full" and not counted)  # there SEP ends every document
            counted = True
        if min(tokens.values()) >= needed:
            return
    if not any(documents.values()):
        raise DataError(no_text([str(path) for path in text.find_files(inputs).files]))
    for split in splits:
        if tokens[split] < needed:
            raise DataError(too_little(split, tokens[split], documents[split], seq_len))


def no_text(files: Sequence[str]) -> str:
    """What is said of files that hold no document."""
    return f"no text in {', '.join(map(repr, files[:3]))}; give files with text"


def too_little(split: str, num_tokens: int, num_documents: int, seq_len: int) -> str:
    """What is said of a split, one of `SPLITS`, that has no row."""
    what, other = ("text", "a smaller seq_len")
    if split != "train":
        what, other = ("held-out split", "a larger held_out")
    return (
        f"the {what} has {num_documents} document{'' if num_documents == 1 else 's'} with {num_tokens} tokens, less "
        f"than one row of {seq_len}; "
        f"give more text or {other}"
    )
