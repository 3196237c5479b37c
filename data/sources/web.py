"""The source "webdataset": other people's tars, one text or one array of token ids a sample.

Options: field (which part of a sample: txt, json, npy or one ending in those; the first that fits by default),
text_field (the field of a json part), source_tokenizer (for token ids).

Tars are files or URLs (data.remote: its schemes, its retries), read once, front to back. `tarfile`, and `webdataset`
on top of it, takes a damaged header for the end of the archive (cpython#120740) and drops the rest without a word;
so a strict walk of our own sees every byte that goes by, and must find the same members. Nothing is executed: no
pipe:, no pickles, and of a sample only the chosen field is decoded.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from minilm.data.errors import DataError
from minilm.data.sources.plugin import Document, Plan, take
from minilm.data.sources.progress import tell
from minilm.data.sources.vocabulary import Mapper, from_tokenizer, needs_tokenizer
from minilm.data.storage.remote import Identity, Store, is_remote, split_url

KINDS = ("txt", "json", "npy")
_RECORD = 512


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    field, text_field, named = take(options, "webdataset", "field", "text_field", "source_tokenizer")
    paths = [_place(given) for given in inputs]
    if not paths:
        raise DataError("no tar was given; name at least one")
    identities = [_identity(path) for path in paths]
    first = next(_samples(paths[0], identities[0], Walk(paths[0])), None)
    if first is None:
        raise DataError(f"{paths[0]!r} holds no samples; give tars with text or token ids")
    field = field or next((name for name in first if name.rsplit(".", 1)[-1] in KINDS), None)
    if field not in first or field.rsplit(".", 1)[-1] not in KINDS:
        parts = ", ".join(name for name in first if not name.startswith("__"))
        raise DataError(
            f"{paths[0]!r} has no field {field!r} of kind {', '.join(KINDS)}; its samples have: {parts}"
        )
    if field.endswith("json") and text_field is None:
        text_field = _longest_field(paths[0], first[field])
    spec: dict[str, Any] = {
        "paths": paths,
        "identities": identities,
        "field": field,
        "text_field": text_field,
        "ids": None,
        "names": None,
    }
    note = f"text from part {field!r}" + (f", field {text_field!r}" if text_field else "")
    if field.endswith("npy"):
        if named is None:
            raise needs_tokenizer("webdataset")
        mapping = from_tokenizer(named, tokenizer)
        spec.update(ids=mapping.ids, names=mapping.names)
        note = f"token ids from part {field!r}, {mapping.note}"
    return Plan(spec, [[file] for file in range(len(paths))], paths, [f"{path}: {note}" for path in paths])


def read(spec: Any, unit: Any) -> Iterator[Document]:
    [file] = unit
    path, field = spec["paths"][file], spec["field"]
    mapper = Mapper(spec["ids"], spec["names"], path) if spec["ids"] is not None else None
    walk, seen = Walk(path), 0
    for position, sample in enumerate(_samples(path, spec["identities"][file], walk)):
        seen += sum(not name.startswith("__") for name in sample)
        if field not in sample:
            raise DataError(
                f"{path!r}, sample {sample['__key__']!r}: part {field!r} is missing; mend or remove it"
            )
        yield Document(file, position, _content(path, sample, field, spec["text_field"], mapper))
    if seen != walk.num_files:
        raise DataError(
            f"{path!r}: webdataset gave {seen} of its {walk.num_files} members; write the tar again"
        )


def _longest_field(path: str, raw: bytes) -> str | None:
    """The string field with the most text of the first record; None where records are plain strings."""
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path!r}: its first sample is not JSON ({error}); mend or remove it") from error
    if not isinstance(record, dict):
        return None
    texts = {name: len(value) for name, value in record.items() if isinstance(value, str)}
    if not texts:
        raise DataError(f"{path!r}: its first sample has no string field; name another part as `field`")
    return max(sorted(texts), key=lambda name: texts[name])


def _place(given: str | Path) -> str:
    """A local tar's path, or a URL."""
    text = str(given)
    if is_remote(text):
        Store(split_url(text)[0])  # refuses other schemes
        return text
    scheme = text.split(":", 1)[0] if ":" in text else ""
    if scheme and not Path(text).exists():
        raise DataError(f"{text!r}: scheme {scheme!r} is not read by the importer; give tar files or URLs")
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist; give tar files or URLs")
    return str(path)


def _identity(path: str) -> list[Any] | None:
    """Of a remote tar, so that all processes read the same object."""
    if not is_remote(path):
        return None
    folder, name = split_url(path)
    return list(Store(folder).identity(name))


def _open(path: str, identity: list[Any] | None) -> IO[bytes]:
    if identity is None:
        return Path(path).open("rb")
    folder, name = split_url(path)
    return Store(folder).open(name, Identity(*identity))


def _samples(path: str, identity: list[Any] | None, walk: "Walk") -> Iterator[dict[str, Any]]:
    """Samples as webdataset groups them: {"__key__": …, "txt": bytes, …}, nothing decoded; `walk` sees every byte."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    size = Path(path).stat().st_size if identity is None else identity[0]
    with _open(path, identity) as stream:
        walked = _Walked(stream, size, walk)
        try:
            yield from group_by_keys(tar_file_expander([{"url": path, "stream": walked}]))
        except DataError:  # webdataset writes into the texts of errors
            assert walked.error is not None
            raise walked.error from None
        except tarfile.ReadError as error:
            raise DataError(f"{path!r} is no tar, or is cut short ({error}); fetch it again") from error
        while walked.read(1 << 20):
            pass
        walk.finish()


class _Walked:
    """A stream whose bytes are seen by a `Walk`."""

    def __init__(self, stream: IO[bytes], size: int, walk: "Walk"):
        self._stream, self._size, self._walk = stream, size, walk
        self.error: DataError | None = None

    def read(self, size: int) -> bytes:
        try:
            raw = self._stream.read(size)
            self._walk.see(raw)
        except DataError as error:
            self.error = DataError(str(error))
            raise
        tell(self._walk.at / max(1, self._size))
        return raw


class Walk:
    """Checks every header of a tar as its bytes go by; `num_files` counts the regular files."""

    def __init__(self, path: str):
        self._path, self._header, self._member, self._ended = path, b"", "", False
        self._next = 0  # where the next header begins
        self.at = self.num_files = 0

    def see(self, raw: bytes) -> None:
        """The next bytes of the archive. DataError at a damaged header."""
        left = memoryview(raw)
        while left and not self._ended:
            if self.at < self._next:
                skipped = min(len(left), self._next - self.at)
                self.at, left = self.at + skipped, left[skipped:]
                continue
            taken = min(len(left), _RECORD - len(self._header))
            self._header += left[:taken]
            self.at, left = self.at + taken, left[taken:]
            self._next = self.at
            if len(self._header) == _RECORD:
                self._take_header()

    def _take_header(self) -> None:
        header, self._header = self._header, b""
        if header == bytes(_RECORD):
            self._ended = True
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(
                f"{self._path!r} is damaged at byte {self.at - _RECORD} ({error}); fetch it again"
            ) from error
        self._member = member.name
        self.num_files += member.isreg()
        self._next = self.at + -(-member.size // _RECORD) * _RECORD

    def finish(self) -> None:
        """All bytes were seen. DataError when that was not the end of the archive."""
        if not self._ended:
            raise DataError(
                f"{self._path!r} is cut short behind {self._member!r}, at byte {self.at}; fetch it again"
            )


def _content(
    path: str, sample: dict[str, Any], field: str, text_field: str | None, mapper: Mapper | None
) -> Any:
    raw: bytes = sample[field]
    try:
        if mapper is not None:
            tokens = np.load(io.BytesIO(raw), allow_pickle=False)
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"a row of integers is expected, got {tokens.dtype} {tokens.shape}")
            return mapper(tokens)
        text = raw.decode("utf-8")
        if field.rsplit(".", 1)[-1] == "txt":
            return text.strip()
        record = json.loads(text)
    except ValueError as error:
        place = f"{path!r}, sample {sample['__key__']!r}, part {field!r}"
        raise DataError(f"{place}: {error}; mend or remove it") from error
    if isinstance(record, dict):
        record = record.get(text_field)
    return record.strip() if isinstance(record, str) else ""
