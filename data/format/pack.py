"""Documents -> rows of exactly `seq_len` tokens, as closed forms over a bucket of documents.

full      documents are joined, each ended by SEP; the joined tokens are cut every seq_len - 2 tokens, and a row is
          CLS, such a piece, SEP. There is no padding; tokens after the last whole row are dropped and counted.
document  every document is cut on its own into pieces of at most seq_len - 2 tokens; a row is CLS, a piece, SEP,
          padding, and its length (CLS and SEP included) is stored. Nothing is dropped.
sentence  the same for every sentence of a document (builder.sentences).
masked    the pieces of documents, each between a CLS and a SEP of its own, several in a row as long as they fit (best
          fit into a few open rows), then padding; where each ends is stored. They share a row, and nothing else:
          training computes each as if it were alone. Nothing is dropped.

All are pure functions of the token arrays, so any process can make any range of rows; masked ones, of those of a whole
bucket.
"""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError

PACKINGS = ("full", "masked", "document", "sentence")  # those whose rows hold several documents come first
NUM_WRAPPERS = 2  # CLS and SEP
_OPEN_ROWS = 64


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


def fill(lengths: npt.NDArray, seq_len: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which pieces share a row: their numbers [pieces], row by row, and how many each row holds [rows].

    lengths: token counts of pieces, CLS and SEP left out. A piece goes into the open row that it fills best, else into
    a new one; of more than a few open rows the fullest is closed.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (tokens, row) of the open rows, ascending
    for piece, length in enumerate(lengths.tolist()):
        at = bisect_left(left, (length + NUM_WRAPPERS,))
        if at < len(left):
            space, row = left.pop(at)
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(piece)
        if (rest := space - length - NUM_WRAPPERS) > NUM_WRAPPERS:
            insort(left, (rest, row))
            if len(left) > _OPEN_ROWS:
                del left[0]
    order = np.fromiter((piece for row in rows for piece in row), dtype=np.int64, count=len(lengths))
    return order, np.array([len(row) for row in rows], dtype=np.int64)


def masked_rows(
    tokens: npt.NDArray,
    piece_lengths: npt.NDArray,
    counts: npt.NDArray,
    seq_len: int,
    cls: int,
    sep: int,
    pad: int,
) -> tuple[npt.NDArray, npt.NDArray[np.bool_]]:
    """Rows [rows, seq_len], and where a document ends in them (its last token, SEP), of the same shape.

    tokens: those of the pieces back to back, row by row; piece_lengths [pieces]: how many each has; counts [rows]: how
    many pieces a row holds.
    """
    wrapped = piece_lengths.astype(np.int64) + NUM_WRAPPERS
    row_of = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(wrapped)  # as if rows had no padding
    before_row = np.repeat((ends - wrapped)[np.cumsum(counts) - counts], counts)
    last = row_of * seq_len + ends - before_row - 1  # places in the rows laid end to end
    rows = np.full(len(counts) * seq_len, pad, dtype=tokens.dtype)
    of_text = np.repeat(last - wrapped + 2, piece_lengths) + _ranges(piece_lengths)
    rows[of_text], rows[last - wrapped + 1], rows[last] = tokens, cls, sep
    is_last = np.zeros(len(rows), dtype=np.bool_)
    is_last[last] = True
    return rows.reshape(-1, seq_len), is_last.reshape(-1, seq_len)


def _ranges(lengths: npt.NDArray) -> npt.NDArray[np.int64]:
    """0, 1, …, length - 1 of each length, back to back."""
    lengths = lengths.astype(np.int64)
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
