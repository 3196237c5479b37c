"""Opens folders, URLs and weighted corpora for a `Stream`."""

import os
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
    location: str | Path,
    *,
    cache: Path | None = None,
    options: dict[str, Any] | None = None,
    pin: bool = False,
    quarantine: Quarantine | None = None,
) -> RowReader:
    """The data set in a folder or behind a URL. The node's `cache` holds the shards of a URL; `options` go to
    fsspec."""
    if not is_remote(location):
        return RowReader(Path(os.path.expanduser(location)), pin=pin, quarantine=quarantine)  # noqa: PTH111
    if cache is None:
        raise DataError(
            f"{str(location)!r} is remote; name the folder of this node that may hold its shards (cache)"
        )
    return RemoteReader(str(location), cache=cache, options=options, pin=pin, quarantine=quarantine)


def open_corpora(
    locations: Sequence[tuple[str | Path, float]],
    *,
    cache: Path | None = None,
    options: dict[str, Any] | None = None,
    pin: bool = False,
    quarantine: Quarantine | None = None,
) -> list[Corpus]:
    """Several data sets with their weights, as a source for `Stream`."""
    opened = partial(open_rows, cache=cache, options=options, pin=pin, quarantine=quarantine)
    return [Corpus(opened(location), weight) for location, weight in locations]
