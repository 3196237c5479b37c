"""Text, or other people's tokens -> data set: in parallel, resumable, the same bytes whatever the processes.

    plan      inputs, units, tokenizer, arguments -> OUT/.build/plan.json     (sources, here)
    tokenize  each unit -> runs of token ids                                  (tokenization)
    sort      all runs -> buckets in shuffled order                           (sort)
    write     buckets -> shards                                               (write)
    publish   shards, checksums, tokenizer -> OUT; the manifest appears last  (phases)

A second call with the same arguments over the same inputs finds the manifest and returns at once.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minilm.data.builder.fingerprint import finished_build, stamps_of
from minilm.data.builder.local_pool import WorkerEnded
from minilm.data.builder.phases import WORK, BuildProgress, BuildRun, Progress
from minilm.data.builder.report import BuildReport
from minilm.data.builder.sentences import TOKEN_SOURCES, check_language, no_sentences
from minilm.data.builder.work import Work
from minilm.data.errors import DataError
from minilm.data.format.manifest import FORMAT_VERSION, TokenizerInfo
from minilm.data.format.pack import PACKINGS, content_len, dtype_for
from minilm.data.format.shard import Layout, blocks_for
from minilm.data.sources.accounts import check_allowed
from minilm.data.sources.find import at_home
from minilm.data.sources.plugin import READER_VERSION, find_source
from minilm.data.tokenizer import load_tokenizer, pipeline_fingerprint, special_ids, vocabulary_fingerprint

__all__ = ["BuildProgress", "BuildReport", "build", "import_data"]

LOCK = ".lock"


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
    options: dict[str, Any] | None = None,
    special_tokens: str = "text",
    language: str = "en",
    allow_skipped: float | None = None,
    rows_per_block: int = 1024,
    shard_bytes: int = 128 << 20,
    progress: Progress | None = None,
    on_ray: bool = False,
) -> BuildReport:
    """Build the data set `out` from text `inputs` (files, folders, patterns); `held_out` of the documents go
    to the data set `out/held-out`.

    `options` are those of the source "text" (data.sources.text), the rest is as for `import_data`.
    `progress` is called in this process at least every half second while tasks run; it may raise to stop the
    build: no process is left behind, and the same call goes on later. `on_ray` runs the tasks on a Ray cluster
    instead of `processes` here; all its nodes must see `out` and the inputs under the same paths.
    DataError for bad arguments, text or tokenizer, and for a full disk.
    """
    return import_data(
        inputs,
        tokenizer,
        out,
        source="text",
        options={**(options or {}), "text_field": text_field},
        special_tokens=special_tokens,
        language=language,
        allow_skipped=allow_skipped,
        seq_len=seq_len,
        packing=packing,
        held_out=held_out,
        seed=seed,
        processes=processes,
        rows_per_block=rows_per_block,
        shard_bytes=shard_bytes,
        progress=progress,
        on_ray=on_ray,
    )


def import_data(
    inputs: Sequence[str | Path],
    tokenizer: str,
    out: Path,
    *,
    source: str,
    options: dict[str, Any] | None = None,
    seq_len: int = 512,
    packing: str = "full",
    held_out: float = 0.0,
    seed: int = 0,
    processes: int | None = None,
    special_tokens: str = "text",
    language: str = "en",
    allow_skipped: float | None = None,
    rows_per_block: int = 1024,
    shard_bytes: int = 128 << 20,
    progress: Progress | None = None,
    on_ray: bool = False,
) -> BuildReport:
    """As `build`, from any source (data.sources.plugin); `options` are the source's own.

    `language`: of the text, for packing "sentence". `special_tokens`: what their names in the text become, "text" or
    "tokens". `allow_skipped`: the share of records that may give no document; None is the usual bound
    (accounts.MAX_SKIPPED)."""
    if special_tokens not in ("text", "tokens"):
        raise DataError(f"special_tokens {special_tokens!r} is not known; allowed: text, tokens")
    check_allowed(allow_skipped)
    check_language(language, packing)
    _check(seq_len, packing, held_out, seed, rows_per_block, shard_bytes, processes)
    if packing == "sentence" and source in TOKEN_SOURCES:
        raise no_sentences(source)
    out = at_home(out)
    loaded = load_tokenizer(tokenizer)
    options = {name: value for name, value in (options or {}).items() if value is not None}
    plan = find_source(source).plan(inputs, loaded, options)
    arguments = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "options": options,
        "tokenizer": _identity(loaded),
        "seq_len": seq_len,
        "packing": packing,
        "held_out": held_out,
        "seed": seed,
        "rows_per_block": rows_per_block,
        "shard_bytes": shard_bytes,
        "special_tokens": special_tokens,
        "reader_version": READER_VERSION,
    }
    if language != "en":  # as data sets were recorded before there were others
        arguments["language"] = language
    with _disk_errors(out):
        done = finished_build(out, arguments, plan.files)
        if done is not None:
            done.books.refuse(allow_skipped)
            if not (out / WORK).exists() and not (out / LOCK).exists():
                return done
        created = not out.exists()
        with _lock(out):
            if (done := finished_build(out, arguments, plan.files)) is not None:
                shutil.rmtree(out / WORK, ignore_errors=True)  # of a build that was killed when all was done
                return done
            info = TokenizerInfo(
                vocabulary_fingerprint(loaded),
                _vocab_size(loaded),
                *special_ids(loaded),
                pipeline_fingerprint(loaded),
            )
            layout = _layout(info, seq_len, packing, rows_per_block, shard_bytes)
            ids = (info.cls_id, info.sep_id, info.pad_id, info.unk_id)
            work = Work(source, plan.spec, plan.units, seed, held_out, packing, layout, *ids)
            work = work._replace(
                special_tokens=special_tokens, names=plan.names or plan.files, language=language
            )
            processes = processes or len(os.sched_getaffinity(0))
            run = BuildRun(out, work, plan, info, processes, progress, on_ray, allow_skipped)
            try:
                run.prepare({**arguments, "files": stamps_of(plan.files)}, loaded)
                return run.run()
            except WorkerEnded:
                raise
            except DataError:
                shutil.rmtree(out / WORK, ignore_errors=True)
                if created:
                    _remove_if_empty(out)
                raise


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """What the system says of a disk, as a DataError with the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"the disk of {str(out)!r} is full ({error.strerror}); finished pieces are kept in "
                f"{str(out / WORK)!r}: free some space and run the same command again, or delete that folder"
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
    if packing != "full":
        needs["PAD"] = info.pad_id
    missing = [name for name, number in needs.items() if number < 0]
    if missing:
        raise DataError(
            f"the tokenizer has no {' and no '.join(missing)} token, which packing {packing!r} needs; "
            "use the tokenizer of an encoder (BERT, RoBERTa, …)"
        )
    dtype, beside = dtype_for(info.vocab_size), (packing != "full", packing == "masked")
    blocks_per_shard = blocks_for(shard_bytes, seq_len, dtype, rows_per_block, *beside)
    return Layout(seq_len, dtype, rows_per_block, blocks_per_shard, *beside)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One build a folder at a time; a second one waits and then finds the first one's result."""
    path = out / LOCK
    for _ in range(1000):  # the one before us may have failed, and left nothing behind: not as often as that
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except FileNotFoundError:
            continue
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # while we waited it was removed: others may hold the one that is there now
    else:
        raise DataError(f"{str(out)!r} cannot be written (it takes no file, as /proc); choose another folder")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _remove_if_empty(folder: Path) -> None:
    try:
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return
