"""Rows of CSV and TSV files: the dialect is found out from the file's begin and said; what is not clear is asked for.

Separator: tab, comma, semicolon or bar, the one that gives all rows of the begin the same number of columns, more than
one. Behind tabs nothing is quoted, elsewhere '"' quotes as in RFC 4180. The first row is the header, unless it looks
like data: then the file is refused until somebody says which. Rows of another length than the header are errors.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from minilm.data.errors import DataError
from minilm.data.records.fields import TEXT_FIELDS

SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
QUOTING = ("standard", "backslash", "none")
BEGIN_CHARACTERS = 1 << 18
_NAME = re.compile(r"[^\W\d][\w .\-/()%#:?]{0,39}|")
_FIELD_LIMIT = 1 << 30


class Asked(NamedTuple):
    """What the user has said of the dialect; None: find it out."""

    separator: str | None = None
    header: bool | None = None
    quoting: str | None = None
    ragged: bool = False


class Dialect(NamedTuple):
    """`columns`: their names, "1", "2", … where the file has no header; `ragged`: rows of other lengths are taken."""

    separator: str
    quoting: str
    header: bool
    columns: list[str]
    ragged: bool

    def text(self) -> str:
        shown = SEPARATORS.get(self.separator, repr(self.separator))
        head = (
            f"header {', '.join(self.columns[:8])}"
            if self.header
            else f"{len(self.columns)} columns, no header"
        )
        if len(self.columns) > 8 and self.header:
            head += f" and {len(self.columns) - 8} more"
        quoted = {"none": "no quoting", "backslash": "backslash escapes", "standard": "standard quoting"}
        return f"separator {shown}, {quoted[self.quoting]}, {head}"


def asked(separator: Any, header: Any, quoting: Any, ragged: Any) -> Asked:
    """The options as given by a user. DataError for values that are not allowed."""
    names = {name: sign for sign, name in SEPARATORS.items()} | {"\\t": "\t"}
    separator = names.get(separator, separator)
    if separator is not None and (
        not isinstance(separator, str) or len(separator) != 1 or separator in '"\r\n'
    ):
        raise DataError(
            f"csv_separator {separator!r} is not one character; allowed: {', '.join(SEPARATORS.values())} or any other "
            "single character"
        )
    if quoting is not None and quoting not in QUOTING:
        raise DataError(f"csv_quoting {quoting!r} is not known; allowed: {', '.join(QUOTING)}")
    for name, value in (("csv_header", header), ("csv_ragged", ragged)):
        if value is not None and not isinstance(value, bool):
            raise DataError(f"{name} {value!r}: allowed are true and false")
    return Asked(separator, header, quoting, bool(ragged))


def find_dialect(begin: str, whole: bool, name: str, tabs: bool, given: Asked, field: str | None) -> Dialect:
    """The dialect of a file that begins so (`whole`: that is all of it); `tabs`: its name says tab-separated. DataError
    where it is not clear; `field` is the column that the user named."""
    if given.separator is not None:
        candidates = [given.separator]
    else:
        candidates = ["\t"] if tabs else [",", "\t", ";", "|"]
    tried = {sign: _begin_rows(begin, whole, sign, given.quoting or _usual(sign)) for sign in candidates}
    fits = [sign for sign, rows in tried.items() if _one_width(rows) and len(rows[0]) > 1]
    if not fits and (given.ragged or given.separator):
        fits = sorted(candidates, key=lambda sign: -_usual_width(tried[sign]))[:1]
    if not fits:
        fits = [sign for sign in candidates[:1] if _one_width(tried[sign])]  # one column
        others = [SEPARATORS[sign] for sign in SEPARATORS if fits and sign in begin.partition("\n")[0]]
        if others:
            raise DataError(
                f"text {name!r} has a single column when separated by {SEPARATORS[fits[0]]}, but its first line holds "
                f"{' and '.join(others)}; name the right one with --csv-separator"
            )
    if not fits:
        raise _no_fit(tried, name)
    sign = fits[0]
    quoting, rows = given.quoting or _usual(sign), tried[sign]
    if not rows:
        raise DataError(f"text {name!r} holds no rows; give a file with text in it")
    header = _has_header(rows, name, field) if given.header is None else given.header
    columns = rows[0] if header else [str(number) for number in range(1, max(map(len, rows)) + 1)]
    if len(set(columns)) < len(columns):
        double = next(column for column in columns if columns.count(column) > 1)
        raise DataError(
            f"text {name!r} has two columns called {double!r}; rename one, or give --csv-no-header and name "
            "the text by its number"
        )
    return Dialect(sign, quoting, header, columns, given.ragged)


def rows(lines: Iterable[str], dialect: Dialect, name: str) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of every row behind the header; blank lines are none. DataError names the line."""
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(lines, **_arguments(dialect.separator, dialect.quoting))
    width = len(dialect.columns)
    skip = dialect.header
    line = 0
    try:
        for cells in reader:
            line, begin = reader.line_num, line + 1
            if not cells:
                continue
            if skip:
                skip = False
                continue
            if len(cells) != width and not dialect.ragged:
                raise DataError(
                    f"text {name!r}, line {begin}: {len(cells)} columns, where "
                    f"{'the header' if dialect.header else 'the first rows'} has {width} ({dialect.text()}); mend that "
                    "line, name the dialect with --csv-separator and --csv-quoting, or take such rows with --csv-ragged"
                )
            yield f"line {begin}", cells
    except csv.Error as error:
        raise DataError(
            f"text {name!r}, line {line + 1}: {_said(error)} ({dialect.text()}); mend it, or name the dialect with "
            "--csv-quoting and --csv-separator"
        ) from error


def _said(error: csv.Error) -> str:
    return "a quote is never closed" if "unexpected end of data" in str(error) else str(error)


def _usual(separator: str) -> str:
    return "none" if separator == "\t" else "standard"


def _arguments(separator: str, quoting: str) -> dict[str, Any]:
    if quoting == "none":
        return {"delimiter": separator, "quoting": csv.QUOTE_NONE, "strict": True}
    escapes = {"escapechar": "\\", "doublequote": False} if quoting == "backslash" else {}
    return {"delimiter": separator, "strict": True, **escapes}


def _begin_rows(begin: str, whole: bool, separator: str, quoting: str) -> list[list[str]]:
    """The rows of a file's begin, without the last where that may be cut; none where they break the rules."""
    csv.field_size_limit(_FIELD_LIMIT)
    found: list[list[str]] = []
    reader = csv.reader(io.StringIO(begin, newline=""), **_arguments(separator, quoting))
    try:
        found.extend(row for row in reader if row)
    except csv.Error as error:
        if whole or "unexpected end of data" not in str(error):
            return found[:-1] if len(found) > 50 else []
        return found
    return found if whole or len(found) < 2 else found[:-1]


def _one_width(found: list[list[str]]) -> bool:
    return bool(found) and len({len(row) for row in found}) == 1


def _usual_width(found: list[list[str]]) -> int:
    widths = [len(row) for row in found]
    return max(widths.count(width) for width in set(widths) if width > 1) if any(w > 1 for w in widths) else 0


def _no_fit(tried: dict[str, list[list[str]]], name: str) -> DataError:
    sign = max(tried, key=lambda sign: _usual_width(tried[sign]))
    found = tried[sign]
    if not found:
        what = "its quotes do not fit the rules, such as one that is never closed"
    else:
        width = len(found[0])
        odd = next((number for number, row in enumerate(found, 1) if len(row) != width), 1)
        what = f"row {odd} has {len(found[odd - 1])} columns, the first {width}"
    return DataError(
        f"text {name!r} has no dialect that fits (separated by {SEPARATORS.get(sign, repr(sign))}, {what}); mend it, "
        "name the dialect with --csv-separator and --csv-quoting, or take rows of any length with --csv-ragged"
    )


def _has_header(found: list[list[str]], name: str, field: str | None) -> bool:
    """Whether the first row names the columns. DataError where it looks like data."""
    head, data = found[0], found[1:]
    known = {*TEXT_FIELDS, *([field] if field else [])}
    if any(cell.strip().lower() in known or cell == field for cell in head):
        return True
    odd = next(
        (
            cell
            for number, cell in enumerate(head)
            if not _NAME.fullmatch(cell.strip())
            or (not cell.strip() and number > 0)
            or len(cell.split()) > 3
            or (cell.strip() and any(cell == row[number] for row in islice(data, 1000) if number < len(row)))
        ),
        None,
    )
    if odd is None and data:
        return True
    shown = " | ".join(head[:6])[:80]
    raise DataError(
        f"text {name!r}: its first row looks like data, not like names of columns ({shown}); say --csv-no-header "
        "(columns are then called 1, 2, …) or --csv-header"
    )
