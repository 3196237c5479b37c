"""A run of consecutive rows as rows of their own: the way a pair that is read in place is split in two."""

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.read.rows import Batch, Counters, Rows


class RowRange:
    """Rows `first` … `first + num_rows - 1` of `rows`, numbered from 0; implements data.stream.Rows."""

    def __init__(self, rows: Rows, first: int, num_rows: int):
        if first < 0 or num_rows < 1 or first + num_rows > rows.num_rows:
            raise DataError(
                f"rows {first} to {first + num_rows - 1} were asked for; there are 0 to {rows.num_rows - 1}"
            )
        self.rows, self.first, self.num_rows = rows, first, num_rows
        self.shard_rows, self.seq_len = rows.shard_rows, rows.seq_len
        self.fingerprint, self.tokenizer = f"{rows.fingerprint}[{first}:{first + num_rows}]", rows.tokenizer

    @property
    def counters(self) -> Counters:
        return self.rows.counters

    def at_hand(self, row_ids: npt.NDArray[np.int64]) -> bool:
        return self.rows.at_hand(row_ids + self.first)

    def announce(self, current: npt.NDArray[np.int64], coming: npt.NDArray[np.int64]) -> None:
        """Windows need no care: rows are cut from local files alone."""

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows of these numbers, in the order given; `row_ids` of the batch are these numbers."""
        wanted = np.array(row_ids, dtype=np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.num_rows):
            raise DataError(
                f"rows {wanted.min()} to {wanted.max()} were asked for; there are 0 to {self.num_rows - 1}"
            )
        batch = self.rows.read(wanted + self.first)
        return batch._replace(row_ids=batch.row_ids - self.first)
