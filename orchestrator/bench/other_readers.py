"""Other readers of the tokens of a data set, for `minilm bench stream`; each writes its own format first.

`webdataset` reads in file order: the shards as they are, and tars with one record a row. `mosaicml-streaming`,
`litdata` and `megatron-core` read random rows, where they are installed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.order.permutation import make_order
from minilm.data.read.reader import RowReader
from minilm.data.tools.convert import convert

Passes = Callable[[], Iterator[int]]  # an endless iterator of numbers of rows that were read

ROW_READERS = ("webdataset rows", "streaming", "litdata", "megatron")


def others(data: Path, folder: Path, micro_batch: int) -> dict[str, tuple[str, Passes]]:
    """Note and passes of every reader that is installed, over the tokens of `data`; their copies go into `folder`."""
    found = _webdataset(data, folder)
    for package, name, make in (
        ("streaming", "streaming", _mosaicml),
        ("litdata", "litdata", _litdata),
        ("megatron", "megatron", _megatron),
    ):
        if importlib.util.find_spec(package) is not None:
            found[name] = ("random rows", make(data, folder, micro_batch))
    return found


def _webdataset(data: Path, folder: Path) -> dict[str, tuple[str, Passes]]:
    import webdataset

    if not (folder / "rows").exists():
        convert(data, folder / "rows")

    def passes(tars: Path) -> Passes:
        urls = [str(path) for path in sorted(tars.glob("*.tar"))]

        def run() -> Iterator[int]:
            while True:
                for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
                    tokens = sample["tokens.npy"]
                    yield len(tokens) if tokens.ndim == 2 else 1

        return run

    return {
        "webdataset blocks": ("file order", passes(data)),
        "webdataset rows": ("file order", passes(folder / "rows")),
    }


def _all_rows(data: Path) -> Iterator[Any]:
    reader = RowReader(data)
    rows = reader.manifest.rows_per_block
    for first in range(0, reader.num_rows, rows):
        batch = reader.read(range(first, min(first + rows, reader.num_rows)))
        yield from batch.input_ids.numpy().astype(np.uint16)


def _random_items(dataset: Any, num_rows: int, micro_batch: int, pick: Callable[[Any], Any]) -> Passes:
    order = make_order(num_rows, 1)
    batches = [order.rows(i * micro_batch, micro_batch) for i in range(max(1, 65_536 // micro_batch))]

    def run() -> Iterator[int]:
        while True:
            for wanted in batches:
                np.stack([pick(dataset[int(row)]) for row in wanted])
                yield micro_batch

    return run


def _mosaicml(data: Path, folder: Path, micro_batch: int) -> Passes:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found]

    if not (folder / "mds").exists():
        with MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:uint16"}) as out:
            for row in _all_rows(data):
                out.write({"tokens": row})
    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=micro_batch)
    return _random_items(dataset, RowReader(data).num_rows, micro_batch, lambda item: item["tokens"])


def _litdata(data: Path, folder: Path, micro_batch: int) -> Passes:
    from litdata import StreamingDataset  # type: ignore[import-not-found]
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    if not (folder / "litdata").exists():
        writer = BinaryWriter(str(folder / "litdata"), chunk_bytes=64 << 20)
        for number, row in enumerate(_all_rows(data)):
            writer[number] = {"tokens": row}
        writer.done()
        writer.merge(num_workers=1)
    dataset = StreamingDataset(str(folder / "litdata"))
    return _random_items(dataset, RowReader(data).num_rows, micro_batch, lambda item: item["tokens"])


def _megatron(data: Path, folder: Path, micro_batch: int) -> Passes:
    from megatron.core.datasets.indexed_dataset import (  # type: ignore[import-not-found]
        IndexedDataset,
        IndexedDatasetBuilder,
    )

    prefix = str(folder / "megatron")
    if not Path(prefix + ".idx").exists():
        import torch

        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
        for row in _all_rows(data):
            builder.add_document(torch.from_numpy(row.astype(np.int32)), [len(row)])
        builder.finalize(prefix + ".idx")
    return _random_items(IndexedDataset(prefix), RowReader(data).num_rows, micro_batch, np.asarray)
