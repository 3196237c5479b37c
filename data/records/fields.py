"""Which field of a record is the text: one choice for all files, stated, or asked for.

A field is named as it is in the record, or by a dotted path into objects (`meta.text`). Its value is a text or a list
of paragraphs. Where nobody named it, it is the first of `TEXT_FIELDS` that is there, else the only field whose values
read like prose (or the one that holds nine tenths of the prose), else the only field with text. Whatever else is asked
for: a field that merely looks likely is never taken in silence.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from minilm.data.errors import DataError

TEXT_FIELDS = ("text", "txt", "content", "caption", "body", "article", "document", "sentence")
_DEPTH = 3
_CLEAR_SHARE = 0.9
_EXAMPLE = 60


class WrongType(NamedTuple):
    """Why a record gives no text."""

    reason: str


def text_of(record: Any, field: str | None) -> str | WrongType:
    """The text of a record; of a null, "". `field` None: records are texts themselves."""
    if field is None:
        if isinstance(record, str):
            return record
        return WrongType(f"a record that is {kind_of(record)} among texts")
    if not isinstance(record, dict):
        return WrongType(f"a record that is {kind_of(record)}, no object")
    found, value = look_up(record, field)
    if not found:
        return WrongType(f"without the field {field!r}")
    return as_text(value, field)


def as_text(value: Any, field: str) -> str | WrongType:
    """A field's value as text: a text, a null, or a list of paragraphs."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return WrongType(f"field {field!r} holds bytes that are no UTF-8")
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return WrongType(f"field {field!r} is {kind_of(value)}, no text")


def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "a null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def look_up(record: dict[str, Any], field: str) -> tuple[bool, Any]:
    """Whether a record has the field, and its value; a name with dots in it goes before a path."""
    if field in record:
        return True, record[field]
    head, dot, rest = field.partition(".")
    while dot:
        inner = record.get(head)
        if isinstance(inner, dict):
            found, value = look_up(inner, rest)
            if found:
                return True, value
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return False, None


class Seen:
    """What the first records of a file hold: how many there were, which fields have text, and some of it."""

    def __init__(self, name: str) -> None:
        self.name, self.records, self.texts = name, 0, 0
        self.fields: dict[str, list[Any]] = {}  # texts, those like prose, their characters, an example

    def add(self, record: Any) -> None:
        self.records += 1
        self.texts += isinstance(record, str)
        for name, value in _flat(record, ""):
            text = as_text(value, name)
            if value is not None and isinstance(text, str) and text.strip():
                seen = self.fields.setdefault(name, [0, 0, 0, ""])
                seen[0] += 1
                seen[1] += like_prose(text)
                seen[2] += len(text)
                seen[3] = seen[3] or " ".join(text[: 4 * _EXAMPLE].split())[:_EXAMPLE]

    @property
    def plain(self) -> bool:
        """Whether the records are texts without fields."""
        return self.texts == self.records > 0


def like_prose(text: str) -> bool:
    """Several words, and no URL or path ahead: no id, hash, date or address."""
    words = text[:1000].split()
    return (
        len(words) > 1 and "://" not in words[0] or len(text) > 30 and len(words) == 1 and not text.isascii()
    )


def _flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        full = f"{path}{name}"
        if isinstance(inner, dict):
            if full.count(".") < _DEPTH:
                yield from _flat(inner, f"{full}.")
        else:
            yield full, inner


def choose(files: list[Seen], option: str = "--text-field") -> str | None:
    """The field that holds the text in all `files`; None where no file has records with fields. DataError where it is
    not clear."""
    files = [seen for seen in files if seen.records and not seen.plain]
    if not files:
        return None
    names = sorted({name for seen in files for name in seen.fields})
    if not names:
        raise DataError(
            f"text {files[0].name!r} has records without any string field; give a file with text in it"
        )
    found = [name for name in TEXT_FIELDS if name in names][:1]
    if not found:
        prose = {
            name: _sum(files, name, 2) for name in names if _sum(files, name, 1) * 2 > _sum(files, name, 0)
        }
        clear = [name for name in prose if prose[name] >= _CLEAR_SHARE * sum(prose.values())]
        found = clear or list(prose) or names
    if len(found) > 1:
        shown = ", ".join(f"{name} ({_example(files, name)!r})" for name in found[:6])
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise DataError(
            f"text {files[0].name!r}: which field holds the text is not clear; there are {shown}{more}: name it with "
            f"{option}"
        )
    lacks = [seen for seen in files if found[0] not in seen.fields]
    if lacks:
        raise DataError(
            f"text {lacks[0].name!r} has no field {found[0]!r}, which holds the text in other files; its string fields "
            f"are {named(lacks[0].fields)}: name one for all with {option}, or build them one by one"
        )
    return found[0]


def how_chosen(files: list[Seen], field: str, asked: bool) -> str:
    """The choice in words, with an example."""
    example = _example(files, field)
    told = (
        "as asked"
        if asked
        else "found by its name"
        if field in TEXT_FIELDS
        else "the one that reads like text"
    )
    return f"text from field {field!r} ({told})" + (f", such as {example!r}" if example else "")


def named(fields: Iterable[str]) -> str:
    """Some names for a message."""
    names = sorted(fields)
    return (", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")) or "none"


def _sum(files: list[Seen], name: str, index: int) -> int:
    return sum(seen.fields[name][index] for seen in files if name in seen.fields)


def _example(files: list[Seen], name: str) -> str:
    return next((seen.fields[name][3] for seen in files if name in seen.fields), "")
