"""How fast rows are read, beside memcpy in the same process and beside other readers over the same tokens.

    memcpy              all tokens copied at once from one array into another
    memcpy, cached      contiguous slices copied into one small buffer: the prefetcher's best case, no miss is paid
    random copies       random rows by numpy from one array in memory into one buffer: the bound of `gather`, which
                        adds addresses, checks and counters to it
    gather              random rows into one buffer in the stored dtype (what the promise is about)
    gather, 4 x rows    the same, with four times as many rows a call
    batches             `RowReader.read`: random rows as fresh int64 tensors
    stream              `Stream.iterate`: order, read-ahead thread and int64 tensors
    webdataset blocks   our own shards, in file order (webdataset has no random access)
    webdataset rows     one record a row, in file order
    streaming, litdata  random rows, where these packages are installed
    megatron            random rows by its IndexedDataset, where megatron-core is installed

Files are read once before anything is timed, so the page cache holds them: this measures readers, not disks.
Every figure is the best of `repeats` runs of about `seconds` each: by the clock, and by the processor time of the
whole process, which other programs disturb less and from which shares are worked out.
"""

import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.care import convert
from data.manifest import (
    CHECKSUMS,
    MANIFEST,
    TOKENIZER,
    Manifest,
    TokenizerInfo,
    pin_of,
    save_manifest,
    shard_name,
)
from data.order import make_order
from data.reader import RowReader
from data.shard import Layout, blocks_for, write_shard
from data.stream import Stream

_ROWS_PER_BLOCK = 1024
ROW_READERS = ("webdataset rows", "streaming", "litdata", "megatron")


@dataclass(frozen=True)
class Speed:
    reader: str
    rows_per_second: float
    rows_per_cpu_second: float
    bytes_per_second: float
    note: str = ""


@dataclass(frozen=True)
class StreamBench:
    """`gather_share`, `copies_share`: gather, and random copies, against memcpy; `best_other`: gather against the
    fastest other reader of rows. All by processor time."""

    rows: int
    seq_len: int
    micro_batch: int
    speeds: list[Speed]
    gather_share: float
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
        lines.append(
            f"by processor time gather is {self.gather_share:.0%} of memcpy (bare random copies are "
            f"{self.copies_share:.0%}), and {self.best_other:,.0f} times the best other reader"
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
        readers = {**_ours(data, micro_batch), **_others(data, place, micro_batch)}
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
    gather, memcpy = rates["gather"], rates["memcpy"]
    shares = gather / memcpy, rates["random copies"] / memcpy, gather / other
    return StreamBench(rows, seq_len, micro_batch, speeds, *shares)


Passes = Callable[[], Iterator[int]]


def _rows_per_second(make: Passes, seconds: float) -> tuple[float, float]:
    """Rows that an endless iterator of row counts delivers in about `seconds`, a second of the clock and of processor
    time; its first item is warm-up."""
    counts = make()
    next(counts)
    done, begin, used = 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - begin) < seconds:
        done += next(counts)
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
    order = make_order(reader.num_rows, 1)
    reader.read(range(reader.num_rows - 1))  # every checksum compared, every page in memory
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
        buffer = np.empty((micro_batch, row_bytes), np.uint8)
        for wanted in _endless(order, micro_batch):
            np.take(array, wanted, axis=0, out=buffer, mode="clip")
            yield micro_batch

    def gather(rows: int) -> Iterator[int]:
        buffer = np.empty((rows, reader.seq_len), reader.manifest.dtype)
        for wanted in _endless(order, rows):
            reader.gather(wanted, buffer)
            yield rows

    def batches() -> Iterator[int]:
        for wanted in _endless(order, micro_batch):
            yield len(reader.read(wanted).row_ids)

    def stream() -> Iterator[int]:
        steps = Stream(reader, seed=1, batch=micro_batch, micro_batch=micro_batch).iterate(
            0, 1 << 40, range(1)
        )
        try:
            for batch in steps:
                yield len(batch.row_ids)
        finally:
            steps.close()

    return {
        "memcpy": ("", memcpy),
        "memcpy, cached": ("", memcpy_cached),
        "random copies": ("random rows, in memory", random_copies),
        "gather": ("random rows", partial(gather, micro_batch)),
        "gather, 4 x rows": ("random rows", partial(gather, 4 * micro_batch)),
        "batches": ("random rows, int64 tensors", batches),
        "stream": ("random rows, int64 tensors, order included", stream),
    }


def _endless(order: Any, micro_batch: int) -> Iterator[Any]:
    """Row numbers of micro-batches, worked out before they are timed, over and over."""
    prepared = [order.rows(i * micro_batch, micro_batch) for i in range(max(1, 65_536 // micro_batch))]
    while True:
        yield from prepared


def _others(data: Path, place: Path, micro_batch: int) -> dict[str, tuple[str, Passes]]:
    found = _webdataset(data, place)
    for package, name, make in (
        ("streaming", "streaming", _mosaicml),
        ("litdata", "litdata", _litdata),
        ("megatron", "megatron", _megatron),
    ):
        if importlib.util.find_spec(package) is not None:
            found[name] = ("random rows", make(data, place, micro_batch))
    return found


def _webdataset(data: Path, place: Path) -> dict[str, tuple[str, Passes]]:
    import webdataset

    if not (place / "rows").exists():
        convert(data, place / "rows")

    def passes(folder: Path) -> Passes:
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]

        def run() -> Iterator[int]:
            while True:
                for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
                    tokens = sample["tokens.npy"]
                    yield len(tokens) if tokens.ndim == 2 else 1

        return run

    return {
        "webdataset blocks": ("file order", passes(data)),
        "webdataset rows": ("file order", passes(place / "rows")),
    }


def _all_rows(data: Path) -> Iterator[Any]:
    reader = RowReader(data)
    buffer = np.empty((_ROWS_PER_BLOCK, reader.seq_len), np.uint16)
    for first in range(0, reader.num_rows, _ROWS_PER_BLOCK):
        size = min(_ROWS_PER_BLOCK, reader.num_rows - first)
        reader.gather(np.arange(first, first + size), buffer[:size])
        yield from buffer[:size].copy()


def _random_items(dataset: Any, num_rows: int, micro_batch: int, pick: Callable[[Any], Any]) -> Passes:
    def run() -> Iterator[int]:
        for wanted in _endless(make_order(num_rows, 1), micro_batch):
            np.stack([pick(dataset[int(row)]) for row in wanted])
            yield micro_batch

    return run


def _mosaicml(data: Path, place: Path, micro_batch: int) -> Passes:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]

    if not (place / "mds").exists():
        with MDSWriter(out=str(place / "mds"), columns={"tokens": "ndarray:uint16"}) as out:
            for row in _all_rows(data):
                out.write({"tokens": row})
    dataset = StreamingDataset(local=str(place / "mds"), shuffle=False, batch_size=micro_batch)
    return _random_items(dataset, RowReader(data).num_rows, micro_batch, lambda item: item["tokens"])


def _litdata(data: Path, place: Path, micro_batch: int) -> Passes:
    from litdata import StreamingDataset  # type: ignore[import-not-found]
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    if not (place / "litdata").exists():
        writer = BinaryWriter(str(place / "litdata"), chunk_bytes=64 << 20)
        for number, row in enumerate(_all_rows(data)):
            writer[number] = {"tokens": row}
        writer.done()
        writer.merge(num_workers=1)
    dataset = StreamingDataset(str(place / "litdata"))
    return _random_items(dataset, RowReader(data).num_rows, micro_batch, lambda item: item["tokens"])


def _megatron(data: Path, place: Path, micro_batch: int) -> Passes:
    from megatron.core.datasets.indexed_dataset import (  # type: ignore[import-not-found]
        IndexedDataset,
        IndexedDatasetBuilder,
    )

    prefix = str(place / "megatron")
    if not Path(prefix + ".idx").exists():
        import torch

        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
        for row in _all_rows(data):
            builder.add_document(torch.from_numpy(row.astype(np.int32)), [len(row)])
        builder.finalize(prefix + ".idx")
    return _random_items(IndexedDataset(prefix), RowReader(data).num_rows, micro_batch, np.asarray)
