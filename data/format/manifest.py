"""The manifest: the identity of a data set, pinned to the last bit, and quick to open at any size.

`manifest.json` holds the shape of rows and blocks, the tokenizer's identity and one sha256 a shard; sizes,
offsets and file names follow from the shape in closed form (format.shard.Layout). The checksums of blocks are in the
file `blocks.xxh3` (unsigned 64-bit little-endian, in block order) and are read a shard at a time; the manifest pins
each shard's run of them. So the fingerprint, the sha256 of the manifest's canonical JSON, pins everything; it goes into
every checkpoint and every tracked run.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from minilm.data.errors import DataError
from minilm.data.format.files import write_whole
from minilm.data.format.shard import Layout

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUMS = "blocks.xxh3"
TOKENIZER = "tokenizer"
HELD_OUT = "held-out"


class TokenizerInfo(NamedTuple):
    """The identity of the vocabulary and the special ids that rows are made with; -1 if the tokenizer has no such
    token."""

    vocabulary_fingerprint: str
    vocab_size: int
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int
    mask_id: int


class Shard(NamedTuple):
    """One shard file: `first_row` and `first_block` count in the whole data set."""

    number: int
    name: str
    num_bytes: int
    sha256: str
    checksums_pin: str
    first_row: int
    num_rows: int
    first_block: int
    num_blocks: int


class RowLocation(NamedTuple):
    """Where a row is stored: `block` counts in the data set, `row` in the block, `offset` in bytes of the shard's
    file."""

    shard: int
    block: int
    row: int
    offset: int


@dataclass(frozen=True)
class Manifest:
    """Shape and hashes of a data set. `tokens` counts tokens in rows, CLS and SEP included, padding not."""

    seq_len: int
    dtype: str
    packing: str
    rows: int
    tokens: int
    rows_per_block: int
    blocks_per_shard: int
    tokenizer: TokenizerInfo
    shard_sha256: tuple[str, ...]
    checksums_pins: tuple[str, ...]
    format_version: int = FORMAT_VERSION

    @cached_property
    def layout(self) -> Layout:
        return Layout(
            self.seq_len, self.dtype, self.rows_per_block, self.blocks_per_shard, self.packing == "document"
        )

    @property
    def num_blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    @property
    def num_shards(self) -> int:
        return -(-self.num_blocks // self.blocks_per_shard)

    @property
    def shards(self) -> list[Shard]:
        return [self.shard(index) for index in range(self.num_shards)]

    def shard(self, index: int) -> Shard:
        first_block = index * self.blocks_per_shard
        num_blocks = min(self.blocks_per_shard, self.num_blocks - first_block)
        first_row = first_block * self.rows_per_block
        num_rows = min(num_blocks * self.rows_per_block, self.rows - first_row)
        num_bytes = self.layout.shard_bytes(num_blocks, self.rows_in_block(first_block + num_blocks - 1))
        sha256, pin = self.shard_sha256[index], self.checksums_pins[index]
        return Shard(
            index, shard_name(index), num_bytes, sha256, pin, first_row, num_rows, first_block, num_blocks
        )

    def rows_in_block(self, block: int) -> int:
        return min(self.rows_per_block, self.rows - block * self.rows_per_block)

    def locate(self, row: int) -> RowLocation:
        """Where a row is stored. DataError if there is no such row."""
        if not 0 <= row < self.rows:
            raise DataError(f"row {row} does not exist; this data set has rows 0 to {self.rows - 1}")
        block, within = divmod(row, self.rows_per_block)
        shard, block_in_shard = divmod(block, self.blocks_per_shard)
        offset = self.layout.tokens_at(block_in_shard) + within * self.layout.row_bytes
        return RowLocation(shard, block, within, offset)

    @cached_property
    def _canonical(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["tokenizer"] = self.tokenizer._asdict()
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON: equal if and only if the data are."""
        return hashlib.sha256(self._canonical).hexdigest()


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


def pin_of(checksums: npt.NDArray) -> str:
    """The hash that the manifest keeps for one shard's block checksums."""
    return xxhash.xxh3_64_hexdigest(checksums.astype("<u8").tobytes())


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest to `path`, whole or not at all."""
    fingerprint = manifest.fingerprint.encode()
    write_whole(path, b'{"fingerprint":"' + fingerprint + b'",\n"manifest":' + manifest._canonical + b"}\n")


def load_manifest(folder: Path) -> Manifest:
    """The manifest of the data set in `folder`. DataError if it is missing, damaged or of another version."""
    path = Path(folder) / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{str(folder)!r} holds no data set ({MANIFEST} is missing); make one with: minilm data build"
        ) from error
    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, name: str) -> Manifest:
    """The manifest in `raw`, the bytes of a manifest.json; errors call it `name`."""
    try:
        outer = json.loads(raw)
        fields, fingerprint = outer["manifest"], outer["fingerprint"]
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{name!r} has format version {version}; this program reads {FORMAT_VERSION}: build it again"
            )
        fields["tokenizer"] = TokenizerInfo(**fields["tokenizer"])
        fields["shard_sha256"] = tuple(fields["shard_sha256"])
        fields["checksums_pins"] = tuple(fields["checksums_pins"])
        manifest = Manifest(**fields)
        whole = manifest.fingerprint == fingerprint and len(manifest.shard_sha256) == manifest.num_shards
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(_damaged(name, f"it is not a manifest: {type(error).__name__}")) from error
    if not whole:
        raise DataError(_damaged(name, "its content does not have its fingerprint"))
    return manifest


def _damaged(name: str, reason: str) -> str:
    return f"{name!r} is damaged ({reason}); fetch it again from where it came, or build the data set again"


def block_checksums(folder: Path, manifest: Manifest, shard: int) -> npt.NDArray[np.uint64]:
    """xxh3-64 of every block of one shard (uint64 [blocks]), checked against the manifest's pin."""
    info = manifest.shard(shard)
    path = Path(folder) / CHECKSUMS
    try:
        found = np.fromfile(path, dtype="<u8", count=info.num_blocks, offset=8 * info.first_block)
    except FileNotFoundError as error:
        raise DataError(_damaged(str(path), "it is missing")) from error
    if len(found) != info.num_blocks or pin_of(found) != info.checksums_pin:
        where = f"entries {info.first_block} to {info.first_block + info.num_blocks - 1}, of {info.name}"
        raise DataError(_damaged(str(path), f"{where}, are not what the manifest pins"))
    return found.astype(np.uint64)
