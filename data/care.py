"""Care of a data set: verify every byte, repair what is damaged, convert to one record a row.

Whatever replaces a file is checked against the manifest before it takes the name. Each function returns a small
object with `.text()` for a person and `.as_dict()` for a program.
"""

import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.build import import_data
from data.build_identity import BUILD_FILE
from data.errors import DataError
from data.manifest import (
    CHECKSUMS,
    HELD_OUT,
    TOKENIZER,
    Manifest,
    Shard,
    block_checksums,
    load_manifest,
    shard_name,
)
from data.mapped import MappedShard
from data.reader import RowReader
from data.shard import record_tar
from data.tokenizer import load_tokenizer, vocabulary_fingerprint

_REPAIR = ".repair"


@dataclass(frozen=True)
class Damage:
    """One damaged place: `block` and `offset` (bytes) are None where a whole file is meant."""

    file: str
    block: int | None
    offset: int | None
    what: str

    def text(self) -> str:
        where = "" if self.block is None else f", block {self.block}, at byte {self.offset}"
        return f"{self.file}{where}: {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    folder: str
    fingerprint: str
    shards: int
    num_bytes: int
    seconds: float
    damage: list[Damage]

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
            lines.append(f"mend it with: minilm data repair {self.folder} [--mirror FOLDER]")
        else:
            lines.append(f"whole: every byte is what the manifest {self.fingerprint[:16]} pins")
        return "\n".join(lines)


Progress = Callable[[int, int], None]


def verify(folder: Path, *, threads: int | None = None, progress: Progress | None = None) -> VerifyReport:
    """Compare every byte of a data set, and of its held-out split, with the manifest; damage is listed, not raised.

    `progress(done, total)` is told bytes. DataError when there is no manifest or it is damaged itself.
    """
    folder, begin = Path(folder), time.monotonic()
    splits = [folder, *([folder / HELD_OUT] if (folder / HELD_OUT).is_dir() else [])]
    manifests = {split: load_manifest(split) for split in splits}
    shards = [(split, manifest, shard) for split, manifest in manifests.items() for shard in manifest.shards]
    damage = [d for split, manifest in manifests.items() for d in _check_tokenizer(split, manifest, folder)]
    total, done = sum(shard.num_bytes for _, _, shard in shards), 0
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for (_, _, shard), found in zip(shards, pool.map(partial(_check_shard, folder), shards), strict=True):
            damage += found
            done += shard.num_bytes
            if progress is not None:
                progress(done, total)
    fingerprint = manifests[folder].fingerprint
    return VerifyReport(str(folder), fingerprint, len(shards), total, time.monotonic() - begin, damage)


def _check_tokenizer(split: Path, manifest: Manifest, folder: Path) -> list[Damage]:
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


def _check_shard(folder: Path, place: tuple[Path, Manifest, Shard]) -> list[Damage]:
    split, manifest, shard = place
    path = split / shard.name
    name = str(path.relative_to(folder))
    damage = []
    try:
        block_checksums(split, manifest, shard.number)
    except DataError as error:
        damage.append(Damage(str((split / CHECKSUMS).relative_to(folder)), None, None, str(error)))
    if not path.is_file():
        return [*damage, Damage(name, None, None, "the file is missing")]
    if _sha256(path) == shard.sha256:
        return damage
    try:
        mapped = MappedShard(split, manifest, shard.number, np.zeros(shard.num_blocks, dtype=bool))
    except DataError as error:
        return [*damage, Damage(name, None, None, str(error))]
    for block in range(shard.num_blocks):
        try:
            mapped.verify(np.array([block]))
        except DataError:
            at = mapped.span(block)[0]
            what = "its bytes do not have the pinned checksum"
            damage.append(Damage(name, shard.first_block + block, at, what))
    return damage or [Damage(name, None, None, "its bytes do not have the pinned sha256")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return hashlib.sha256().hexdigest()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            return hashlib.sha256(mapped).hexdigest()


@dataclass(frozen=True)
class RepairReport:
    folder: str
    source: str
    replaced: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        if not self.replaced:
            return f"{self.folder}: nothing is damaged"
        return f"{self.folder}: replaced from {self.source}: {', '.join(self.replaced)}"


def repair(
    folder: Path,
    *,
    mirror: Path | None = None,
    inputs: Iterable[str | Path] | None = None,
    processes: int | None = None,
) -> RepairReport:
    """Replace damaged files by those of `mirror` (a copy of the data set), or of a new build from the same text.

    Without a mirror the text is looked for where it was (or at `inputs`). Nothing is replaced unless the
    replacement has the pinned hash. DataError when neither source can give it.
    """
    folder = Path(folder)
    report = verify(folder)
    if report.whole:
        return RepairReport(str(folder), "", [])
    rebuilt = folder / _REPAIR
    source = Path(mirror) if mirror is not None else rebuilt
    try:
        if mirror is None:
            _build_again(folder, rebuilt, inputs, processes)
        _same_data(folder, source)
        names = sorted({damage.file for damage in report.damage})
        for name in names:
            _replace(source / name, folder / name)
    finally:
        shutil.rmtree(rebuilt, ignore_errors=True)
    left = verify(folder)
    if not left.whole:
        raise DataError(
            f"{str(source)!r} has damage of its own: {left.damage[0].text()}; what it had whole was taken, "
            "name another mirror for the rest"
        )
    return RepairReport(str(folder), "a new build" if mirror is None else str(mirror), names)


def _build_again(folder: Path, out: Path, inputs: Iterable[str | Path] | None, processes: int | None) -> None:
    try:
        saved = json.loads((folder / BUILD_FILE).read_text())
        arguments, files = saved["arguments"], [stamp["path"] for stamp in saved["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{str(folder)!r} does not know how it was built ({BUILD_FILE} is missing or damaged); "
            "name a whole copy as mirror"
        ) from error
    kept = ("seq_len", "packing", "held_out", "seed", "rows_per_block", "shard_bytes", "source", "options")
    options = {name: arguments[name] for name in kept}
    tokenizer = str((folder / TOKENIZER).absolute())
    import_data(list(inputs or files), tokenizer, out, processes=processes, **options)


def _same_data(folder: Path, source: Path) -> None:
    wanted, found = load_manifest(folder).fingerprint, load_manifest(source).fingerprint
    if wanted != found:
        raise DataError(
            f"{str(source)!r} holds other data ({found[:16]}) than {str(folder)!r} ({wanted[:16]}); "
            "repair needs a copy of the same data set, or the same text"
        )


def _replace(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if source.is_dir():
            shutil.copytree(source, temporary)
            shutil.rmtree(target, ignore_errors=True)
        else:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except FileNotFoundError as error:
        raise DataError(f"{str(source)!r} is missing there too; name another mirror") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class ConvertReport:
    out: str
    rows: int
    files: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return f"{self.rows:,} rows, one record each, in {len(self.files)} tars in {self.out}"


def convert(folder: Path, out: Path, *, to: str = "rows", rows_per_file: int = 100_000) -> ConvertReport:
    """Write a data set as tars with one record a row: `{row:012d}.tokens.npy`, padding cut off. `out` must be new."""
    if to != "rows":
        raise DataError(f"conversion to {to!r} is not known; allowed: rows")
    reader, out = RowReader(folder), Path(out)
    if out.exists():
        raise DataError(f"{str(out)!r} exists; name a new folder")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        files: list[str] = []
        for first in range(0, reader.num_rows, rows_per_file):
            files.append(shard_name(len(files)))
            rows = range(first, min(first + rows_per_file, reader.num_rows))
            record_tar(temporary / files[-1], _records(reader, rows))
        shutil.copytree(reader.folder / TOKENIZER, temporary / TOKENIZER)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ConvertReport(str(out), reader.num_rows, files)


def _records(reader: RowReader, rows: range) -> Iterable[tuple[str, npt.NDArray]]:
    step = reader.manifest.rows_per_block
    for first in range(rows.start, rows.stop, step):
        batch = reader.read(range(first, min(first + step, rows.stop)))
        for i, row in enumerate(batch.row_ids.tolist()):
            ids = batch.input_ids[i] if batch.mask is None else batch.input_ids[i][batch.mask[i]]
            yield f"{row:012d}.tokens.npy", ids.numpy().astype(reader.manifest.dtype)
