"""How fast rows are read, beside memcpy in the same process and beside other readers over the same tokens.

    memcpy              all tokens copied at once from one array into another
    memcpy, cached      contiguous slices copied into one small buffer: the prefetcher's best case, no miss is paid
    random copies       random rows by numpy from one array in memory into one buffer: the bound of `gather`, which
                        adds addresses, checks and counters to it
    gather, N           random rows into one buffer in the stored dtype, by the very calls that a stream makes for
                        micro-batches of N rows: it takes several at once (what the promise is about)
    gather alone, N     the same, with one micro-batch a call
    batches             `RowReader.read`: random rows as fresh int64 tensors, one micro-batch a call
    stream, N           `Stream.iterate`: order, read-ahead thread and int64 tensors
    and others          see data.bench_others

N is the size that was asked for, a quarter of it, and four times it.
Files are read once before anything is timed, so the page cache holds them: this measures readers, not disks.
Every figure is the best of `repeats` runs of about `seconds` each: by the clock, and by the processor time of the
whole process, which other programs disturb less and from which shares are worked out.
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
import numpy.typing as npt

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
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Batch
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
    """`gather_shares`, `alone_shares`: `gather` and `gather alone` against memcpy, by the rows of a micro-batch;
    `copies_share`: random copies against memcpy; `best_other`: gather at `micro_batch` against the fastest other reader
    of rows. All by processor time."""

    rows: int
    seq_len: int
    micro_batch: int
    speeds: list[Speed]
    gather_shares: dict[int, float]
    alone_shares: dict[int, float]
    copies_share: float
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
        lines.append("share of memcpy by processor time, by the rows of a micro-batch:")
        for what, shares in (("gather", self.gather_shares), ("gather alone", self.alone_shares)):
            lines.append(
                f"{what:<20}" + "".join(f"{rows:>8,}: {share:.0%}" for rows, share in shares.items())
            )
        lines.append(
            f"bare random copies are {self.copies_share:.0%} of memcpy; gather is {self.best_other:,.0f} times the "
            f"best other reader"
        )
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
    place = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="minilm-bench-"))
    try:
        data = _make_data(place / "data", rows, seq_len)
        row_bytes = RowReader(data).manifest.layout.row_bytes
        readers = {**_ours(data, micro_batch), **others(data, place, micro_batch)}
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
            shutil.rmtree(place, ignore_errors=True)
    rates = {speed.reader: speed.rows_per_cpu_second for speed in speeds}
    other = max(rate for name, rate in rates.items() if name in ROW_READERS)
    gather, alone = (
        {size: rates[f"{name}, {size}"] / rates["memcpy"] for size in _sizes(micro_batch)}
        for name in ("gather", "gather alone")
    )
    shares = rates["random copies"] / rates["memcpy"], rates[f"gather, {micro_batch}"] / other
    return StreamBench(rows, seq_len, micro_batch, speeds, gather, alone, *shares)


def _sizes(micro_batch: int) -> list[int]:
    return sorted({max(1, micro_batch // 4), micro_batch, 4 * micro_batch})


def _rows_per_second(make: Passes, seconds: float) -> tuple[float, float]:
    """Rows that an endless iterator of row counts delivers in about `seconds`, a second of the clock and of processor
    time; its first item is warm-up."""
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


class _Told(RowReader):
    """Writes down which rows it is asked for."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.calls: list[npt.NDArray[np.int64]] = []

    def read(self, row_ids: npt.ArrayLike) -> Batch:
        self.calls.append(np.array(row_ids, dtype=np.int64))
        return super().read(row_ids)


def _warm(reader: RowReader) -> None:
    """Every checksum compared, every page in memory."""
    for first in range(0, reader.num_rows, _ROWS_PER_BLOCK):
        reader.read(range(first, min(first + _ROWS_PER_BLOCK, reader.num_rows)))


def _calls(told: _Told, micro_batch: int) -> list[npt.NDArray[np.int64]]:
    """The rows of each call that a stream of such micro-batches makes of its reader."""
    told.calls.clear()
    stream = Stream(told, seed=1, batch=micro_batch, micro_batch=micro_batch)
    for _ in stream.iterate(0, -(-_PREPARED_ROWS // micro_batch), range(1)):
        pass
    return told.calls.copy()


def _ours(data: Path, micro_batch: int) -> dict[str, tuple[str, Passes]]:
    reader, told = RowReader(data), _Told(data)
    _warm(reader)
    _warm(told)
    sizes = _sizes(micro_batch)
    calls = {size: _calls(told, size) for size in sizes}
    alone = {size: [ids for call in calls[size] for ids in call.reshape(-1, size)] for size in sizes}
    flat = np.concatenate([np.fromfile(data / shard.name, np.uint8) for shard in reader.manifest.shards])
    row_bytes = reader.manifest.layout.row_bytes

    def memcpy() -> Iterator[int]:
        target = np.zeros_like(flat)
        while True:
            np.copyto(target, flat)
            yield len(flat) // row_bytes

    def memcpy_cached() -> Iterator[int]:
        size = micro_batch * row_bytes
        buffer = np.empty(size, np.uint8)
        while True:
            for at in range(0, len(flat) - size, size):
                np.copyto(buffer, flat[at : at + size])
                yield micro_batch

    def random_copies() -> Iterator[int]:
        array = flat[: reader.num_rows * row_bytes].reshape(-1, row_bytes)
        buffer = np.empty((max(map(len, calls[micro_batch])), row_bytes), np.uint8)
        while True:
            for wanted in calls[micro_batch]:
                np.take(array, wanted, axis=0, out=buffer[: len(wanted)], mode="clip")
                yield len(wanted)

    def gather(wanted_rows: list[npt.NDArray[np.int64]]) -> Iterator[int]:
        buffer = np.empty((max(map(len, wanted_rows)), reader.seq_len), reader.manifest.dtype)
        while True:
            for wanted in wanted_rows:
                reader.gather(wanted, buffer[: len(wanted)])
                yield len(wanted)

    def batches() -> Iterator[int]:
        while True:
            for wanted in alone[micro_batch]:
                yield len(reader.read(wanted).row_ids)

    def stream(size: int) -> Iterator[int]:
        steps = Stream(reader, seed=1, batch=size, micro_batch=size).iterate(0, 1 << 40, range(1))
        try:
            for batch in steps:
                yield len(batch.row_ids)
        finally:
            steps.close()

    at_once = {size: f"random rows, up to {max(map(len, calls[size])):,} a call" for size in sizes}
    return {
        "memcpy": ("", memcpy),
        "memcpy, cached": ("", memcpy_cached),
        "random copies": (f"in memory, {at_once[micro_batch]}", random_copies),
        **{f"gather, {size}": (at_once[size], partial(gather, calls[size])) for size in sizes},
        **{f"gather alone, {size}": ("random rows", partial(gather, alone[size])) for size in sizes},
        "batches": ("random rows, int64 tensors", batches),
        **{
            f"stream, {size}": ("random rows, int64 tensors, order included", partial(stream, size))
            for size in sizes
        },
    }
