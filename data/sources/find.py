"""Which files the inputs of a build name, and what of their folders is left out, and why.

Folders are walked in the order of names. Links are followed; no folder and no file is taken twice, so loops end. Left
out are hidden files and folders, unknown endings, empty files, broken links, and what a build itself has written. A
file that is named itself is read or refused, whatever it is called. Any bytes are a file name (surrogateescape).
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minilm.data.errors import DataError, one_line
from minilm.data.format.manifest import BUILD_FILE, CHECKSUMS, HELD_OUT, MANIFEST, TOKENIZER

FORMATS = {".txt": "txt", ".text": "txt", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
FORMATS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
PACKERS = (".gz", ".xz", ".zst", ".bz2")
HIDDEN, UNKNOWN, EMPTY, BROKEN = "hidden", "unknown ending", "empty (0 bytes)", "broken link"
TWICE, BUILT, NO_FILE = "the same as one taken before", "written by a build", "no regular file"
METADATA, UNLISTED = "metadata of a saved data set", "not named in the state.json beside it"
_BUILT = {MANIFEST, BUILD_FILE, CHECKSUMS, TOKENIZER, HELD_OUT, "report"}
# Of the library `datasets`, which saves arrow files …
_METADATA = {"dataset_dict.json", "dataset_infos.json"}
_SAVED = {"state.json", "dataset_info.json"}  # … beside these two, and later caches what it computes there
_NAMED = 3


class Found(NamedTuple):
    """`files`: absolute, in order, each once. `left_out`: (path, reason), the reasons being those above."""

    files: list[Path]
    left_out: list[tuple[str, str]]


def find_files(inputs: Sequence[str | Path]) -> Found:
    """The text files that `inputs` (files, folders, glob patterns) name. DataError for an input that gives none."""
    walk = Walk(lambda path: format_of(path) is not None)
    for given in inputs:
        path, taken = at_home(given), walk.taken
        try:
            is_file, is_folder = path.is_file(), path.is_dir()
        except OSError as error:  # such as a name that is too long
            raise DataError(
                f"text {str(given)!r} cannot be read ({error.strerror}); give files, folders or patterns that match "
                "text files and may be read"
            ) from error
        if is_file and format_of(path) is None:
            raise DataError(
                f"text {str(given)!r} has an ending that is not known; allowed: {_endings()}; rename it"
            )
        if is_file:
            walk.file(path)
        else:
            for match in [path] if is_folder else _glob(path):
                walk.below(match)
        if walk.taken == taken:
            raise DataError(_nothing(given, path, walk.left_out))
    if not inputs:
        raise DataError("no text was given; name at least one file, folder or pattern")
    if not walk.files:
        raise DataError(
            f"text {str(inputs[0])!r} is {EMPTY}, and so is all that was given; give a file with text in it"
        )
    return Found(walk.files, walk.left_out)


class Walk:
    """Files as they are met; `knows` says of a path in a folder whether it is read. `taken` counts the files that are
    read, or are nothing but empty or a repetition."""

    def __init__(self, knows: Callable[[Path], bool]):
        self.files: list[Path] = []
        self.left_out: list[tuple[str, str]] = []
        self.taken = 0
        self._knows = knows
        self._met: dict[tuple[int, int], Path] = {}

    def below(self, top: Path) -> None:
        """All of a folder, or a file as if it was met in one."""
        stack = [top]
        while stack:
            path = stack.pop()
            try:
                found = path.stat()
                if not stat.S_ISDIR(found.st_mode):
                    self._met_file(path, found)
                elif not self._again(path, found):
                    stack += reversed([path / name for name in self._names(path)])
            except OSError as error:
                if not path.is_symlink():
                    raise DataError(_unreadable(path, error.strerror or "no reason given")) from error
                self.left_out.append((str(path), BROKEN))

    def file(self, path: Path) -> None:
        found = path.stat()
        if not os.access(path, os.R_OK, effective_ids=True):
            raise DataError(_unreadable(path, "permission denied"))
        if found.st_size == 0:
            self.left_out.append((str(path), EMPTY))
            self.taken += 1
        elif not self._again(path, found):
            self.files.append(path.absolute())
            self.taken += 1

    def _met_file(self, path: Path, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            self.left_out.append((str(path), NO_FILE))
        elif not self._knows(path):
            self.left_out.append((str(path), UNKNOWN))
        else:
            self.file(path)

    def _again(self, path: Path, found: os.stat_result) -> bool:
        """Was this file or folder met before, under any name?"""
        first = self._met.setdefault((found.st_dev, found.st_ino), path)
        if first is path:
            return False
        self.taken += 1
        if first.absolute() != path.absolute():
            self.left_out.append((str(path), TWICE))
        return True

    def _names(self, folder: Path) -> list[str]:
        """What of a folder is looked at."""
        names = sorted(entry.name for entry in folder.iterdir())
        of_build = ".build" in names or {MANIFEST, CHECKSUMS} <= set(names)
        saved = set(names) >= _SAVED
        listed = _listed(folder, names) if saved else None
        looked_at = []
        for name in names:
            if of_build and (name in _BUILT or name == ".build" or name.startswith("shard-")):
                self.left_out.append((str(folder / name), BUILT))
            elif name.startswith("."):
                self.left_out.append((str(folder / name), HIDDEN))
            elif name in _METADATA or saved and (name in _SAVED or name.startswith("cache-")):
                self.left_out.append((str(folder / name), METADATA))
            elif listed is not None and name.endswith(".arrow") and name not in listed:
                self.left_out.append((str(folder / name), UNLISTED))
            else:
                looked_at.append(name)
        return looked_at


def _listed(folder: Path, names: Sequence[str]) -> set[str]:
    """The files that make up a data set saved by the library `datasets`. DataError where one is not there, or where the
    data set is a selection of their rows, which only that library makes."""
    place = folder / "state.json"
    try:
        state = json.loads(place.read_bytes())
        listed = {str(file["filename"]) for file in state["_data_files"]}
        is_selection = bool(state.get("_indices_data_files"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{str(place)!r} is damaged or of another version ({one_line(error)}); save it again"
        ) from error
    if is_selection:
        raise DataError(
            f"{str(folder)!r} is a selection of rows of its files; save it again by load_from_disk, flatten_indices "
            "and save_to_disk of the library datasets"
        )
    if missing := sorted(listed - set(names)):
        raise DataError(f"{str(folder)!r} lacks {missing[0]!r}, which its state.json names; fetch it again")
    return listed


def at_home(given: str | Path) -> Path:
    """A path as a shell has it: `~` and `~user` are home folders, `~$report.txt` is a name like any other."""
    return Path(os.path.expanduser(given))  # noqa: PTH111 (Path.expanduser raises for a user that is not there)


def summary(left_out: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason: how many, and the first of them by name."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason, []).append(path)
    lines = []
    for reason, paths in by_reason.items():
        what = reason
        if reason == UNKNOWN:
            endings = Counter(_ending(Path(path)) for path in paths).most_common()
            what += f" ({', '.join(f'{shown(e)} {n:,}' for e, n in endings[:8])}{', …' if len(endings) > 8 else ''})"
        named = ", ".join(map(shown, paths[:_NAMED])) + (", …" if len(paths) > _NAMED else "")
        lines.append(f"left out, {what}: {len(paths):,} ({named})")
    return lines


def changed(path: str) -> DataError:
    return DataError(
        f"{path!r} changed while it was read (its size or time is another); run the same command again when nothing "
        "writes to it"
    )


def shown(name: str) -> str:
    """A file's name for a line of text, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)


def format_of(path: Path) -> tuple[str, str | None] | None:
    """The format that a file's ending names, and the ending of its packer; None for an ending that is not known."""
    packer = path.suffix if path.suffix.lower() in PACKERS else None
    inner = Path(path.stem).suffix if packer else path.suffix
    kind = FORMATS.get(inner.lower())
    return (kind, packer) if kind and not (packer and kind in ("parquet", "arrow")) else None


def _ending(path: Path) -> str:
    count = 2 if path.suffix.lower() in PACKERS else 1
    return "".join(path.suffixes[-count:]) or "none"


def _unreadable(path: Path, why: str) -> str:
    return f"{str(path)!r} cannot be read ({why}); change its permissions or move it away"


def _endings() -> str:
    return f"{' '.join(sorted(FORMATS))}, each also with {' '.join(PACKERS)}"


def _nothing(given: str | Path, path: Path, left_out: list[tuple[str, str]]) -> str:
    if path.is_symlink() and not path.exists():
        return f"text {str(given)!r} is a broken link to {str(path.readlink())!r}; mend the link"
    if path.is_dir():
        why = "".join(f"; {line}" for line in summary(left_out))
        return f"text {str(given)!r} holds no text files{why}; allowed: {_endings()}"
    if path.exists():
        return f"text {str(given)!r} is no regular file; write what it gives into a file first"
    return f"text {str(given)!r} does not exist; give files, folders or patterns that match text files"


def _glob(pattern: Path) -> Iterator[Path]:
    """What a pattern matches, in order; hidden names only where the pattern begins one with a dot, as in a shell."""
    if not any(c in str(pattern) for c in "*?["):
        return
    anchor = Path(pattern.anchor) if pattern.anchor else Path()
    inner = str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern)
    hidden = sum(part.startswith(".") for part in Path(inner).parts)
    for match in sorted(anchor.glob(inner)):
        if sum(part.startswith(".") for part in match.relative_to(anchor).parts) <= hidden:
            yield match
