"""Text -> data set: tokenize, shuffle, pack, shard; in parallel, resumable, the same bytes whatever the
processes.

    plan      files, units of text, tokenizer, arguments -> OUT/.build/plan.json
    tokenize  each unit -> runs of token ids                 (data.build_tasks)
    sort      all runs -> buckets in shuffled order
    write     buckets -> shards
    publish   shards, checksums, tokenizer -> OUT; the manifest appears last

Every task leaves a small result file when it is done; a build that was killed goes on from those. Until the
manifest appears, OUT holds nothing but `.build`, and a reader says that there is no data set. A second call
with the same arguments over the same text finds the manifest and returns at once.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data.build_report import REPORT, BuildReport, make_report, save_report
from data.build_tasks import SPLITS, Work, save_json, save_work
from data.errors import DataError
from data.manifest import (
    CHECKSUMS,
    FORMAT_VERSION,
    HELD_OUT,
    MANIFEST,
    TOKENIZER,
    Manifest,
    TokenizerInfo,
    load_manifest,
    pin_of,
    save_manifest,
)
from data.pack import PACKINGS, content_len, dtype_for
from data.shard import Layout, blocks_for
from data.sources.text import describe, find_files, units
from data.tokenizer import load_tokenizer, special_ids, vocabulary_fingerprint
from data.workers import Task, run_tasks

BUILD_FILE = "build.json"
_WORK = ".build"
_BUCKET_TOKENS = 1 << 25
_PHASES = {"tokenize": (0.0, 0.85), "sort": (0.85, 0.92), "write": (0.92, 1.0)}


class BuildProgress(NamedTuple):
    """Where a build is: `phase` is tokenize, sort or write; `done` of `total` tasks of the phase; `share`
    0..1 of all."""

    phase: str
    done: int
    total: int
    share: float
    documents: int
    tokens: int
    seconds: float
    seconds_left: float


Progress = Callable[[BuildProgress], None]


def build(
    inputs: Sequence[str | Path],
    tokenizer: str,
    out: Path,
    *,
    seq_len: int = 512,
    packing: str = "full",
    held_out: float = 0.0,
    seed: int = 0,
    processes: int | None = None,
    text_field: str | None = None,
    rows_per_block: int = 1024,
    shard_bytes: int = 128 << 20,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the data set `out` from text `inputs` (files, folders, patterns); `held_out` of the documents go
    to the data set `out/held-out`.

    `progress` is called in this process at least every half second while tasks run; it may raise to stop the
    build: no process is left behind, and the same call goes on later.
    DataError for bad arguments, text or tokenizer, and for a full disk.
    """
    _check(seq_len, packing, held_out, seed, rows_per_block, shard_bytes, processes)
    out = Path(out).expanduser()
    files = [describe(path, text_field) for path in find_files(inputs)]
    loaded = load_tokenizer(tokenizer)
    identity = _identity(loaded)
    arguments = {
        "format_version": FORMAT_VERSION,
        "tokenizer": identity,
        "seq_len": seq_len,
        "packing": packing,
        "held_out": held_out,
        "seed": seed,
        "rows_per_block": rows_per_block,
        "shard_bytes": shard_bytes,
        "text_field": text_field,
    }
    try:
        if (done := _finished(out, arguments, [file.path for file in files])) is not None:
            return done
        created = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            if (done := _finished(out, arguments, [file.path for file in files])) is not None:
                return done
            info = TokenizerInfo(vocabulary_fingerprint(loaded), _vocab_size(loaded), *special_ids(loaded))
            layout = _layout(info, seq_len, packing, rows_per_block, shard_bytes)
            all_units = [unit for number, file in enumerate(files) for unit in units(file, number)]
            work = Work(
                files,
                all_units,
                seed,
                held_out,
                packing,
                layout,
                info.cls_id,
                info.sep_id,
                info.pad_id,
                info.unk_id,
            )
            run = _Build(out, work, info, processes or len(os.sched_getaffinity(0)), progress)
            try:
                run.prepare({**arguments, "files": _stamps([file.path for file in files])}, loaded)
                return run.run()
            except DataError:
                shutil.rmtree(out / _WORK, ignore_errors=True)
                if created:
                    _remove_if_empty(out)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"the disk of {str(out)!r} is full ({error.strerror}); finished pieces are kept in "
                f"{str(out / _WORK)!r}: "
                "free some space and run the same command again, or delete that folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(
                f"{str(out)!r} cannot be written ({error.strerror}); choose another folder"
            ) from error
        raise


def _check(
    seq_len: int,
    packing: str,
    held_out: float,
    seed: int,
    rows_per_block: int,
    shard_bytes: int,
    processes: int | None,
) -> None:
    content_len(seq_len)
    if packing not in PACKINGS:
        raise DataError(f"packing {packing!r} is not known; allowed: {', '.join(PACKINGS)}")
    if not 0 <= held_out <= 0.5:
        raise DataError(
            f"held_out {held_out} is outside 0 … 0.5; it is the share of documents kept for evaluation"
        )
    if not 0 <= seed < 1 << 64:
        raise DataError(f"seed {seed} is outside 0 … 2^64 - 1; give a seed in that range")
    for name, value in (
        ("rows_per_block", rows_per_block),
        ("shard_bytes", shard_bytes),
        ("processes", processes),
    ):
        if value is not None and value < 1:
            raise DataError(f"{name} {value} is too small; give at least 1")


def _identity(tokenizer: Any) -> str:
    """sha256 of the tokenizer's definition, without its truncation and padding, which a build never uses."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition.update(truncation=None, padding=None)
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def _vocab_size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _layout(info: TokenizerInfo, seq_len: int, packing: str, rows_per_block: int, shard_bytes: int) -> Layout:
    needs = {"CLS": info.cls_id, "SEP": info.sep_id}
    if packing == "document":
        needs["PAD"] = info.pad_id
    missing = [name for name, number in needs.items() if number < 0]
    if missing:
        raise DataError(
            f"the tokenizer has no {' and no '.join(missing)} token, which packing {packing!r} needs; "
            "use the tokenizer of an encoder (BERT, RoBERTa, …)"
        )
    dtype, has_lengths = dtype_for(info.vocab_size), packing == "document"
    blocks_per_shard = blocks_for(shard_bytes, seq_len, dtype, rows_per_block, has_lengths)
    return Layout(seq_len, dtype, rows_per_block, blocks_per_shard, has_lengths)


# ---------------------------------------------------------------- is it done already?


def _stamps(paths: list[str]) -> list[dict[str, Any]]:
    """Path, size, time and content hash of every input."""
    stamps = []
    for path in paths:
        digest = xxhash.xxh3_128()
        with Path(path).open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        stat = Path(path).stat()
        stamps.append(
            {"path": path, "bytes": stat.st_size, "time": stat.st_mtime_ns, "content": digest.hexdigest()}
        )
    return stamps


def _same_text(paths: list[str], stamps: list[dict[str, Any]]) -> bool:
    """Is the text the one that `stamps` tell of? Untouched files are not read; moved or copied ones are."""
    if len(paths) != len(stamps):
        return False
    stats = [Path(path).stat() for path in paths]
    if [stat.st_size for stat in stats] != [stamp["bytes"] for stamp in stamps]:
        return False
    now = [(path, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    if now == [(stamp["path"], stamp["time"]) for stamp in stamps]:
        return True
    return [stamp["content"] for stamp in _stamps(paths)] == [stamp["content"] for stamp in stamps]


def _finished(out: Path, arguments: dict[str, Any], paths: list[str]) -> BuildReport | None:
    """The report of a finished build of the same thing; None where there is none; DataError for another
    one's."""
    if not (out / MANIFEST).exists():
        return None
    manifest = load_manifest(out)
    try:
        saved = json.loads((out / BUILD_FILE).read_text())
        before, stamps, report = saved["arguments"], saved["files"], BuildReport(**saved["report"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{str(out)!r} holds a data set that was not built here ({BUILD_FILE} is missing or damaged); "
            "choose another folder"
        ) from error
    differs = [name for name, value in arguments.items() if before.get(name) != value]
    if not differs and not _same_text(paths, stamps):
        differs = ["text"]
    if not differs and report.fingerprint != manifest.fingerprint:
        differs = ["manifest"]
    if differs:
        raise DataError(
            f"{str(out)!r} holds a data set built differently ({', '.join(differs)} changed); "
            "choose another folder, or delete that one to build it again"
        )
    return report


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One build a folder at a time; a second one waits and then finds the first one's result."""
    path = out / ".lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    try:
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return


# ---------------------------------------------------------------- the build itself


class _Build:
    """The phases of one build, in order; `folder` is OUT/.build."""

    def __init__(self, out: Path, work: Work, info: TokenizerInfo, processes: int, progress: Progress | None):
        self.out, self.folder, self.work, self.info = out, out / _WORK, work, info
        self.processes, self.progress = processes, progress
        self.started, self.share_at_start = time.monotonic(), -1.0
        self.documents = self.tokens = 0
        self.tokenize_seconds = 0.0

    def prepare(self, saved: dict[str, Any], tokenizer: Any) -> None:
        """Go on in `.build` when it belongs to the same build, else start it anew."""
        self.saved = saved
        key_file = self.folder / "key.json"
        key = {**saved, "files": [stamp["content"] for stamp in saved["files"]]}
        if key_file.exists() and json.loads(key_file.read_text()) == key:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("runs", "buckets", "results", *SPLITS):
            (self.folder / name).mkdir(parents=True)
        _save_tokenizer(tokenizer, self.folder / TOKENIZER)
        save_work(self.folder, self.work)
        save_json(key_file, key)

    def run(self) -> BuildReport:
        before = time.monotonic()
        counts = self._phase("tokenize", [{"unit": unit} for unit in range(len(self.work.units))])
        self.tokenize_seconds = time.monotonic() - before
        total = {name: sum(count[name] for count in counts) for name in counts[0]}
        if not total["documents"]:
            raise DataError(
                f"no text in {', '.join(repr(f.path) for f in self.work.files[:3])}; give files with text"
            )
        buckets, manifests = {}, {}
        for split in SPLITS if self.work.held_out else SPLITS[:1]:
            buckets[split] = self._sort(split, total["tokens"])
        for split, sorted_buckets in buckets.items():
            manifests[split] = self._write(split, sorted_buckets)
        report = make_report(
            self.work,
            total,
            buckets,
            {split: (manifest.rows, manifest.tokens) for split, manifest in manifests.items()},
            manifests["train"].fingerprint,
            self.tokenize_seconds,
            time.monotonic() - self.started,
        )
        self._publish(manifests, report)
        return report

    def _sort(self, split: str, num_tokens: int) -> list[dict[str, Any]]:
        num_buckets = -(-num_tokens // _BUCKET_TOKENS)
        return self._phase(
            "sort",
            [{"split": split, "bucket": b, "num_buckets": num_buckets} for b in range(num_buckets)],
            prefix=f"{split}-",
        )

    def _write(self, split: str, buckets: list[dict[str, Any]]) -> Manifest:
        layout = self.work.layout
        streams = [bucket["stream"] for bucket in buckets]
        num_pieces = [bucket["pieces"] for bucket in buckets]
        if self.work.packing == "full":
            num_rows = sum(streams) // content_len(layout.seq_len)
        else:
            num_rows = sum(num_pieces)
        if not num_rows:
            raise DataError(
                _too_little(split, sum(streams), sum(b["documents"] for b in buckets), layout.seq_len)
            )
        num_shards = -(-num_rows // (layout.rows_per_block * layout.blocks_per_shard))
        rows = {"num_rows": num_rows, "streams": streams, "num_pieces": num_pieces}
        written = self._phase(
            "write", [{"split": split, "shard": s, **rows} for s in range(num_shards)], prefix=f"{split}-"
        )
        checksums = [np.array(shard["block_checksums"], dtype="<u8") for shard in written]
        (self.folder / split / CHECKSUMS).write_bytes(b"".join(c.tobytes() for c in checksums))
        manifest = Manifest(
            seq_len=layout.seq_len,
            dtype=layout.dtype,
            packing=self.work.packing,
            rows=num_rows,
            tokens=sum(shard["tokens"] for shard in written),
            rows_per_block=layout.rows_per_block,
            blocks_per_shard=layout.blocks_per_shard,
            tokenizer=self.info,
            shard_sha256=tuple(shard["sha256"] for shard in written),
            checksums_pins=tuple(pin_of(c) for c in checksums),
        )
        save_manifest(manifest, self.folder / split / MANIFEST)
        return manifest

    def _phase(self, name: str, tasks: list[dict[str, Any]], prefix: str = "") -> list[Any]:
        """Results of all tasks of a phase, in order; those that an earlier run finished are only read."""
        paths = [self.folder / "results" / f"{name}-{prefix}{index:06d}.json" for index in range(len(tasks))]
        results = {i: json.loads(path.read_text()) for i, path in enumerate(paths) if path.exists()}
        left = [index for index in range(len(tasks)) if index not in results]
        if name == "tokenize":
            for result in results.values():
                self._count(result)
        self._tell(name, len(results), len(tasks))
        todo: list[Task] = [(name, {"folder": str(self.folder), **tasks[index]}) for index in left]
        for ended in run_tasks(todo, self.processes):
            if ended is not None:
                number, result = left[ended[0]], ended[1]
                results[number] = result
                save_json(paths[number], result)
                if name == "tokenize":
                    self._count(result)
            self._tell(name, len(results), len(tasks))
        return [results[index] for index in range(len(tasks))]

    def _count(self, result: dict[str, int]) -> None:
        self.documents += result["documents"]
        self.tokens += result["tokens"]

    def _tell(self, phase: str, done: int, total: int) -> None:
        low, high = _PHASES[phase]
        share = low + (high - low) * done / max(1, total)
        if self.share_at_start < 0:
            self.share_at_start = share
        if self.progress is not None:
            seconds = time.monotonic() - self.started
            gained = share - self.share_at_start
            left = seconds * (1 - share) / gained if gained > 0 else float("nan")
            self.progress(
                BuildProgress(phase, done, total, share, self.documents, self.tokens, seconds, left)
            )

    def _publish(self, manifests: dict[str, Manifest], report: BuildReport) -> None:
        """Move everything into place; the held-out data set first, the main manifest last."""
        for split in reversed(manifests):
            target = self.out if split == "train" else self.out / HELD_OUT
            target.mkdir(exist_ok=True)
            shutil.rmtree(target / TOKENIZER, ignore_errors=True)
            shutil.copytree(self.folder / TOKENIZER, target / TOKENIZER)
            for path in sorted((self.folder / split).iterdir()):
                if path.name != MANIFEST:
                    path.replace(target / path.name)
            if split == "train":
                save_report(report, self.work.layout.seq_len, self.out / REPORT)
                save_json(self.out / BUILD_FILE, self._saved_build(report))
            os.sync()
            (self.folder / split / MANIFEST).replace(target / MANIFEST)
        shutil.rmtree(self.folder)

    def _saved_build(self, report: BuildReport) -> dict[str, Any]:
        arguments = {name: value for name, value in self.saved.items() if name != "files"}
        return {"arguments": arguments, "files": self.saved["files"], "report": report.as_dict()}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust side raises plain Exception("… (os error 28)")
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error


def _too_little(split: str, num_tokens: int, num_documents: int, seq_len: int) -> str:
    what, other = ("text", "a smaller seq_len")
    if split != "train":
        what, other = ("held-out split", "a larger held_out")
    return (
        f"the {what} has {num_documents} documents with {num_tokens} tokens, less than one row of {seq_len}; "
        f"give more text or {other}"
    )
