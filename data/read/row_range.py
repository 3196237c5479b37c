"""A run of consecutive rows as rows of their own: how token files that are read in place are split in two."""

import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.read.rows import Batch, Counters, Rows


class RowRange(Rows):
    """Rows `first` … `first + num_rows - 1` of `rows` (local ones), numbered from 0."""

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

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        """The rows with these numbers, in the order given; `row_ids` of the batch are these numbers."""
        batch = self.rows.read(self.checked(row_ids) + self.first)
        return batch._replace(row_ids=batch.row_ids - self.first)
