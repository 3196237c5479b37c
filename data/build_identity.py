"""Is a folder's data set the one that these arguments over these files would give?

`build.json` beside a manifest keeps the arguments and, for every input, path, size, time and content hash. Untouched
inputs are recognized without reading them; moved or copied ones by their content.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from data.errors import DataError
from data.manifest import MANIFEST, load_manifest
from data.report import BuildReport

BUILD_FILE = "build.json"


def stamps_of(paths: list[str]) -> list[dict[str, Any]]:
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


def same_text(paths: list[str], stamps: list[dict[str, Any]]) -> bool:
    """Is the text the one that `stamps` tell of? Untouched files are not read; moved or copied ones are."""
    if len(paths) != len(stamps):
        return False
    stats = [Path(path).stat() for path in paths]
    if [stat.st_size for stat in stats] != [stamp["bytes"] for stamp in stamps]:
        return False
    now = [(path, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    if now == [(stamp["path"], stamp["time"]) for stamp in stamps]:
        return True
    return [stamp["content"] for stamp in stamps_of(paths)] == [stamp["content"] for stamp in stamps]


def finished_build(out: Path, arguments: dict[str, Any], paths: list[str]) -> BuildReport | None:
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
    if not differs and not same_text(paths, stamps):
        differs = ["text"]
    if not differs and report.fingerprint != manifest.fingerprint:
        differs = ["manifest"]
    if differs:
        raise DataError(
            f"{str(out)!r} holds a data set built differently ({', '.join(differs)} changed); "
            "choose another folder, or delete that one to build it again"
        )
    return report
