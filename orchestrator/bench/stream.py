"""How fast rows are read, next to other readers of the same tokens.

    memcpy        all tokens copied at once from one array into another: the bound of any reader
    read, N       `RowReader.read`: N random rows a call, as int64 tensors
    stream, N     `Stream.iterate` with micro-batches of N rows: order and read-ahead thread included
    and others    see other_readers

N is the size that was asked for, a quarter of it, and four times it. Files are read once before anything is timed, so
they are in the page cache: this measures readers, not disks. Every figure is the best of `repeats` runs of about
`seconds` each: by the clock, and by the processor time of the whole process, which other programs disturb less.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.format.manifest import (
    CHECKSUMS,
    MANIFEST,
    TOKENIZER,
    Manifest,
    TokenizerInfo,
    pin_of,
    save_manifest,
    shard_name,
)
from minilm.data.format.shard import Layout, blocks_for, write_shard
from minilm.data.order.permutation import make_order
from minilm.data.read.reader import RowReader
from minilm.data.stream import Stream
from minilm.orchestrator.bench.other_readers import ROW_READERS, Passes, others

_ROWS_PER_BLOCK = 1024
_PREPARED_ROWS = 1 << 16  # row numbers worked out before they are timed, used over and over


@dataclass(frozen=True)
class Speed:
    reader: str
    rows_per_second: float
    rows_per_cpu_second: float
    bytes_per_second: float
    note: str = ""


@dataclass(frozen=True)
class StreamBench:
    """`best_other`: rows by `read` at `micro_batch` against the fastest other reader of rows, by processor time."""

    rows: int
    seq_len: int
    micro_batch: int
    speeds: list[Speed]
    best_other: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def text(self) -> str:
        head = f"{self.rows:,} rows of {self.seq_len} tokens, {self.micro_batch} rows a micro-batch"
        lines = [head, f"{'reader':<20}{'rows/s':>14}{'GB/s':>9}{'rows/CPU s':>14}"]
        for speed in self.speeds:
            gigabytes = speed.bytes_per_second / 1e9
            rates = f"{speed.rows_per_second:>14,.0f}{gigabytes:>9.3f}{speed.rows_per_cpu_second:>14,.0f}"
            lines.append(f"{speed.reader:<20}{rates}  {speed.note}".rstrip())
        lines.append(f"read is {self.best_other:,.1f} times as fast as the best other reader of rows")
        return "\n".join(lines)


def bench_stream(
    *,
    rows: int = 200_000,
    seq_len: int = 512,
    micro_batch: int = 256,
    seconds: float = 1.0,
    repeats: int = 3,
    folder: Path | None = None,
) -> StreamBench:
    """Make random rows in `folder` (a temporary one by default, removed afterwards) and time every reader."""
    root = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="minilm-bench-"))
    try:
        data = _make_data(root / "data", rows, seq_len)
        row_bytes = RowReader(data).manifest.layout.row_bytes
        readers = {**_ours(data, micro_batch), **others(data, root, micro_batch)}
        best = dict.fromkeys(readers, (0.0, 0.0))
        for _ in range(repeats):  # in turns, so that a busy machine is busy for all of them
            for name, (_, make) in readers.items():
                clock, cpu = _rows_per_second(make, seconds)
                best[name] = max(best[name][0], clock), max(best[name][1], cpu)
        speeds = [
            Speed(name, *best[name], best[name][0] * row_bytes, note) for name, (note, _) in readers.items()
        ]
    finally:
        if folder is None:
            shutil.rmtree(root, ignore_errors=True)
    rates = {speed.reader: speed.rows_per_cpu_second for speed in speeds}
    other = max(rate for name, rate in rates.items() if name in ROW_READERS)
    return StreamBench(rows, seq_len, micro_batch, speeds, rates[f"read, {micro_batch}"] / other)


def _rows_per_second(make: Passes, seconds: float) -> tuple[float, float]:
    """Rows a second of the clock, and a second of processor time, that an endless iterator of row counts delivers in
    about `seconds`. Its first item is warm-up."""
    counts = make()
    next(counts)
    done, begin, used = 0, time.perf_counter(), time.process_time()
    while True:
        done += next(counts)
        if (spent := time.perf_counter() - begin) >= seconds:
            return done / spent, done / (time.process_time() - used)


def _make_data(folder: Path, rows: int, seq_len: int) -> Path:
    if (folder / MANIFEST).exists():
        return folder
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    layout = Layout(seq_len, "uint16", _ROWS_PER_BLOCK, 0, False)
    layout = layout._replace(
        blocks_per_shard=blocks_for(128 << 20, seq_len, "uint16", _ROWS_PER_BLOCK, False)
    )
    random = np.random.default_rng(0)
    rows_per_shard = layout.blocks_per_shard * _ROWS_PER_BLOCK

    def blocks(first: int) -> Iterator[tuple[Any, None]]:
        for begin in range(first, min(first + rows_per_shard, rows), _ROWS_PER_BLOCK):
            size = min(_ROWS_PER_BLOCK, rows - begin)
            yield random.integers(0, 30_000, (size, seq_len)).astype(np.uint16), None

    written = [
        write_shard(folder / shard_name(number), layout, number * layout.blocks_per_shard, blocks(first))
        for number, first in enumerate(range(0, rows, rows_per_shard))
    ]
    checksums = [np.array(shard.block_checksums, dtype="<u8") for shard in written]
    (folder / CHECKSUMS).write_bytes(b"".join(c.tobytes() for c in checksums))
    manifest = Manifest(
        seq_len=seq_len,
        dtype="uint16",
        packing="full",
        rows=rows,
        tokens=rows * seq_len,
        rows_per_block=_ROWS_PER_BLOCK,
        blocks_per_shard=layout.blocks_per_shard,
        tokenizer=TokenizerInfo("0" * 64, 30_000, 1, 2, 0, 3, 4),
        shard_sha256=tuple(shard.sha256 for shard in written),
        checksums_pins=tuple(pin_of(c) for c in checksums),
    )
    save_manifest(manifest, folder / MANIFEST)
    return folder


def _ours(data: Path, micro_batch: int) -> dict[str, tuple[str, Passes]]:
    reader = RowReader(data)
    for first in range(0, reader.num_rows, _ROWS_PER_BLOCK):  # every checksum compared, every page in memory
        reader.read(range(first, min(first + _ROWS_PER_BLOCK, reader.num_rows)))
    row_bytes = reader.manifest.layout.row_bytes

    def memcpy() -> Iterator[int]:
        tokens = np.concatenate(
            [np.fromfile(data / shard.name, np.uint8) for shard in reader.manifest.shards]
        )
        target = np.zeros_like(tokens)
        while True:
            np.copyto(target, tokens)
            yield len(tokens) // row_bytes

    def read(size: int) -> Iterator[int]:
        order = make_order(reader.num_rows, 1)
        calls = [order.rows(number * size, size) for number in range(-(-_PREPARED_ROWS // size))]
        while True:
            for wanted in calls:
                yield len(reader.read(wanted).row_ids)

    def stream(size: int) -> Iterator[int]:
        steps = Stream(reader, seed=1, batch=size, micro_batch=size).iterate(0, 1 << 40, range(1))
        try:
            for batch in steps:
                yield len(batch.row_ids)
        finally:
            steps.close()

    sizes = sorted({max(1, micro_batch // 4), micro_batch, 4 * micro_batch})
    return {
        "memcpy": ("", memcpy),
        **{f"read, {size}": ("random rows, int64 tensors", partial(read, size)) for size in sizes},
        **{
            f"stream, {size}": ("random rows, int64 tensors, order included", partial(stream, size))
            for size in sizes
        },
    }
