"""What a file is by its first bytes, where that is neither text nor something that is read."""

from pathlib import Path

from minilm.data.errors import DataError

_BEGINS = {
    b"\x1f\x8b\x08": "packed with gzip once more",
    b"\xfd7zXZ\x00": "packed with xz once more",
    b"\x28\xb5\x2f\xfd": "packed with zstd once more",
    b"BZh91AY&SY": "packed with bzip2 once more",
    b"\x04\x22\x4d\x18": "packed with lz4",
    b"\xff\x06\x00\x00sNaPpY": "packed with snappy",
    b"\x1f\x9d": "packed with compress",
    b"LZIP\x01": "packed with lzip",
    b"\x5d\x00\x00\x80\x00\xff": "packed with lzma (the old format)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PK\x03\x04": "a zip archive (also .docx, .xlsx, .epub, .npz)",
    b"PK\x05\x06": "an empty zip archive",
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF87a": "a GIF picture",
    b"GIF89a": "a GIF picture",
    b"%PDF-": "a PDF",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office document",
    b"ARROW1\x00\x00": "an arrow file (name it .arrow)",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x7fELF": "a program",
    b"OggS\x00": "an Ogg recording",
    b"fLaC\x00": "a FLAC recording",
    b"MMIDIDX\x00": "an index of Megatron or fairseq",
    b"TNTIDX\x00": "an index of fairseq",
}


def what_it_is(begin: bytes) -> str | None:
    """What the first bytes (262 are enough) of a file say that it is, None for what may be text."""
    if begin.startswith(b"PAR1\x15"):
        return "a parquet file"
    if begin[:4] == b"RIFF" and begin[8:12] in (b"WAVE", b"WEBP", b"AVI "):
        return "a picture or recording (RIFF)"
    if begin[257:262] == b"ustar":
        return "a tar archive"
    if begin[:1] == b"\x80" and begin[1:2] in b"\x02\x03\x04\x05" and len(begin) > 1:
        return "a pickle, which is never loaded"
    return next((what for magic, what in _BEGINS.items() if begin.startswith(magic)), None)


def is_parquet(path: Path) -> bool:
    """By both its ends: its name, and the length of the footer before the name."""
    with path.open("rb") as file:
        if file.read(4) != b"PAR1" or (size := file.seek(0, 2)) < 12:
            return False
        file.seek(-8, 2)
        end = file.read()
    return end[4:] == b"PAR1" and int.from_bytes(end[:4], "little") <= size - 12


def refuse_other(begin: bytes, path: str) -> None:
    """DataError where the (unpacked) beginning of a text file is that of something else."""
    what = what_it_is(begin)
    if what == "a tar archive":
        raise DataError(f"text {path!r} is {what}; import it with: minilm data import --from webdataset")
    if what is not None:
        raise DataError(
            f"text {path!r} is {what}, not what its name says; take it out, or write its text to a file"
        )
