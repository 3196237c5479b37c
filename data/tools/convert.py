"""Writes a data set as tars with one record a row, for other programs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.format.files import copy_tree, replacing_folder
from minilm.data.format.manifest import TOKENIZER, shard_name
from minilm.data.format.shard import record_tar
from minilm.data.read.reader import RowReader


@dataclass(frozen=True)
class ConvertReport:
    out: str
    rows: int
    files: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return f"{self.rows:,} rows, one record each, in {len(self.files)} tars in {self.out}"


def convert(folder: Path, out: Path, *, to: str = "rows", rows_per_file: int = 100_000) -> ConvertReport:
    """Write a data set as tars with one record a row, `{row:012d}.tokens.npy`, without padding; of packing "masked"
    with `{row:012d}.ends.npy`, the places after each document. `out` must be new."""
    if to != "rows":
        raise DataError(f"conversion to {to!r} is not known; allowed: rows")
    reader, out = RowReader(folder), Path(out)
    if out.exists():
        raise DataError(f"{str(out)!r} exists; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    with replacing_folder(out) as temporary:
        for first in range(0, reader.num_rows, rows_per_file):
            files.append(shard_name(len(files)))
            rows = range(first, min(first + rows_per_file, reader.num_rows))
            record_tar(temporary / files[-1], _records(reader, rows))
        copy_tree(reader.folder / TOKENIZER, temporary / TOKENIZER)
    return ConvertReport(str(out), reader.num_rows, files)


def _records(reader: RowReader, rows: range) -> Iterable[tuple[str, npt.NDArray]]:
    step = reader.manifest.rows_per_block
    for first in range(rows.start, rows.stop, step):
        batch = reader.read(range(first, min(first + step, rows.stop)))
        for i, row in enumerate(batch.row_ids.tolist()):
            ids = batch.input_ids[i] if batch.mask is None else batch.input_ids[i][batch.mask[i]]
            yield f"{row:012d}.tokens.npy", ids.numpy().astype(reader.manifest.dtype)
            if batch.ends is not None:
                yield f"{row:012d}.ends.npy", batch.ends[i].nonzero()[:, 0].numpy() + 1
