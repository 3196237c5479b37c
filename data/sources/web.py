"""The source "webdataset": other people's tars, one text or one array of token ids a sample.

Options: field (which part of a sample: one named txt, text, caption, json or npy, or ending in those), text_field (the
field of a json part), source_tokenizer (for token ids).

Tars are files, also packed ones, folders of them, or URLs (data.storage.remote: its schemes, its retries). Members of
one key, the name up to its first dot, that follow one another are a sample, as webdataset has it. The text is the first
that the samples have of the parts txt, text, caption, json (there text, txt, content, caption, …, then the one field
that reads like prose), npy; where that leaves a choice the import asks. Folders, devices, hidden files, names without
an ending and README's are no samples, and are counted. A text that is a link or a sparse file is an
error; a sample that lacks it is left out and counted.
Nothing is executed: no pipe:, no pickles, and of a sample only the chosen field is decoded.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from minilm.data.errors import DataError
from minilm.data.records.fields import TEXT_FIELDS, WrongType, like_prose, text_of
from minilm.data.sources.accounts import LeftOut, Noticed
from minilm.data.sources.find import Walk, at_home, summary
from minilm.data.sources.plugin import Document, Item, Plan, take
from minilm.data.sources.progress import tell
from minilm.data.sources.tar_members import Member, members
from minilm.data.sources.unpack import unpacked_stream
from minilm.data.sources.vocabulary import Mapper, from_tokenizer, needs_tokenizer
from minilm.data.storage.remote import Identity, Store, is_remote, split_url

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.zst", ".tar.bz2", ".tbz2")  # in folders
_TEXT = ("txt", "text", "caption")
KINDS = (*_TEXT, "json", "npy")  # in the order in which they are preferred
_LOOKED_AT, _LOOKED_AT_REMOTE = 64, 4  # samples, to choose the text by
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_ABOUT = {"readme", "license", "licence", "notice", "changelog", "citation"}


class Sample(NamedTuple):
    """`parts`: the members of one key by what follows its first dot; `contents`: the bytes of those that were read."""

    key: str
    parts: dict[str, Member]
    contents: dict[str, bytes]


class Counts:
    """What a walk over a tar has met: samples, members that are none, and archives one after another."""

    def __init__(self) -> None:
        self.samples = self.archives = 0
        self.left_out: list[str] = []

    def text(self) -> str:
        told = [f"{self.samples} samples"]
        if self.archives > 1:
            told.append(f"{self.archives} archives one after another")
        if self.left_out:
            named = ", ".join(self.left_out[:3]) + (", …" if len(self.left_out) > 3 else "")
            told.append(f"{len(self.left_out)} members that are no samples left out ({named})")
        return ", ".join(told)


def plan(inputs: Sequence[str | Path], tokenizer: Any, options: dict[str, Any]) -> Plan:
    field, text_field, named = take(options, "webdataset", "field", "text_field", "source_tokenizer")
    places, left_out = _places(inputs)
    paths, notes = _once(places)
    if not paths:
        raise DataError("no tar was given; name at least one")
    identities = [_identity(path) for path in paths]
    looked_at: list[Sample] = []
    path = paths[0]
    for path, identity in zip(paths, identities, strict=True):
        count = _LOOKED_AT if identity is None else _LOOKED_AT_REMOTE
        looked_at = list(islice(_samples(path, identity, KINDS, Counts()), count))
        if looked_at:
            break
    else:
        raise DataError(f"{paths[0]!r} holds no samples; give tars with text or token ids")
    field = _choose_part(path, looked_at, field)
    example = ""
    if _kind(field) == "json":
        text_field, example = _choose_field(path, looked_at, field, text_field)
    elif _kind(field) in _TEXT:
        example = _example(looked_at, field)
    spec: dict[str, Any] = {
        "paths": paths,
        "identities": identities,
        "field": field,
        "text_field": text_field,
        "ids": None,
        "names": None,
    }
    note = f"text from part {field!r}" + (f", field {text_field!r}" if text_field else "")
    note += f", such as {example!r}" if example else ""
    if _kind(field) == "npy":
        if named is None:
            raise needs_tokenizer("webdataset")
        mapping = from_tokenizer(named, tokenizer)
        spec.update(ids=mapping.ids, names=mapping.names)
        note = f"token ids from part {field!r}, {mapping.note}"
    told = [f"{path}: {note}{_walked(path)}" for path in paths]
    notes = told + notes + summary(left_out)
    return Plan(spec, [[file] for file in range(len(paths))], paths, notes, left_out=left_out)


def read(spec: Any, unit: Any) -> Iterator[Item]:
    [file] = unit
    path, field = spec["paths"][file], spec["field"]
    mapper = Mapper(spec["ids"], spec["names"], path) if spec["ids"] is not None else None
    counts = Counts()
    for position, sample in enumerate(_samples(path, spec["identities"][file], (field,), counts)):
        place = f"sample {sample.key!r}"
        if field not in sample.parts:
            yield LeftOut(file, place, f"without the part {field!r}")
            continue
        if field not in sample.contents:
            raise DataError(_not_stored(path, sample.parts[field]))
        content = _content(path, sample, field, spec["text_field"], mapper)
        if isinstance(content, WrongType):
            yield LeftOut(file, place, content.reason)
        else:
            yield Document(file, position, content, place=place)
    if counts.left_out:
        told = "members that are no samples, left out"
        yield Noticed(file, f"member {counts.left_out[0]!r}", told, len(counts.left_out))


def _not_stored(path: str, member: Member) -> str:
    if "link" in member.kind:
        what, way = f"a {member.kind} to {member.target!r}", "tar --dereference --hard-dereference"
    else:
        what, way = f"a {member.kind}", "tar without --sparse"
    return (
        f"{path!r}, at byte {member.at}: {member.name!r} is {what}, not the text itself; write it with {way}"
    )


def _walked(path: str) -> str:
    """The counts of a local tar, all of whose headers are read for it; a remote one is read once, by the import."""
    if is_remote(path):
        return ""
    counts = Counts()
    for _ in _samples(path, None, (), counts):
        pass
    return f" ({counts.text()})"


def _once(paths: list[str]) -> tuple[list[str], list[str]]:
    """Every tar once, however often it is named, and a note for every other time."""
    first: dict[Any, str] = {}
    notes = []
    for path in paths:
        stat = None if is_remote(path) else Path(path).stat()
        key = path if stat is None else (stat.st_dev, stat.st_ino)
        if key in first:
            notes.append(f"{path}: the same tar as {first[key]}, taken once")
        else:
            first[key] = path
    return list(first.values()), notes


def _kind(part: str) -> str:
    return part.rsplit(".", 1)[-1]


def _choose_part(path: str, samples: list[Sample], field: str | None) -> str:
    """The part that is read: `field`, or the only one of the most preferred kind that the samples have."""
    parts = sorted({part for sample in samples for part in sample.parts})
    if field is not None:
        if field in parts and _kind(field) in KINDS:
            return field
    else:
        for kind in KINDS:
            found = [part for part in parts if part == kind] or [
                part for part in parts if _kind(part) == kind
            ]
            if len(found) > 1:
                raise DataError(
                    f"{path!r}: which part of a sample is the text is not clear: {', '.join(found)}; "
                    "name it with --field"
                )
            if found:
                return found[0]
    raise DataError(
        f"{path!r} has no field {field!r} of kind txt, json, npy; its samples have: {', '.join(parts)}"
    )


def _choose_field(path: str, samples: list[Sample], part: str, named: str | None) -> tuple[str | None, str]:
    """The field of JSON records that is read, None where they are plain strings, and an example of its text."""
    texts: dict[str, list[str]] = {}
    plain: list[str] = []
    for sample in samples:
        if part not in sample.contents:
            continue
        try:
            record = json.loads(sample.contents[part])
        except ValueError as error:
            raise DataError(
                f"{path!r}, sample {sample.key!r}, part {part!r}: it is not JSON ({error}); mend or remove it"
            ) from error
        if isinstance(record, str):
            plain.append(record.strip()[:60])
        for name, value in record.items() if isinstance(record, dict) else ():
            if isinstance(value, str) and value.strip():
                texts.setdefault(name, []).append(value.strip())
    if plain and not texts:
        return None, plain[0]
    if named is None:
        found = [name for name in TEXT_FIELDS if name in texts][:1] or [
            name for name in sorted(texts) if _mostly_prose(texts[name])
        ]
        if len(found) != 1:
            raise DataError(
                f"{path!r}: which field of part {part!r} is the text is not clear; it has: "
                f"{', '.join(sorted(texts)) or 'no strings'}; name it with --text-field, or another part with --field"
            )
        named = found[0]
    if named not in texts:
        raise DataError(
            f"{path!r}: no text in field {named!r} of part {part!r} of its first {len(samples)} samples; "
            f"it has: {', '.join(sorted(texts)) or 'no strings'}"
        )
    return named, texts[named][0][:60]


def _mostly_prose(texts: list[str]) -> bool:
    return sum(map(like_prose, texts)) * 2 > len(texts)


def _example(samples: list[Sample], part: str) -> str:
    found = [sample.contents[part] for sample in samples if sample.contents.get(part, b"").strip()]
    return found[0].decode("utf-8", "replace").strip()[:60] if found else ""


def _places(inputs: Sequence[str | Path]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tars and URLs in the order given, folders by the tars in them, and what of these is left out."""
    places, walk = list[str](), Walk(lambda path: path.name.lower().endswith(_ENDINGS))
    for given in inputs:
        folder = at_home(given)
        if is_remote(str(given)) or not folder.is_dir():
            places.append(_place(given))
            continue
        before = len(walk.files)
        walk.below(folder)
        if len(walk.files) == before:
            why = "".join(f"; {line}" for line in summary(walk.left_out))
            raise DataError(f"{str(given)!r} holds no tars{why}; allowed endings: {' '.join(_ENDINGS)}")
        places += [str(path) for path in walk.files[before:]]
    return places, walk.left_out


def _place(given: str | Path) -> str:
    """A local tar's path, or a URL."""
    text = str(given)
    if is_remote(text):
        Store(split_url(text)[0])  # refuses other schemes
        return text
    scheme = text.split(":", 1)[0] if ":" in text else ""
    if scheme and not Path(text).exists():
        raise DataError(
            f"{text!r}: scheme {scheme!r} is not read by the importer; give tar files, folders or URLs"
        )
    path = at_home(text).absolute()
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist; give tar files, folders or URLs")
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


def _samples(
    path: str, identity: list[Any] | None, wanted: Sequence[str], counts: Counts
) -> Iterator[Sample]:
    """The samples of a tar, in order, with the contents of parts that are `wanted`, by name or by kind."""
    size = Path(path).stat().st_size if identity is None else identity[0]
    key, parts, contents = "", dict[str, Member](), dict[str, bytes]()
    archive = 0
    with _open(path, identity) as stream:
        for member in members(unpacked_stream(_Telling(stream, size), path), path):
            counts.archives = member.archive + 1
            named = _sample_name(member)
            if named is None:
                if member.kind != "folder":
                    counts.left_out.append(member.name)
                continue
            if parts and (named[0] != key or member.archive != archive):
                counts.samples += 1
                yield Sample(key, parts, contents)
                parts, contents = {}, {}
            (key, part), archive = named, member.archive
            if part in parts:  # in another spelling
                raise DataError(
                    f"{path!r} holds part {part!r} of sample {key!r} twice, at bytes {parts[part].at} and {member.at}; "
                    "write it again with one of them"
                )
            parts[part] = member
            if member.kind == "file" and (part in wanted or _kind(part) in wanted):
                contents[part] = member.read()
    if parts:
        counts.samples += 1
        yield Sample(key, parts, contents)


def _sample_name(member: Member) -> tuple[str, str] | None:
    """Key and part of a member; None for one that is no part of a sample."""
    name = member.name.removeprefix("./")
    folders, _, base = name.rpartition("/")
    hidden = base.startswith(".") or any(
        folder.startswith(".") or folder in ("__MACOSX", "PaxHeaders") for folder in folders.split("/")
    )
    match = _KEY.fullmatch(name)
    if member.kind not in ("file", "sparse file", "hard link", "symbolic link") or hidden or match is None:
        return None
    return None if base.split(".")[0].lower() in _ABOUT else (match[1], match[2].lower())


class _Telling(io.RawIOBase):
    """A stream that tells how much of it was read."""

    def __init__(self, stream: IO[bytes], size: int):
        self._stream, self._size, self._at = stream, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raw = self._stream.read(len(buffer))
        buffer[: len(raw)] = raw
        self._at += len(raw)
        tell(self._at / max(1, self._size))
        return len(raw)


def _content(path: str, sample: Sample, field: str, text_field: str | None, mapper: Mapper | None) -> Any:
    raw = sample.contents[field]
    try:
        if mapper is not None:
            tokens = np.load(io.BytesIO(raw), allow_pickle=False)
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"a row of integers is expected, got {tokens.dtype} {tokens.shape}")
            return mapper(tokens)
        text = raw.decode("utf-8")
        if _kind(field) != "json":
            return text.strip()
        found = text_of(json.loads(text), text_field)
        return found.strip() if isinstance(found, str) else found
    except ValueError as error:
        place = f"{path!r}, sample {sample.key!r}, part {field!r}"
        raise DataError(f"{place}: {error}; mend or remove it") from error
