"""Folders, URLs and weights -> corpora that a `Stream` reads."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minilm.data.errors import DataError
from minilm.data.read.quarantine import Quarantine
from minilm.data.read.reader import RowReader
from minilm.data.read.remote_reader import RemoteReader
from minilm.data.read.rows import Corpus
from minilm.data.storage.remote import is_remote


def open_rows(
    place: str | Path,
    *,
    cache: Path | None = None,
    options: dict[str, Any] | None = None,
    pin: bool = False,
    quarantine: Quarantine | None = None,
) -> RowReader:
    """The data set in a folder, or behind a URL by way of the node's `cache`; `options` go to fsspec."""
    if not is_remote(place):
        return RowReader(Path(place).expanduser(), pin=pin, quarantine=quarantine)
    if cache is None:
        raise DataError(f"{str(place)!r} is remote; say where its shards may be kept on this node (cache)")
    return RemoteReader(str(place), cache=cache, options=options, pin=pin, quarantine=quarantine)


def open_corpora(
    places: Sequence[tuple[str | Path, float]],
    *,
    cache: Path | None = None,
    options: dict[str, Any] | None = None,
    pin: bool = False,
    quarantine: Quarantine | None = None,
) -> list[Corpus]:
    """Several data sets with their weights; what `Stream` takes as its source."""
    opened = partial(open_rows, cache=cache, options=options, pin=pin, quarantine=quarantine)
    return [Corpus(opened(place), weight) for place, weight in places]
