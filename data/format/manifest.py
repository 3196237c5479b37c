"""The manifest: the identity of a data set, pinned to the last bit, and quick to open at any size.

`manifest.json` holds the shape of rows and blocks, the tokenizer's identity and one sha256 a shard; sizes,
offsets and file names follow from the shape in closed form (format.shard.Layout). The checksums of blocks are in the
file `blocks.xxh3` (unsigned 64-bit little-endian, in block order) and are read a shard at a time; the manifest pins
each shard's run of them. So the fingerprint, the sha256 of the manifest's canonical JSON, pins every row; it goes into
every checkpoint and every tracked run.

`pins`, beside it in the same file, hold a sha256 of the tokenizer's files and of the held-out split's manifest, and
how the tokenizer turns text into tokens. They are no part of the fingerprint: equal rows are equal data. `build.json`,
which tells of paths and times, pins itself (format.seal) and the reports; the manifest says that it does. Data sets
made before there were pins are read as they were.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from minilm.data.errors import DataError
from minilm.data.format.files import write_whole
from minilm.data.format.seal import unsealed
from minilm.data.format.shard import Layout

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUMS = "blocks.xxh3"
TOKENIZER = "tokenizer"
HELD_OUT = "held-out"
BUILD_FILE = "build.json"
SEALED = "sealed"  # in place of a sha256: the file holds its own, and pins of others


class TokenizerInfo(NamedTuple):
    """The identity of the vocabulary and the special ids that rows are made with; -1 if the tokenizer has no such
    token. `pipeline_fingerprint`: how text becomes tokens (`tokenizer.pipeline_fingerprint`); empty in data sets made
    before it was kept."""

    vocabulary_fingerprint: str
    vocab_size: int
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int
    mask_id: int
    pipeline_fingerprint: str = ""

    def difference(self, other: "TokenizerInfo") -> str:
        """What differs of two tokenizers, in a word; empty where nothing does, as far as both tell."""
        if self._replace(pipeline_fingerprint="") != other._replace(pipeline_fingerprint=""):
            return "vocabulary"
        both = {self.pipeline_fingerprint, other.pipeline_fingerprint} - {""}
        return "normalization or pre-tokenization" if len(both) > 1 else ""


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
    """Shape and hashes of a data set. `tokens` counts tokens in rows, CLS and SEP included, padding not. `files`:
    sha256 (hex), or SEALED, of other files by their paths in the folder; empty in data sets made before those pins."""

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
    files: dict[str, str] = field(default_factory=dict, compare=False)

    @cached_property
    def layout(self) -> Layout:
        return Layout(
            self.seq_len,
            self.dtype,
            self.rows_per_block,
            self.blocks_per_shard,
            has_lengths=self.packing != "full",
            has_ends=self.packing == "masked",
        )

    @property
    def tokenizer_files(self) -> dict[str, str]:
        """The pins of the tokenizer's files."""
        return {name: pin for name, pin in self.files.items() if name.startswith(f"{TOKENIZER}/")}

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
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "files"}
        fields["tokenizer"] = self.tokenizer._asdict()
        del fields["tokenizer"]["pipeline_fingerprint"]
        return _json(fields)

    @cached_property
    def _pins(self) -> bytes:
        """JSON of what is pinned beside the rows; empty for a data set without pins."""
        if not self.files:
            return b""
        return _json({"files": self.files, "pipeline_fingerprint": self.tokenizer.pipeline_fingerprint})

    @property
    def content(self) -> bytes:
        """The bytes of its manifest.json."""
        parts = [b'{"fingerprint":"', self.fingerprint.encode(), b'",\n"manifest":', self._canonical]
        if self._pins:
            sha256 = hashlib.sha256(self._pins).hexdigest().encode()
            parts += [b',\n"pins":', self._pins, b',\n"pins_sha256":"', sha256, b'"']
        return b"".join([*parts, b"}\n"])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON, pins left out: equal if and only if the rows are."""
        return hashlib.sha256(self._canonical).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


def pin_of(checksums: npt.NDArray) -> str:
    """The hash that the manifest keeps for one shard's block checksums."""
    return xxhash.xxh3_64_hexdigest(checksums.astype("<u8").tobytes())


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest to `path`, whole or not at all."""
    write_whole(path, manifest.content)


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
        pins = outer.get("pins", {"files": {}, "pipeline_fingerprint": ""})
        pipeline = pins["pipeline_fingerprint"]
        fields["tokenizer"] = TokenizerInfo(**fields["tokenizer"], pipeline_fingerprint=pipeline)
        fields["shard_sha256"] = tuple(fields["shard_sha256"])
        fields["checksums_pins"] = tuple(fields["checksums_pins"])
        manifest = Manifest(**fields, files=pins["files"])
        whole = manifest.fingerprint == fingerprint and len(manifest.shard_sha256) == manifest.num_shards
        if set(outer) != {"fingerprint", "manifest"}:  # pins, or a damaged name of theirs
            whole = whole and raw == manifest.content
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


def with_pins(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with pins of what lies beside it in `folder`, the folder of a data set that was built just now."""
    pinned = {}
    for name in other_files(folder, manifest):
        if name == BUILD_FILE:
            pinned[name] = SEALED
        elif name.startswith(f"{TOKENIZER}/") or name == f"{HELD_OUT}/{MANIFEST}":
            pinned[name] = sha256_of(folder / name)
    return replace(manifest, files=pinned)


def other_files(folder: Path, manifest: Manifest) -> list[str]:
    """All files below `folder`, by their path in it, but the manifest, the shards and checksums that it pins, and what
    is hidden. Of the held-out split, a data set of its own, only the manifest."""
    own = {MANIFEST, CHECKSUMS, *(shard_name(index) for index in range(manifest.num_shards))}
    split = f"{HELD_OUT}/{MANIFEST}"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - own
    return sorted(
        name
        for name in names
        if not name.startswith(".") and (name == split or not name.startswith(f"{HELD_OUT}/"))
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, pinned: dict[str, str]) -> dict[str, str]:
    """What is wrong with files in `folder` whose sha256 is pinned, by their names; empty where nothing is."""
    wrong: dict[str, str] = {}
    for name, sha256 in pinned.items():
        try:
            if sha256 == SEALED:
                wrong |= check_files(folder, unsealed((folder / name).read_bytes())["pins"])
            elif sha256_of(folder / name) != sha256:
                wrong[name] = "its bytes do not have the pinned sha256"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            wrong[name] = "the file is missing"
        except OSError as error:  # a disk that fails
            wrong[name] = f"its bytes cannot be read ({error.strerror})"
        except (ValueError, KeyError):
            wrong[name] = "its bytes do not have the sha256 that it holds"
    return wrong


def pinned_names(folder: Path, manifest: Manifest) -> set[str]:
    """The files in `folder` that are pinned beside shards and checksums, by their paths in it."""
    names = set(manifest.files)
    for name in names & {BUILD_FILE}:
        with suppress(OSError, ValueError, KeyError):
            names |= set(unsealed((folder / name).read_bytes())["pins"])
    return names
