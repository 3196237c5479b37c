"""JSON as records, whatever the file is called: one array, one object, lines, several values one after the other.

A file is a row of values. An array at the top holds records; an object is a record, unless it is the file's only
value and plainly holds records: objects by title, pandas' columns ({"text": {"0": …}}, {"text": […]}), split or table.
One record at a time is decoded. Strict as Python's json; what follows the end, a comma too many and a name twice in
one object are errors with their line.
"""

import json
from collections.abc import Iterator
from typing import Any, Protocol

from minilm.data.errors import DataError, one_line
from minilm.data.records.fields import TEXT_FIELDS, kind_of, look_up

_BLANK = " \t\r\n"
_PIECE, _MAX_PIECE = 1 << 16, 1 << 24
_LOOKED_AT = 1 << 22  # characters of an only object, to see what it holds
_NEAR_END = 16  # characters at the buffer's end that may be half a word
MAX_RECORD = 1 << 30


class Text(Protocol):
    def read(self, size: int, /) -> str: ...


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds {double!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


class Scanner:
    """A stream of JSON text, read value by value; errors call it `name`."""

    def __init__(self, stream: Text, name: str):
        self._stream, self._name = stream, name
        self._buffer, self._at, self._wants = "", 0, _PIECE
        self._before = 0  # characters ahead of the buffer
        self._line, self._counted = 1, 0  # the line of `_counted`, a place in the buffer

    @property
    def line(self) -> int:
        """The line that is stood in. Line ends are counted once, for all who ask."""
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    @property
    def consumed(self) -> int:
        return self._before + self._at

    def _more(self) -> bool:
        piece = self._stream.read(self._wants)
        self._line, self._counted = self.line, 0
        self._before += self._at
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        self._wants = min(self._wants * 2, _MAX_PIECE)
        return bool(piece)

    def error(self, what: str) -> DataError:
        return DataError(
            f"text {self._name!r}, line {self.line}: not JSON ({what}); mend it, or fetch it again"
        )

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _take(self, character: str, what: str) -> None:
        found = self.peek()
        if found != character:
            raise self._unexpected(found, what)
        self._at += 1

    def _unexpected(self, found: str, what: str) -> DataError:
        if not found:
            return DataError(f"text {self._name!r} is cut short in line {self.line} ({what}); fetch it again")
        return self.error(f"{what}, found {found!r}")

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated")
                offset, room = error.pos - self._at, len(self._buffer) - self._at < MAX_RECORD
                if (cut or error.pos >= len(self._buffer) - _NEAR_END) and room and self._more():
                    continue
                at = self._at + offset
                line = self.line + self._buffer.count("\n", self._at, at)
                if room and (cut or at >= len(self._buffer.rstrip())):
                    raise DataError(
                        f"text {self._name!r} is cut short in line {line} ({error.msg}); fetch it again"
                    ) from error
                raise DataError(
                    f"text {self._name!r}, line {line}: not JSON ({error.msg}); mend it, or fetch it again"
                ) from error
            except (ValueError, RecursionError) as error:
                raise self.error(one_line(error)) from error
            if end < len(self._buffer) or not self._more():  # else a number could go on
                self._at, self._wants = min(end, len(self._buffer)), _PIECE
                return found

    def elements(self) -> Iterator[None]:
        """Of an array: stands before each element in turn, which the caller takes."""
        self._take("[", "an array is expected")
        yield from self._parts("]")

    def members(self) -> Iterator[str]:
        """Of an object: the name of each member in turn, whose value the caller takes."""
        self._take("{", "an object is expected")
        for _ in self._parts("}"):
            if self.peek() != '"':
                raise self._unexpected(self.peek(), "a name is expected")
            name = self.value()
            self._take(":", "':' is expected behind a name")
            yield name

    def _parts(self, closing: str) -> Iterator[None]:
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            if not self.peek():
                raise self._unexpected("", f"{closing!r} is missing")
            yield
            found = self.peek()
            if found not in (",", closing):
                raise self._unexpected(found, f"',' or {closing!r} is expected")
            self._at += 1
            if found == closing:
                return
            if self.peek() == closing:
                raise self.error(f"a value is expected behind ',', found {closing!r}")

    def skip(self) -> None:
        """Step over the next value; memory holds its smallest parts."""
        opening = self.peek()
        if opening == "[":
            for _ in self.elements():
                self.value()
        elif opening == "{":
            for _ in self.members():
                self.value()
        else:
            self.value()

    def end(self) -> None:
        if found := self.peek():
            raise self.error(f"the end is expected, found {found!r}")


def records(scanner: Scanner, shape: str, field: str | None) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file of this `shape`; of columns only the one called `field` (None: all, for a look)."""
    if shape == "values":
        while opening := scanner.peek():
            for _ in scanner.elements() if opening == "[" else [None]:
                scanner.peek()
                yield f"line {scanner.line}", scanner.value()
        return
    columns: list[str] = []
    found = shape not in ("columns", "lists")
    for name in scanner.members():
        if shape == "map":
            scanner.peek()
            yield f"line {scanner.line}", scanner.value()
        elif shape in ("columns", "lists"):
            if name != field:
                scanner.skip()
                continue
            if found:
                raise scanner.error(f"the column {name!r} is there twice")
            found = True
            for number, _ in enumerate(scanner.members() if shape == "columns" else scanner.elements(), 1):
                yield f"record {number}", {name: scanner.value()}
        elif shape == "split" and name == "columns":
            columns = scanner.value()
        elif name == "data":
            if shape == "split" and not columns:
                raise scanner.error("'columns' is expected before 'data'")
            for _ in scanner.elements():
                scanner.peek()
                place, value = f"line {scanner.line}", scanner.value()
                if shape == "split":
                    if not isinstance(value, list) or len(value) != len(columns):
                        raise scanner.error(f"a row of {len(columns)} values is expected")
                    value = dict(zip(columns, value, strict=True))
                yield place, value
        else:
            scanner.skip()
    if not found:
        raise scanner.error(f"it has no column {field!r}")
    scanner.end()


def shape_of(scanner: Scanner, field: str | None, name: str) -> tuple[str, list[Any]]:
    """How a file holds its records, by its begin: "values", or, of an only object, "map", "columns", "lists", "split",
    "table"; and of columns their first records. `name` is the file's. DataError where that is not clear."""
    if scanner.peek() != "{":
        return "values", []
    sample, whole = {}, True
    for key in scanner.members():
        sample[key], whole = _begin_of(scanner)
        if not whole or scanner.consumed > _LOOKED_AT:
            whole = False
            break
    if whole and scanner.peek():
        return "values", []
    shape = _only_object(sample, field, name)
    if shape == "columns":
        rows = zip(*(value.values() for value in sample.values() if isinstance(value, dict)), strict=False)
    elif shape == "lists":
        rows = zip(*(value for value in sample.values() if isinstance(value, list)), strict=False)
    else:
        return shape, []
    if whole and len({len(value) for value in sample.values()}) > 1:
        lengths = ", ".join(f"{key} {len(value)}" for key, value in list(sample.items())[:6])
        raise DataError(
            f"text {name!r} has columns of different lengths ({lengths}); write it as one record a line"
        )
    return shape, [dict(zip(sample, row, strict=False)) for row, _ in zip(rows, range(200), strict=False)]


def _begin_of(scanner: Scanner) -> tuple[Any, bool]:
    """The next value, and whether it is whole: of a long list or object only the begin is kept."""
    opening, begin = scanner.peek(), scanner.consumed
    if opening == "[":
        items = []
        for _ in scanner.elements():
            items.append(scanner.value())
            if scanner.consumed - begin > _LOOKED_AT:
                return items, False
        return items, True
    if opening == "{":
        members = {}
        for key in scanner.members():
            members[key] = scanner.value()
            if scanner.consumed - begin > _LOOKED_AT:
                return members, False
        return members, True
    return scanner.value(), True


def _only_object(sample: dict[str, Any], field: str | None, name: str) -> str:
    values = list(sample.values())
    keys = set(sample)
    if "columns" in keys and keys <= {"columns", "index", "data"} and isinstance(sample["columns"], list):
        return "split"
    if keys == {"schema", "data"} and isinstance(sample["schema"], dict) and "fields" in sample["schema"]:
        return "table"
    found, text = look_up(sample, field) if field else (False, None)
    named = found or any(isinstance(sample.get(known), str) for known in TEXT_FIELDS)
    if values and all(isinstance(value, dict) for value in values):
        inner = {key for value in values for key in value}
        numbered = all(key.isdigit() for key in inner) and not all(key.isdigit() for key in keys)
        known = {field} if field else set(TEXT_FIELDS)
        by_name = bool(known & keys) and not known & inner
        if inner and (numbered or by_name):
            return "columns"
        return "map" if not (found and isinstance(text, str)) else "values"
    lists = [value for value in values if isinstance(value, list)]
    if values and len(lists) == len(values) and not any(isinstance(i, dict | list) for v in lists for i in v):
        return "values" if name.endswith((".jsonl", ".ndjson")) else "lists"
    inside = [
        key
        for key, value in sample.items()
        if isinstance(value, list) and any(isinstance(i, dict) for i in value)
    ]
    if inside and not named:
        raise DataError(
            f"text {name!r} is one object whose {inside[0]!r} is a list of objects; if those are the records, write "
            f"them alone, for instance with jq -c '.{inside[0]}[]', else name the text with --text-field"
        )
    return "values"


def values_of_line(text: str, name: str, place: str) -> Iterator[Any]:
    """The records of one line of JSON: mostly one; elements where it is an array."""
    at = 0
    while True:
        while at < len(text) and text[at] in _BLANK:
            at += 1
        if at == len(text):
            return
        try:
            found, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
            raise DataError(f"text {name!r}, {place}: not JSON ({what}); mend or remove that line") from error
        if isinstance(found, list):
            yield from found
        else:
            yield found


def is_line_of_records(line: str) -> bool:
    """Whether a line is one whole object or text, so that a file of such can be entered at any line."""
    try:
        return kind_of(_DECODER.decode(line)) in ("an object", "a text")
    except (ValueError, RecursionError):
        return False
