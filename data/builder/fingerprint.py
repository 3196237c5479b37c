"""Is a folder's data set the one that these arguments over these files would give?

`build.json` beside a manifest keeps the arguments and, for every input, path, size, time and content hash. Untouched
inputs are recognized without reading them; moved or copied ones by their content.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from minilm.data.builder.report import BuildReport
from minilm.data.errors import DataError
from minilm.data.format.manifest import BUILD_FILE, MANIFEST, load_manifest
from minilm.data.sources.find import changed
from minilm.data.storage.remote import Identity, Store, is_remote, split_url


def stamps_of(paths: list[str]) -> list[dict[str, Any]]:
    """Path, size, time and content hash of every input; of a remote one what its server says instead of the hash."""
    stamps = []
    for path in paths:
        if is_remote(path):
            size, tag = _remote_identity(path)
            stamps.append({"path": path, "bytes": size, "time": tag, "content": f"{size} {tag}"})
            continue
        stat = Path(path).stat()  # before its bytes: what changes from here on is found at the end
        digest = xxhash.xxh3_128()
        with Path(path).open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        stamps.append(
            {"path": path, "bytes": stat.st_size, "time": stat.st_mtime_ns, "content": digest.hexdigest()}
        )
    return stamps


def same_text(paths: list[str], stamps: list[dict[str, Any]]) -> bool:
    """Is the text the one that `stamps` tell of? Untouched files are not read; moved or copied ones are."""
    if len(paths) != len(stamps):
        return False
    stats = [_remote_identity(path) if is_remote(path) else _local_identity(path) for path in paths]
    if [num_bytes for num_bytes, _ in stats] != [stamp["bytes"] for stamp in stamps]:
        return False
    now = [(path, time) for path, (_, time) in zip(paths, stats, strict=True)]
    if now == [(stamp["path"], stamp["time"]) for stamp in stamps]:
        return True
    return [stamp["content"] for stamp in stamps_of(paths)] == [stamp["content"] for stamp in stamps]


def check_unchanged(stamps: list[dict[str, Any]]) -> None:
    """DataError for a local file whose size or time is not the stamped one; remote ones are read by identity."""
    for stamp in stamps:
        path = stamp["path"]
        if not is_remote(path) and (
            not Path(path).exists() or _local_identity(path) != (stamp["bytes"], stamp["time"])
        ):
            raise changed(path)


def _local_identity(path: str) -> tuple[int, int]:
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def _remote_identity(url: str) -> Identity:
    folder, name = split_url(url)
    return Store(folder).identity(name)


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
    differs = [name for name in {**arguments, **before} if before.get(name) != arguments.get(name)]
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
