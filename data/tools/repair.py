"""Replaces damaged files of a data set, from a copy of it or by building it again.

Whatever replaces a file is checked against the manifest before it takes the name. build.json and the reports tell of
one build, so they are replaced together.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minilm.data.builder.build import import_data
from minilm.data.builder.report import REPORT, REPORT_FILES
from minilm.data.errors import DataError
from minilm.data.format.files import copy_tree, replacing, replacing_folder
from minilm.data.format.manifest import BUILD_FILE, HELD_OUT, MANIFEST, TOKENIZER, load_manifest
from minilm.data.storage.remote import TOKENIZER_FILES, Store, is_remote
from minilm.data.tools.verify import verify

_REPAIR = ".repair"
_OF_THE_BUILD = {BUILD_FILE, *(f"{REPORT}/{name}" for name in REPORT_FILES)}


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
    mirror: str | Path | None = None,
    inputs: Iterable[str | Path] | None = None,
    processes: int | None = None,
) -> RepairReport:
    """Replace damaged files by those of `mirror` (a copy of the data set, in a folder or behind a URL), or by those of
    a new build from the same text.

    Without a mirror the text is read from where it was (or from `inputs`). Nothing is replaced unless the replacement
    has the pinned hash. DataError if there is none.
    """
    folder = Path(folder)
    report = verify(folder)
    if report.whole:
        return RepairReport(str(folder), "", [])
    rebuilt = folder / _REPAIR
    source = rebuilt if mirror is None or is_remote(mirror) else Path(mirror)
    names = sorted({damage.file for damage in report.damage})
    if _OF_THE_BUILD & set(names):
        names = sorted({*names, *_OF_THE_BUILD})
    try:
        if mirror is None:
            _build_again(folder, rebuilt, inputs, processes, _whole_tokenizer(folder, names))
        elif is_remote(mirror):
            _fetch(str(mirror), folder, names, rebuilt)
        _same_data(folder, source)
        for name in names:
            _replace(source / name, folder / name)
    finally:
        shutil.rmtree(rebuilt, ignore_errors=True)
    left = verify(folder)
    if not left.whole:
        raise DataError(
            f"{str(source)!r} is damaged too: {left.damage[0].text()}; its undamaged files were taken; "
            "name another mirror for the rest"
        )
    return RepairReport(str(folder), "a new build" if mirror is None else str(mirror), names)


def _fetch(url: str, folder: Path, names: list[str], into: Path) -> None:
    """Fetch the manifest and these files of the copy behind `url`; shards must have the hashes that `folder` pins."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    store = Store(url)
    (into / MANIFEST).write_bytes(store.read(MANIFEST))
    _same_data(folder, into)
    splits = [split for split in (Path(), Path(HELD_OUT)) if (folder / split / MANIFEST).exists()]
    shards = {
        str(split / shard.name): shard for split in splits for shard in load_manifest(folder / split).shards
    }
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        if name in shards:
            store.fetch(name, shards[name].num_bytes, shards[name].sha256, into / name)
        elif Path(name).name == TOKENIZER:
            (into / name).mkdir()
            for file in TOKENIZER_FILES:
                (into / name / file).write_bytes(store.read(f"{name}/{file}"))
        else:
            (into / name).write_bytes(store.read(name))


def _whole_tokenizer(folder: Path, damaged: list[str]) -> Path:
    """The copy of the tokenizer that a new build may use: beside the data, or beside their held-out split."""
    for split in (Path(), Path(HELD_OUT)):
        name = str(split / TOKENIZER)
        hurt = any(file == name or file.startswith(f"{name}/") for file in damaged)
        if not hurt and (folder / name).is_dir():
            return (folder / name).absolute()
    raise DataError(f"{str(folder)!r} holds no whole tokenizer to build with; name a whole copy as mirror")


def _build_again(
    folder: Path, out: Path, inputs: Iterable[str | Path] | None, processes: int | None, tokenizer: Path
) -> None:
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
    options["special_tokens"] = arguments.get("special_tokens", "tokens")  # of before there was a choice
    options["language"] = arguments.get("language", "en")
    import_data(list(inputs or files), str(tokenizer), out, processes=processes, allow_skipped=1.0, **options)


def _same_data(folder: Path, source: Path) -> None:
    wanted, found = load_manifest(folder).fingerprint, load_manifest(source).fingerprint
    if wanted != found:
        raise DataError(
            f"{str(source)!r} holds other data ({found[:16]}) than {str(folder)!r} ({wanted[:16]}); "
            "repair needs a copy of the same data set, or the same text"
        )


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_dir():
            with replacing_folder(target) as folder:
                copy_tree(source, folder)
        else:
            with source.open("rb") as there, replacing(target) as file:
                shutil.copyfileobj(there, file, 1 << 20)
    except FileNotFoundError as error:
        raise DataError(f"{str(source)!r} is missing there too; name another mirror") from error
