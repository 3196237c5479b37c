"""The phases of one build, in order: tokenize, sort, write, publish.

Every task leaves a small result file when it is done; a build that was killed goes on from those. Until the
manifest appears, the folder holds nothing but `.build`, and a reader says that there is no data set.
"""

import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from minilm.data.builder.enough import no_text, too_little
from minilm.data.builder.fingerprint import check_unchanged
from minilm.data.builder.local_pool import Task, run_tasks
from minilm.data.builder.ray_pool import run_tasks_on_ray
from minilm.data.builder.report import REPORT, REPORT_FILES, BuildReport, make_report, save_report
from minilm.data.builder.work import SPLITS, Work, _whole, save_json, save_work
from minilm.data.errors import DataError
from minilm.data.format.files import copy_tree, is_temporary, sweep
from minilm.data.format.manifest import (
    BUILD_FILE,
    CHECKSUMS,
    HELD_OUT,
    MANIFEST,
    TOKENIZER,
    Manifest,
    TokenizerInfo,
    pin_of,
    save_manifest,
    sha256_of,
    with_pins,
)
from minilm.data.format.pack import content_len
from minilm.data.format.seal import sealed
from minilm.data.sources.accounts import Accounts, books_of
from minilm.data.sources.plugin import Plan
from minilm.data.sources.progress import ProgressListener

WORK = ".build"
_BUCKET_TOKENS = 1 << 25
_PHASES = {"tokenize": (0.0, 0.85), "sort": (0.85, 0.92), "write": (0.92, 1.0)}


class BuildProgress(NamedTuple):
    """Where a build is: `phase` is tokenize, sort or write; `done` of `total` tasks of the phase; `share`
    0..1 of all. Share, documents and tokens count parts of tasks under way too, as far as they tell."""

    phase: str
    done: int
    total: int
    share: float
    documents: int
    tokens: int
    seconds: float
    seconds_left: float


Progress = Callable[[BuildProgress], None]


class BuildRun:
    """The phases of one build, in order; `folder` is OUT/.build."""

    def __init__(
        self,
        out: Path,
        work: Work,
        plan: Plan,
        info: TokenizerInfo,
        processes: int,
        progress: Progress | None,
        on_ray: bool,
        allow_skipped: float | None,
    ):
        self.out, self.folder, self.work, self.info = out, out / WORK, work, info
        self.plan, self.allow_skipped = plan, allow_skipped
        self.processes, self.progress, self.on_ray = processes, progress, on_ray
        self.started, self.share_at_start = time.monotonic(), -1.0
        self.documents = self.tokens = 0
        self.tokenize_seconds = 0.0

    def prepare(self, saved: dict[str, Any], tokenizer: Any) -> None:
        """Go on in `.build` when it belongs to the same build, else start it anew."""
        self.saved = saved
        key_file = self.folder / "key.json"
        key = {**saved, "files": [stamp["content"] for stamp in saved["files"]]}
        key["plan"] = xxhash.xxh3_128_hexdigest(json.dumps(self.work._asdict()).encode())
        if key_file.exists():
            if (before := json.loads(key_file.read_text())) == key:
                return
            self._remove_published(bool(before["held_out"]))
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("runs", "buckets", "results", *SPLITS):
            (self.folder / name).mkdir(parents=True)
        _save_tokenizer(tokenizer, self.folder / TOKENIZER)
        save_work(self.folder, self.work)
        save_json(key_file, key)

    def _remove_published(self, held_out: bool) -> None:
        """What another build had moved into place when it was killed, the manifest being the last."""
        for path in (*self.out.glob("shard-*.tar"), self.out / CHECKSUMS):
            path.unlink(missing_ok=True)
        if held_out:
            shutil.rmtree(self.out / HELD_OUT, ignore_errors=True)

    def run(self) -> BuildReport:
        before = time.monotonic()
        counts = self._phase("tokenize", [{"unit": unit} for unit in range(len(self.work.units))])
        self.tokenize_seconds = time.monotonic() - before
        total = {
            name: sum(count[name] for count in counts)
            for name in ("documents", "tokens", "unknown", "held_out")
        }
        accounts = Accounts.sum_of(count["accounts"] for count in counts)
        inputs = accounts.named(self.work.names or [])
        books_of(inputs).refuse(self.allow_skipped)
        if not total["documents"]:
            raise DataError(no_text(self.plan.files))
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
            self.plan.notes,
            inputs,
            dict(Counter(reason for _, reason in self.plan.left_out)),
        )
        check_unchanged(self.saved["files"])
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
        bucket_rows = [bucket["pieces"] for bucket in buckets]
        if self.work.packing == "full":
            num_rows = sum(streams) // content_len(layout.seq_len)
        else:
            num_rows = sum(bucket_rows)
        if not num_rows:
            raise DataError(
                too_little(split, sum(streams), sum(b["documents"] for b in buckets), layout.seq_len)
            )
        num_shards = -(-num_rows // (layout.rows_per_block * layout.blocks_per_shard))
        rows = {"num_rows": num_rows, "streams": streams, "bucket_rows": bucket_rows}
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
        under_way: dict[int, ProgressListener] = {}

        def tick() -> None:
            self._tell(name, len(results), len(tasks), list(under_way.values()))

        tick()
        todo: list[Task] = [(name, {"folder": str(self.folder), **tasks[index]}) for index in left]
        ended = (
            run_tasks_on_ray(todo, tick) if self.on_ray else run_tasks(todo, self.processes, under_way, tick)
        )
        for index, result in ended:
            results[left[index]] = result
            save_json(paths[left[index]], result)
            if name == "tokenize":
                self._count(result)
            tick()
        return [results[index] for index in range(len(tasks))]

    def _count(self, result: dict[str, int]) -> None:
        self.documents += result["documents"]
        self.tokens += result["tokens"]

    def _tell(self, phase: str, done: int, total: int, under_way: list[ProgressListener]) -> None:
        low, high = _PHASES[phase]
        parts = done + sum(told["share"] for told in under_way)
        share = low + (high - low) * parts / max(1, total)
        if self.share_at_start < 0:
            self.share_at_start = share
        if self.progress is not None:
            seconds = time.monotonic() - self.started
            gained = share - self.share_at_start
            left = seconds * (1 - share) / gained if gained > 0 else math.nan
            documents, tokens = (
                have + sum(int(told[name]) for told in under_way)
                for name, have in (("documents", self.documents), ("tokens", self.tokens))
            )
            self.progress(BuildProgress(phase, done, total, share, documents, tokens, seconds, left))

    def _publish(self, manifests: dict[str, Manifest], report: BuildReport) -> None:
        """Move everything into place; the held-out data set first, the main manifest last."""
        for split in reversed(manifests):
            target = self.out if split == "train" else self.out / HELD_OUT
            target.mkdir(exist_ok=True)
            sweep(target)
            shutil.rmtree(target / TOKENIZER, ignore_errors=True)
            copy_tree(self.folder / TOKENIZER, target / TOKENIZER)
            for path in sorted((self.folder / split).iterdir()):
                if path.name != MANIFEST and not is_temporary(path):  # such as a killed build has left
                    path.replace(target / path.name)
            if split == "train":
                save_report(report, self.work.layout.seq_len, self.out / REPORT)
                _whole(self.out / BUILD_FILE, [sealed(self._saved_build(report))])
            save_manifest(with_pins(manifests[split], target), self.folder / split / MANIFEST)
            os.sync()
            (self.folder / split / MANIFEST).replace(target / MANIFEST)
        shutil.rmtree(self.folder)

    def _saved_build(self, report: BuildReport) -> dict[str, Any]:
        arguments = {name: value for name, value in self.saved.items() if name != "files"}
        pins = {f"{REPORT}/{name}": sha256_of(self.out / REPORT / name) for name in REPORT_FILES}
        told = {"files": self.saved["files"], "report": report.as_dict(), "pins": pins}
        return {"arguments": arguments, **told}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust side raises plain Exception("… (os error 28)")
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error
