"""What the tasks of a build share: its parameters and the files that they leave each other."""

import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilm.data.format.files import replacing
from minilm.data.format.shard import Layout

SPLITS = ("train", "held-out")


NUM_BINS = 40  # of the length histogram: bin i holds lengths in [2^(i/2), 2^((i+1)/2))


_HEADER = struct.Struct("<4Q")


CONTINUES = np.uint32(1 << 31)  # in the length of a piece that goes on the document before it


class Work(NamedTuple):
    """What every task needs to know; written once as plan.json in the build's folder. `names`: what file numbers are
    called; `special_tokens`: "text" or "tokens", what their names in the text become; `language`: whose rules end its
    sentences."""

    source: str
    spec: Any
    units: list[Any]
    seed: int
    held_out: float
    packing: str
    layout: Layout
    cls: int
    sep: int
    pad: int
    unk: int
    special_tokens: str = "text"
    names: list[str] | None = None
    language: str = "en"


def save_work(folder: Path, work: Work) -> None:
    save_json(folder / "plan.json", work._asdict())


@lru_cache(maxsize=1)
def load_work(folder: str, _changed: int) -> Work:
    fields = json.loads((Path(folder) / "plan.json").read_text())
    fields["layout"] = Layout(*fields["layout"])
    return Work(**fields)


def _work(folder: str) -> Work:
    return load_work(folder, (Path(folder) / "plan.json").stat().st_mtime_ns)


def save_json(path: Path, value: Any) -> None:
    _whole(path, [json.dumps(value).encode()])


def _whole(path: Path, parts: list[bytes]) -> None:
    with replacing(path, durable=False) as file:
        file.writelines(parts)


def _run_path(folder: str, unit: int, run: int) -> Path:
    return Path(folder) / "runs" / f"{unit:06d}-{run:04d}.run"


def _bucket_path(folder: str, split: str, bucket: int, what: str) -> Path:
    return Path(folder) / "buckets" / f"{split}-{bucket:05d}.{what}"
