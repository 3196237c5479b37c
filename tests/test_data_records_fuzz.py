"""Damaged and odd text files against independent readers: no text differs in silence, and no library's traceback.

Fifty files a format here, a thousand behind the marker soak.
"""

import csv
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minilm.data.errors import DataError
from minilm.data.records.csv_rows import Dialect
from minilm.data.records.fields import WrongType, text_of
from minilm.data.sources import text as source
from minilm.data.sources.accounts import LeftOut
from minilm.data.sources.plugin import Document
from minilm.data.sources.text import Settings, describe_all, read_unit, units

PARTS = [
    "word ",
    "two words, ",
    "ü",
    "汉字",
    "\\",
    '"',
    "'",
    "\n",
    "\t",
    ";",
    "|",
    "\r",
    "😀",
    " ",
    "-",
    "7",
    "\u2028",
    "[",
    "}",
]


def odd_text(rng):
    return "".join(rng.choices(PARTS, k=rng.randint(0, 12)))


def damaged(rng, raw):
    """The bytes, whole, cut, or with some of them changed, left out, doubled or moved."""
    raw = bytearray(raw)
    for _ in range(rng.choice([0, 0, 1, 1, 3])):
        at = rng.randrange(len(raw)) if raw else 0
        match rng.randrange(5):
            case 0:
                del raw[at:]
            case 1:
                raw[at : at + 1] = bytes([raw[at] ^ 1 << rng.randrange(8)]) if raw else b""
            case 2:
                del raw[at : at + rng.randint(1, 5)]
            case 3:
                raw[at:at] = raw[at : at + rng.randint(1, 30)]
            case 4:
                raw[at:at] = rng.choice([b'"', b"\n", b",", b"\t", b"{", b"]", b"\0", b"\xff", b"\r", b"\\"])
    return bytes(raw)


def ours(path, **settings):
    """Texts in order and the number of records left out, or the words of an error."""
    try:
        [file], _ = describe_all([path], Settings(**settings))
        items = [item for unit in units(file, 0) for item in read_unit(file, unit)]
    except DataError as error:
        assert "\n" not in str(error)
        return None, str(error)
    texts = {}
    for item in items:
        if isinstance(item, Document):
            texts[item.position] = texts.get(item.position, "") + item.content
    return file, ([texts[key] for key in sorted(texts)], sum(isinstance(i, LeftOut) for i in items))


def accounts_of(records, field):
    """Texts and the number of those without, of records that an independent reader has read."""
    found = [text_of(record, field) for record in records]
    return [text.strip() for text in found if isinstance(text, str)], sum(
        isinstance(t, WrongType) for t in found
    )


def json_of(raw):
    """All records of a JSON text by Python's decoder alone; ValueError where it is none."""
    decoder, text, at, values = json.JSONDecoder(), raw.decode("utf-8-sig"), 0, []
    while text[at:].strip(" \t\r\n"):
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n"))
        value, at = decoder.raw_decode(text, at)
        values.append(value)
    if len(values) == 1 and isinstance(values[0], dict) and values[0] and "text" not in values[0]:
        inner = list(values[0].values())
        if all(isinstance(value, dict) for value in inner):
            return inner
    return [record for value in values for record in (value if isinstance(value, list) else [value])]


def check_json(path, rng):
    records = [{"id": i, "text": odd_text(rng)} for i in range(rng.randint(1, 6))]
    if rng.random() < 0.3:
        records.insert(rng.randrange(len(records) + 1), rng.choice([{"id": 1}, {"text": None}, {"text": 3}]))
    ascii_ = rng.random() < 0.5
    lines = [json.dumps(record, ensure_ascii=ascii_) for record in records]
    written = rng.choice(
        [
            "\n".join(lines),
            "\n\n".join(lines) + "\n",
            "".join(lines),
            json.dumps(records, indent=rng.choice([None, 1])),
            json.dumps({f"title {i}": record for i, record in enumerate(records)}),
        ]
    )
    raw = damaged(rng, written.encode())
    path.write_bytes(raw)
    file, found = ours(path, text_field="text")
    if file is None:
        return
    try:
        wanted = json_of(raw)
    except (ValueError, UnicodeDecodeError) as error:
        raise AssertionError(f"read, though Python's json says {error}: {raw!r}") from error
    if file.field is None:
        assert found == accounts_of(wanted, None), raw
    else:
        assert found == accounts_of(wanted, "text"), raw


def check_csv(path, rng):
    separator = rng.choice(",;|\t")
    rows = [["id", "text", "label"]] + [[i, odd_text(rng), "x"] for i in range(rng.randint(1, 8))]
    buffer = io.StringIO()
    if separator == "\t":
        clean = str.maketrans("\t\r\n", "   ")
        buffer.write("".join("\t".join(str(c).translate(clean) for c in row) + "\n" for row in rows))
    else:
        csv.writer(buffer, delimiter=separator, lineterminator=rng.choice(["\n", "\r\n"])).writerows(rows)
    raw = damaged(rng, buffer.getvalue().encode())
    path.write_bytes(raw)
    file, found = ours(path, text_field="text")
    if file is None or "dialect" not in file.how:
        return
    dialect = Dialect(*file.how["dialect"])
    quoting = {"quoting": csv.QUOTE_NONE} if dialect.quoting == "none" else {}
    text = io.StringIO(raw.decode("utf-8-sig"), newline="")
    wanted = [row for row in csv.reader(text, delimiter=dialect.separator, strict=True, **quoting) if row]
    assert {len(row) for row in wanted} == {len(dialect.columns)}, raw
    records = [dict(zip(dialect.columns, row, strict=True)) for row in wanted[dialect.header :]]
    assert found == accounts_of(records, "text"), raw


def check_txt(path, rng):
    parts = ["line", "two words", "\n", "\n\n", " \n", "\r", "\r\n", "ü", "汉", "\t", "\u2028"]
    raw = damaged(rng, "".join(rng.choices(parts, k=rng.randint(1, 40))).encode())
    path.write_bytes(raw)
    by_line = rng.random() < 0.5
    file, found = ours(path, line_documents=by_line)
    if file is None:
        return
    blocks, held = [], []
    for line in [*path.read_text(encoding="utf-8-sig").split("\n"), ""]:  # all line ends are ends to Python
        blank = not line.strip(" \t\x0b\x0c")
        if held and (blank or file.how["by_line"]):
            blocks.append("\n".join(held))
            held = []
        held += [] if blank else [line]
    wanted = [block.strip() for block in blocks]
    assert [text.removeprefix("\ufeff").strip() for text in found[0]] == wanted, raw


def check_table(path, rng):
    kind = rng.choice(["parquet", "stream", "file"])
    texts = [rng.choice([None, odd_text(rng)]) for _ in range(rng.randint(1, 20))]
    table = pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    path = path.with_suffix(".parquet" if kind == "parquet" else ".arrow")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rng.randint(1, 9))
    else:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rng.randint(1, 9))
    raw = path.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(raw[: rng.randrange(len(raw))])
    file, found = ours(path, text_field="text")
    if file is None:
        assert path.stat().st_size < len(raw)
        return
    assert found == ([(text or "").strip() for text in texts], 0)


CHECKS = {"json": check_json, "csv": check_csv, "txt": check_txt, "table": check_table}


def run(kind, folder, monkeypatch, seeds):
    path = folder / {"json": "a.json", "csv": "a.csv", "txt": "a.txt", "table": "a.parquet"}[kind]
    for seed in seeds:
        rng = random.Random(seed)
        monkeypatch.setattr(source, "_RANGE_BYTES", rng.choice([8, 30, 100_000]))
        CHECKS[kind](path, rng)


@pytest.mark.parametrize("kind", CHECKS)
def test_no_text_differs_in_silence(tmp_path, monkeypatch, kind):
    run(kind, tmp_path, monkeypatch, range(50))


@pytest.mark.soak
@pytest.mark.parametrize("kind", CHECKS)
def test_no_text_of_a_thousand_files_differs_in_silence(tmp_path, monkeypatch, kind):
    run(kind, tmp_path, monkeypatch, range(50, 1050))
