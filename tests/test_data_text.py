"""Text files -> documents: every format and packing gives the same documents; bad text is said plainly."""

import csv
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from minilm.data.errors import DataError
from minilm.data.records import lines
from minilm.data.sources import text as source
from minilm.data.sources.accounts import LeftOut
from minilm.data.sources.find import find_files
from minilm.data.sources.plugin import Document
from minilm.data.sources.text import Settings, describe_all, read_unit, units

DOCUMENTS = ["first one", "a second\nof two lines", "third"]


def read_whole(path, text_field=None, **settings):
    """How a file is read, the note of it, its texts by position (pieces of one joined) and what else was said."""
    [file], [note] = describe_all([path], Settings(text_field, **settings))
    items = [item for unit in units(file, 0) for item in read_unit(file, unit)]
    texts, others = {}, [item for item in items if not isinstance(item, Document)]
    for item in items:
        if isinstance(item, Document):
            assert item.continues == (item.position in texts)
            texts[item.position] = texts.get(item.position, "") + item.content
    return file, note, [texts[position] for position in sorted(texts)], others


def documents_of(path, text_field=None, **settings):
    return read_whole(path, text_field, **settings)[2]


@pytest.fixture(params=["txt", "jsonl", "list.json", "dict.json", "csv", "parquet"])
def written(request, tmp_path):
    path = tmp_path / f"text.{request.param}"
    records = [{"id": f"{i}", "body": text} for i, text in enumerate(DOCUMENTS)]
    if request.param == "txt":
        path.write_text("\n\n".join(DOCUMENTS) + "\n")
    elif request.param == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif request.param == "list.json":
        path.write_text(json.dumps(records))
    elif request.param == "dict.json":
        path.write_text(json.dumps({f"title {i}": record for i, record in enumerate(records)}, indent=1))
    elif request.param == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "body"])
            writer.writeheader()
            writer.writerows(records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    return path


def test_every_format_gives_the_same_documents(written):
    assert documents_of(written) == DOCUMENTS


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_packed_files_give_the_same_documents(written, ending):
    if written.suffix == ".parquet":
        pytest.skip("parquet packs its own columns")
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[ending]
    packed = written.with_name(written.name + ending)
    packed.write_bytes(pack(written.read_bytes()))
    assert documents_of(packed) == DOCUMENTS


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_packed_file_that_is_cut_short_is_an_error(tmp_path, ending):
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[ending]
    path = tmp_path / f"text.jsonl{ending}"
    lines = "".join(json.dumps(f"{i * 7919 % 10007} document {i}") + "\n" for i in range(3000))
    path.write_bytes(pack(lines.encode())[:-9])
    with pytest.raises(DataError, match=r"is cut short at byte \d+; fetch it again"):
        documents_of(path)


def test_a_big_file_is_cut_into_ranges_without_loss_at_any_border(tmp_path, monkeypatch):
    body = "\nA line\nof A\n\n\nB\n \t \nC has\nmore\nlines here\n\nD"
    path = tmp_path / "text.txt"
    path.write_text(body)
    wanted = ["A line\nof A", "B", "C has\nmore\nlines here", "D"]
    for range_bytes in range(1, len(body) + 2):
        monkeypatch.setattr(source, "_RANGE_BYTES", range_bytes)
        assert documents_of(path) == wanted, range_bytes


def test_jsonl_is_cut_into_ranges_without_loss_at_any_border(tmp_path, monkeypatch):
    path = tmp_path / "text.jsonl"
    path.write_text('{"t": "one"}\n\n{"t": "two"}\n{"t": "three"}')
    for range_bytes in range(1, 45):
        monkeypatch.setattr(source, "_RANGE_BYTES", range_bytes)
        assert documents_of(path) == ["one", "two", "three"], range_bytes


def test_files_that_cannot_be_entered_in_the_middle_are_shared_by_parts(tmp_path, monkeypatch):
    path = tmp_path / "text.json"
    wanted = [f"document {i}" for i in range(1000)]
    path.write_text(json.dumps(wanted))
    monkeypatch.setattr(source, "_RANGE_BYTES", 2 * 4000)
    assert len(units(read_whole(path)[0], 0)) > 3
    assert documents_of(path) == wanted


def test_without_blank_lines_a_line_is_a_document(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\nthree\n\n")
    assert documents_of(path) == ["one", "two", "three"]
    assert "a line is a document" in read_whole(path)[1]


def test_a_long_document_comes_in_pieces_that_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PIECE_BYTES", 100)
    path = tmp_path / "text.txt"
    path.write_text("short\n\n" + "line of text\n" * 50)
    [file], _ = describe_all([path], Settings())
    found = list(read_unit(file, units(file, 0)[0]))
    assert [item.content for item in found if not item.continues] == ["short", "line of text\n" * 8]
    assert {item.position for item in found[1:]} == {7} and len(found) > 5
    assert documents_of(path) == ["short", "\n".join(["line of text"] * 50)]


def test_the_only_field_like_prose_is_taken_and_said(tmp_path):
    path = tmp_path / "text.json"
    path.write_text(json.dumps({"x": {"title": "x", "extract": "much more text", "id": 5}}))
    assert documents_of(path) == ["much more text"]
    note = read_whole(path)[1]
    assert note.endswith("text from field 'extract' (the one that reads like text), such as 'much more text'")
    assert documents_of(path, "title") == ["x"]


def test_records_without_text_are_empty_or_left_out_with_a_reason(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"t": "one"}\n{"t": null}\n{"u": 3}\n{"t": " "}\n{"t": 7}\n')
    _, _, texts, others = read_whole(path)
    assert texts == ["one", "", ""]
    assert others == [
        LeftOut(0, "byte 25", "without the field 't'"),
        LeftOut(0, "byte 45", "field 't' is a number, no text"),
    ]


def test_a_json_file_larger_than_the_buffer_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "text.json"
    wanted = ["x" * 70_000 + "é", "y", "z" * 300_000]
    path.write_text(
        json.dumps([1, {"t": wanted[0]}, {"t": wanted[1]}, {"t": wanted[2]}, 22], ensure_ascii=False)
    )
    _, _, texts, others = read_whole(path)
    assert texts == wanted
    assert [item.reason for item in others] == ["a record that is a number, no object"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"'.*a\.txt' is empty \(0 bytes\), .* give a file with text in it"),
        ("a.json", b'[{"t": "one"}, {"t": "two"', r"cut short in line 1 .*fetch it again"),
        ("a.json", b'[{"t": "one"},', r"cut short in line 1 .*fetch it again"),
        ("a.json", b"words alone", r"line 1: not JSON \(Expecting value\); mend it, or fetch it again"),
        ("a.json", b"[]", r"holds no records"),
        ("a.jsonl", b'{"t": "one"}\n{"t": \n', r"is cut short in line \d .*fetch it again"),
        ("a.jsonl", b'{"n": 1}\n', r"records without any string field"),
        ("a.parquet", b"PAR1 no parquet", r"damaged or no parquet file"),
        ("a.pdf", b"%PDF", r"ending that is not known; allowed: \.arrow \.csv "),
    ],
)
def test_bad_text_is_one_line_with_the_way_out(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        for path in find_files([tmp_path / name]).files:
            documents_of(path)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait\n")
    with pytest.raises(
        DataError,
        match=r"a\.txt' is not UTF-8 at byte 3 \(b'\\xe9 au'\); .*iconv -t UTF-8.*--invalid-utf8 replace",
    ):
        documents_of(tmp_path / "a.txt")


def test_a_field_that_is_not_there_names_the_fields_that_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "x", "body": "y"}\n')
    with pytest.raises(
        DataError, match=r"no text in field 'text', .*; its string fields are body, title: name"
    ):
        documents_of(path, "text")


def test_inputs_are_files_folders_and_patterns_each_file_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl.gz", "notes.md"):
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path / "b.txt", tmp_path, str(tmp_path / "*.txt")])
    assert [path.name for path in found.files] == ["b.txt", "a.txt", "c.jsonl.gz"]
    with pytest.raises(DataError, match=r"'.*nothing\.txt' does not exist; give files, folders or patterns"):
        find_files([tmp_path / "nothing.txt"])
    with pytest.raises(DataError, match="no text was given"):
        find_files([])
