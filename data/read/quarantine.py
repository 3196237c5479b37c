"""The list of damaged blocks whose rows every worker gets as masked padding, up to a share of the data set.

The list is one JSON file that all workers can read. A `Quarantine` reads it once, when it is made, and never again: the
masked blocks are constant within a process, so which rows count is still a function of (seed, step) and of this
list. Damage that is not on the list is never skipped at once. The reader makes sure that the data are damaged at their
source, `add` writes the blocks down (under a lock, merged with what others found) and raises `QuarantineGrew`: all
workers have to start again, with the longer list. Nothing removes a block from the list.

Not guaranteed: that all workers of one start hold the same list, because one may start while another finds damage
(compare `digest` after all have made theirs and before any of them reads); that a block is damaged on the disk rather
than in a node's page cache (it is dropped before the block is read again, but not if other processes map it); and
mutual exclusion on file systems without locks (a find may be lost there, and is found again).
"""

import fcntl
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from minilm.data.errors import DataError
from minilm.data.format.files import write_whole
from minilm.data.format.manifest import Manifest

Blocks = dict[str, list[int]]

log = logging.getLogger("minilm.data")


class QuarantineGrew(Exception):
    """New damage was found and is on the list now; after a new start its rows are masked. No error of the user."""


class Quarantine:
    """The list in the file `path`, as it is now (empty if there is no file).

    At most `max_quarantined_share` (0 to 1) of a data set's rows may be masked; `masked` and `add` raise DataError for
    more.
    """

    def __init__(self, path: Path, *, max_quarantined_share: float):
        self.path: Path | None = Path(path)
        self.max_quarantined_share = max_quarantined_share
        self.blocks = _load(self.path)

    @classmethod
    def of(cls, blocks: Mapping[str, Sequence[int]]) -> "Quarantine":
        """A fixed list, without a file or a limit; damage that is not on it is an error."""
        fixed = cls.__new__(cls)
        fixed.path, fixed.max_quarantined_share = None, 1.0
        fixed.blocks = {name: sorted(numbers) for name, numbers in blocks.items()}
        return fixed

    @property
    def digest(self) -> int:
        """A hash of `blocks` in 0 … 2^62 - 1: workers with the same digest mask the same rows."""
        return int(hashlib.sha256(json.dumps(self.blocks, sort_keys=True).encode()).hexdigest(), 16) >> 194

    def masked(self, manifest: Manifest, location: str) -> npt.NDArray[np.bool_]:
        """bool [blocks]: the masked blocks of the data set with this manifest. DataError if they have too many rows."""
        blocks = self.blocks.get(manifest.fingerprint, [])
        if blocks and not 0 <= blocks[0] <= blocks[-1] < manifest.num_blocks:
            raise DataError(
                f"{str(self.path)!r} lists block {blocks[0] if blocks[0] < 0 else blocks[-1]} of {location}, which has "
                f"blocks 0 to {manifest.num_blocks - 1}; put the list back from a copy, or delete it: damage is then "
                "found again"
            )
        self._check_share(manifest, location, blocks)
        masked = np.zeros(manifest.num_blocks, dtype=bool)
        masked[blocks] = True
        return masked

    def add(self, manifest: Manifest, location: str, found: Sequence[int], what: str) -> NoReturn:
        """Put blocks that were found damaged on the list and raise QuarantineGrew. If they are too many, DataError is
        raised and nothing is written, so that the data set can be read again once it is repaired."""
        assert self.path is not None, "a fixed quarantine takes nothing new"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            blocks = _load(self.path)
            mine = sorted({*blocks.get(manifest.fingerprint, []), *found})
            self._check_share(manifest, location, mine)
            _save(self.path, {**blocks, manifest.fingerprint: mine})
        rows = _num_rows(manifest, found)
        log.warning("%s: %s; %d rows go into quarantine (%s)", location, what, rows, self.path)
        raise QuarantineGrew(
            f"{location}: {_shard_names(manifest, found)}: {rows} rows are damaged and now in quarantine "
            f"({self.path}); start again: every worker then leaves them out"
        )

    def _check_share(self, manifest: Manifest, location: str, blocks: Sequence[int]) -> None:
        rows = _num_rows(manifest, blocks)
        if rows <= self.max_quarantined_share * manifest.rows:
            return
        repair = (
            f"put whole copies of them at {location}"
            if "://" in location
            else f"`minilm data repair {location}`"
        )
        enough = math.ceil(1000 * rows / manifest.rows) / 1000
        spare = f", or leave them out with max_quarantined_share: {enough:g} or more" if enough < 1 else ""
        raise DataError(
            f"{location}: {rows} of {manifest.rows} rows ({rows / manifest.rows:.2%}) are damaged, more than "
            f"max_quarantined_share allows ({self.max_quarantined_share:.2%}): {_shard_names(manifest, blocks)}; "
            f"repair them: {repair}, delete {self.path} if it exists{spare}; then run the same command again"
        )


def _num_rows(manifest: Manifest, blocks: Sequence[int]) -> int:
    return sum(manifest.rows_in_block(block) for block in blocks)


def _shard_names(manifest: Manifest, blocks: Sequence[int]) -> str:
    """The shards of these blocks, the first eight by name."""
    counts: dict[str, int] = {}
    for block in blocks:
        name = manifest.shard(block // manifest.blocks_per_shard).name
        counts[name] = counts.get(name, 0) + 1
    named = [f"{name} ({count} blocks)" for name, count in list(counts.items())[:8]]
    return ", ".join(named) + (f" and {len(counts) - 8} more shards" if len(counts) > 8 else "")


def _load(path: Path) -> Blocks:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        saved: Any = json.loads(raw)["blocks"]
        return {str(name): sorted(map(int, numbers)) for name, numbers in saved.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{str(path)!r} is not a list of quarantined blocks ({type(error).__name__}); put it back from a copy, or "
            "delete it: damage is then found again"
        ) from error


def _save(path: Path, blocks: Blocks) -> None:
    saved = {"changed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "blocks": blocks}
    write_whole(path, f"{json.dumps(saved, indent=1)}\n".encode())
