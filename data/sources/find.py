"""Which files the inputs of a build name, and what their endings say of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from minilm.data.errors import DataError

FORMATS = {".txt": "txt", ".text": "txt", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
FORMATS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKERS = (".gz", ".xz", ".zst", ".bz2")


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs` (files, folders, glob patterns) name, in the order given, each once."""
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and format_of(p) is not None)
        else:
            matches = sorted(p for p in _glob(path) if p.is_file())
        if not matches:
            raise DataError(
                f"text {str(given)!r} does not exist; give files, folders or patterns that match text files"
            )
        for match in matches:
            if format_of(match) is None:
                allowed = " ".join(sorted(FORMATS))
                raise DataError(
                    f"text {str(match)!r} has an ending that is not known; allowed: {allowed}, "
                    f"each also with {' '.join(PACKERS)}"
                )
            found[match.absolute()] = None
    if not found:
        raise DataError("no text was given; name at least one file, folder or pattern")
    return list(found)


def format_of(path: Path) -> tuple[str, str | None] | None:
    """The format that a file's ending names, and the ending of its packer; None for an ending that is not known."""
    packer = path.suffix if path.suffix in PACKERS else None
    inner = Path(path.stem).suffix if packer else path.suffix
    kind = FORMATS.get(inner.lower())
    return (kind, packer) if kind and not (packer and kind == "parquet") else None


def _glob(pattern: Path) -> Iterator[Path]:
    if not any(c in str(pattern) for c in "*?["):
        return iter(())
    anchor = Path(pattern.anchor) if pattern.anchor else Path()
    return anchor.glob(str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern))
