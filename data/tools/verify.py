"""Compare every byte of a data set with its manifest, in parallel, in a folder or behind a URL.

Damage is listed with file, block and offset, and nothing is changed (tools.repair does that). The sha256 of a shard
says whether it is damaged, the checksums of its blocks say where. Files that the manifest does not pin, because they
came later or the data set is older than such pins, are named: "whole" is said of nothing else.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minilm.data.errors import DataError, OriginError
from minilm.data.format.manifest import (
    BUILD_FILE,
    CHECKSUMS,
    HELD_OUT,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    block_checksums,
    check_files,
    load_manifest,
    other_files,
    parse_manifest,
    pinned_names,
)
from minilm.data.read.shard_files import damaged_blocks
from minilm.data.storage.remote import TOKENIZER_FILES, Store, is_remote
from minilm.data.tokenizer import load_tokenizer, vocabulary_fingerprint


@dataclass(frozen=True)
class Damage:
    """One piece of damage: `block` and `offset` (bytes in the file) are None if it is the whole file."""

    file: str
    block: int | None
    offset: int | None
    what: str

    def text(self) -> str:
        where = "" if self.block is None else f", block {self.block}, at byte {self.offset}"
        return f"{self.file}{where}: {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    """`not_pinned`: files of the folder that nothing says how they should be, by their paths in it."""

    folder: str
    fingerprint: str
    shards: int
    num_bytes: int
    seconds: float
    damage: list[Damage]
    not_pinned: list[str]

    @property
    def whole(self) -> bool:
        return not self.damage

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "whole": self.whole}

    def text(self) -> str:
        speed = self.num_bytes / max(self.seconds, 1e-9) / 1e6
        lines = [f"{self.folder}: {self.shards} shards, {self.num_bytes:,} bytes read, {speed:,.0f} MB/s"]
        lines += [f"damaged: {damage.text()}" for damage in self.damage]
        if self.damage:
            if is_remote(self.folder):
                lines.append("put a whole copy there; nothing is repaired behind a URL")
            else:
                lines.append(f"repair it with: minilm data repair {self.folder} [--mirror FOLDER|URL]")
        else:
            what = "every byte of all other files" if self.not_pinned else "every byte"
            lines.append(f"whole: {what} is what the manifest {self.fingerprint[:16]} pins")
        if self.not_pinned:
            named = ", ".join(self.not_pinned[:_NAMED])
            more = len(self.not_pinned) - _NAMED
            lines.append(f"not pinned, so not compared: {named}" + (f" and {more} more" if more > 0 else ""))
        return "\n".join(lines)


Progress = Callable[[int, int], None]
_NAMED = 12


def verify(
    folder: str | Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    options: dict[str, Any] | None = None,
) -> VerifyReport:
    """Compare every byte of a data set with its manifest; damage is listed, not raised.

    `folder` is a folder (its held-out split is checked too) or a URL (every shard is fetched once and not kept;
    `options` go to fsspec). `progress` is called with the bytes done and in total. DataError if there is no manifest
    or it is damaged itself.
    """
    if is_remote(folder):
        return _verify_url(str(folder), threads or 4, progress, options)
    folder, begin = Path(folder), time.monotonic()
    splits = [folder, *([folder / HELD_OUT] if (folder / HELD_OUT).is_dir() else [])]
    manifests = {split: load_manifest(split) for split in splits}
    shards = [(split, manifest, shard) for split, manifest in manifests.items() for shard in manifest.shards]
    damage = [d for split, manifest in manifests.items() for d in _check_files(split, manifest, folder)]
    not_pinned = [
        str((split / name).relative_to(folder))
        for split, manifest in manifests.items()
        for name in other_files(split, manifest)
        if name not in pinned_names(split, manifest) and name != f"{HELD_OUT}/{MANIFEST}"
    ]
    sizes = [shard.num_bytes for _, _, shard in shards]
    workers = threads or len(os.sched_getaffinity(0))
    damage += _in_threads(partial(_check_shard, folder), shards, sizes, workers, progress)
    seconds = time.monotonic() - begin
    fingerprint = manifests[folder].fingerprint
    return VerifyReport(str(folder), fingerprint, len(shards), sum(sizes), seconds, damage, not_pinned)


def _verify_url(
    url: str, threads: int, progress: Progress | None, options: dict[str, Any] | None
) -> VerifyReport:
    store, begin = Store(url, options=options), time.monotonic()
    manifests = {"": parse_manifest(store.read(MANIFEST), f"{store.url}/{MANIFEST}")}
    with suppress(OriginError):
        held_out = f"{HELD_OUT}/{MANIFEST}"
        manifests[f"{HELD_OUT}/"] = parse_manifest(store.read(held_out), f"{store.url}/{held_out}")

    def check(where: tuple[str, Shard]) -> list[Damage]:
        split, shard = where
        try:
            found = store.sha256(split + shard.name, shard.num_bytes)
        except DataError as error:
            return [Damage(split + shard.name, None, None, str(error))]
        if found == shard.sha256:
            return []
        return [Damage(split + shard.name, None, None, f"its sha256 is {found[:16]}…")]

    damage = [d for split, manifest in manifests.items() for d in _check_small_files(store, split, manifest)]
    shards = [(split, shard) for split, manifest in manifests.items() for shard in manifest.shards]
    sizes = [shard.num_bytes for _, shard in shards]
    damage += _in_threads(check, shards, sizes, threads, progress)
    seconds = time.monotonic() - begin
    not_pinned = [f"{split}{TOKENIZER}/" for split, manifest in manifests.items() if not manifest.files]
    not_pinned += [] if manifests[""].files else [BUILD_FILE, "report/"]
    fingerprint = manifests[""].fingerprint
    return VerifyReport(store.url, fingerprint, len(shards), sum(sizes), seconds, damage, not_pinned)


def _check_small_files(store: Store, split: str, manifest: Manifest) -> list[Damage]:
    """The damage of all files but manifest and shards behind a URL."""
    with tempfile.TemporaryDirectory(prefix="minilm-verify-") as temporary:
        here, missing = Path(temporary), []
        names = [CHECKSUMS, *(manifest.files or [f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES])]
        for name in names:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (here / name).write_bytes(store.read(split + name))
            except DataError as error:
                missing.append(Damage(split + name, None, None, str(error)))
            names += sorted(pinned_names(here, manifest) - set(names))  # those that build.json pins
        if missing:
            return missing
        damage = [Damage(split + d.file, None, None, d.what) for d in _check_files(here, manifest, here)]
        try:
            for shard in manifest.shards:
                block_checksums(here, manifest, shard.number)
        except DataError:
            what = f"its entries of {shard.name} are not what the manifest pins"
            damage.append(Damage(split + CHECKSUMS, None, None, what))
    return damage


def _in_threads(
    check: Callable[[Any], list[Damage]],
    shards: Sequence[Any],
    sizes: list[int],
    threads: int,
    progress: Progress | None,
) -> list[Damage]:
    damage, done = [], 0
    with ThreadPoolExecutor(threads) as pool:
        for size, found in zip(sizes, pool.map(check, shards), strict=True):
            damage += found
            done += size
            if progress is not None:
                progress(done, sum(sizes))
    return damage


def _check_files(split: Path, manifest: Manifest, folder: Path) -> list[Damage]:
    """Everything but shards and block checksums against its pins; in a data set without pins the vocabulary alone."""
    whole = 8 * manifest.num_blocks
    damage = []
    if (split / CHECKSUMS).is_file() and (size := (split / CHECKSUMS).stat().st_size) > whole:
        what = f"the file has {size} bytes instead of {whole}"
        damage.append(Damage(str((split / CHECKSUMS).relative_to(folder)), None, None, what))
    if not manifest.files:
        return damage + _check_vocabulary(split, manifest, folder)
    wrong = check_files(split, manifest.files)
    return damage + [
        Damage(str((split / n).relative_to(folder)), None, None, what) for n, what in wrong.items()
    ]


def _check_vocabulary(split: Path, manifest: Manifest, folder: Path) -> list[Damage]:
    name = str((split / TOKENIZER).relative_to(folder))
    if not (split / TOKENIZER).is_dir():
        return [Damage(name, None, None, "the tokenizer is missing")]
    try:
        found = vocabulary_fingerprint(load_tokenizer(str((split / TOKENIZER).absolute())))
    except DataError as error:
        return [Damage(name, None, None, str(error))]
    if found != manifest.tokenizer.vocabulary_fingerprint:
        return [Damage(name, None, None, "its vocabulary is not the one that the manifest pins")]
    return []


def check_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the tokenizer beside a data set, a line each; empty where nothing is."""
    if not manifest.tokenizer_files:
        return [damage.text() for damage in _check_vocabulary(folder, manifest, folder)]
    return [f"{name}: {what}" for name, what in check_files(folder, manifest.tokenizer_files).items()]


def _check_shard(folder: Path, found: tuple[Path, Manifest, Shard]) -> list[Damage]:
    split, manifest, shard = found
    path = split / shard.name
    name = str(path.relative_to(folder))
    damage = []
    try:
        block_checksums(split, manifest, shard.number)
    except DataError as error:
        damage.append(Damage(str((split / CHECKSUMS).relative_to(folder)), None, None, str(error)))
    if not path.is_file():
        return [*damage, Damage(name, None, None, "the file is missing")]
    if (size := path.stat().st_size) != shard.num_bytes:
        what = f"the file has {size} bytes instead of {shard.num_bytes}"
        return [*damage, Damage(name, None, None, what)]
    if _sha256(path) == shard.sha256:
        return damage
    blocks = [] if damage else damaged_blocks(path, split, manifest, shard)
    if not blocks:
        return [*damage, Damage(name, None, None, "its bytes do not have the pinned sha256")]
    offsets = [manifest.layout.begin_of_block(block - shard.first_block) for block in blocks]
    what = "its bytes do not have the pinned checksum"
    return [Damage(name, block, offset, what) for block, offset in zip(blocks, offsets, strict=True)]


def _sha256(path: Path) -> str:
    """The hash of a file; empty where the disk fails, so that its blocks are looked at one by one."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
