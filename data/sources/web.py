"""The source "webdataset": other people's tars, one text or one array of token ids a sample.

Options: field (which part of a sample: txt, json, npy or one ending in those; the first that fits by default),
text_field (the field of a json part), source_tokenizer (for token ids).

A tar is walked once by our own strict reader first: `tarfile`, and `webdataset` on top of it, takes a damaged header
for the end of the archive (cpython#120740) and drops the rest without a word. Local files only; nothing is
executed: no pipe:, no pickles, and of a sample only the chosen field is decoded.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.sources.plugin import Document, Plan, take
from data.sources.vocabulary import Mapper, from_tokenizer, needs_tokenizer

KINDS = ("txt", "json", "npy")
_RECORD = 512


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    field, text_field, named = take(options, "webdataset", "field", "text_field", "source_tokenizer")
    paths = [_local_tar(given) for given in inputs]
    if not paths:
        raise DataError("no tar was given; name at least one")
    first = next(_samples(paths[0]), None)
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
    num_members, seen = count_members(path), 0
    for position, sample in enumerate(_samples(path)):
        seen += sum(not name.startswith("__") for name in sample)
        if field not in sample:
            raise DataError(
                f"{path!r}, sample {sample['__key__']!r}: part {field!r} is missing; mend or remove it"
            )
        yield Document(file, position, _content(path, sample, field, spec["text_field"], mapper))
    if seen != num_members:
        raise DataError(f"{path!r}: webdataset gave {seen} of its {num_members} members; write the tar again")


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


def _local_tar(given: str | Path) -> str:
    text = str(given)
    scheme = text.split(":", 1)[0] if ":" in text else ""
    if scheme and not Path(text).exists():
        raise DataError(f"{text!r}: scheme {scheme!r} is not read by the importer; give local tar files")
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist; give local tar files")
    return str(path)


def _samples(path: str) -> Iterator[dict[str, Any]]:
    """Samples as webdataset groups them: {"__key__": …, "txt": bytes, …}, nothing decoded."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with Path(path).open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))


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


def count_members(path: str) -> int:
    """Regular files in a tar, every header checked. DataError says where the archive is damaged or cut short."""
    count, at = 0, 0
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        while True:
            header = file.read(_RECORD)
            if header == bytes(_RECORD):
                return count
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise DataError(
                    f"{path!r} is damaged at byte {at} ({error or 'cut short'}); fetch it again"
                ) from error
            count += member.isreg()
            at += _RECORD + -(-member.size // _RECORD) * _RECORD
            if at > size:
                raise DataError(
                    f"{path!r} is cut short inside {member.name!r}, at byte {size}; fetch it again"
                )
            file.seek(at)
