"""Documents -> rows of exactly `seq_len` tokens, as closed forms over a bucket of documents.

full      documents are joined, each ended by SEP; the joined tokens are cut every seq_len - 2 tokens, and a row is
          CLS, such a piece, SEP. There is no padding; tokens after the last whole row are dropped and counted.
document  every document is cut on its own into pieces of at most seq_len - 2 tokens; a row is CLS, a piece, SEP,
          padding, and its length (CLS and SEP included) is stored. Nothing is dropped.
sentence  the same for every sentence of a document (builder.sentences).

All are pure functions of the token arrays, so any process can make any range of rows.
Left out: best-fit bins and masks inside a row; MiniLM's relations are taken within whole rows.
"""

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError

PACKINGS = ("full", "document", "sentence")
NUM_WRAPPERS = 2  # CLS and SEP


def dtype_for(vocab_size: int) -> str:
    """The dtype of stored tokens: "uint16" if every id fits, "uint32" otherwise."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def content_len(seq_len: int) -> int:
    """The number of text tokens in a whole row."""
    if seq_len <= NUM_WRAPPERS:
        raise DataError(f"seq_len {seq_len} leaves no room for text; give at least {NUM_WRAPPERS + 1}")
    return seq_len - NUM_WRAPPERS


def joined(tokens: npt.NDArray, lengths: npt.NDArray, sep: int) -> npt.NDArray:
    """Documents back to back, each followed by SEP. `tokens` [sum(lengths)] -> [sum(lengths) + documents]."""
    out = np.full(len(tokens) + len(lengths), sep, dtype=tokens.dtype)
    ends = np.cumsum(lengths) + np.arange(len(lengths))
    keep = np.ones(len(out), dtype=bool)
    keep[ends] = False
    out[keep] = tokens
    return out


def full_rows(stream: npt.NDArray, seq_len: int, cls: int, sep: int) -> npt.NDArray:
    """[rows, seq_len] from `stream`, the joined tokens of whole rows ([rows * (seq_len - 2)])."""
    content = content_len(seq_len)
    rows = np.empty((len(stream) // content, seq_len), dtype=stream.dtype)
    rows[:, 0], rows[:, -1] = cls, sep
    rows[:, 1:-1] = stream.reshape(-1, content)
    return rows


def pieces(lengths: npt.NDArray, seq_len: int) -> npt.NDArray[np.uint32]:
    """Token counts of the pieces, in order, that documents of these `lengths` are cut into."""
    content = content_len(seq_len)
    lengths = lengths.astype(np.int64)
    counts = -(-lengths // content)
    out = np.full(int(counts.sum()), content, dtype=np.int64)
    last = np.cumsum(counts) - 1
    out[last] = lengths - (counts - 1) * content
    return out.astype(np.uint32)


def document_rows(
    tokens: npt.NDArray, piece_lengths: npt.NDArray, seq_len: int, cls: int, sep: int, pad: int
) -> tuple[npt.NDArray, npt.NDArray]:
    """Rows [pieces, seq_len] and their lengths [pieces], from tokens back to back and the pieces' token counts."""
    piece_lengths = piece_lengths.astype(np.int64)
    rows = np.full((len(piece_lengths), seq_len), pad, dtype=tokens.dtype)
    columns = np.arange(seq_len)
    rows[:, 0] = cls
    rows[:, 1:][columns[None, :-1] < piece_lengths[:, None]] = tokens
    rows[np.arange(len(rows)), piece_lengths + 1] = sep
    return rows, piece_lengths + NUM_WRAPPERS
