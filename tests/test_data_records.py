"""Records of every layout and dialect: each gives the right documents, or an error that says what to do."""

import csv
import io
import json
import random
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minilm.data.errors import DataError
from minilm.data.records.csv_rows import Asked
from minilm.data.records.fields import text_of
from minilm.data.records.json_values import Scanner, records
from minilm.data.sources import text as source
from minilm.data.sources.accounts import LeftOut, Noticed
from minilm.data.sources.find import METADATA, find_files
from minilm.data.sources.plugin import Document
from minilm.data.sources.text import Settings, describe_all, read_unit, settings_of, units
from tests.test_data_text import documents_of, read_whole

TEXTS = ["first, one", 'a "second" one', "third\none", "ünï"]
RECORDS = [{"id": i, "text": text, "url": f"http://{i}"} for i, text in enumerate(TEXTS)]


def dumped(value, **options):
    return json.dumps(value, **options)


LAYOUTS = {
    "lines": "\n".join(map(dumped, RECORDS)),
    "lines with blank ones": "\n\n  \n".join(map(dumped, RECORDS)) + "\n\n",
    "returns": "\r\n".join(map(dumped, RECORDS)),
    "old returns": "\r".join(map(dumped, RECORDS)),
    "mark": "\ufeff" + "\n".join(map(dumped, RECORDS)),
    "one array": dumped(RECORDS),
    "one array, indented": dumped(RECORDS, indent=2, ensure_ascii=False),
    "array of texts": dumped(TEXTS),
    "one after the other": "".join(map(dumped, RECORDS)),
    "indented, one after the other": "\n".join(dumped(record, indent=1) for record in RECORDS),
    "two on a line": f"{dumped(RECORDS[0])} {dumped(RECORDS[1])}\n{dumped(RECORDS[2])}\n{dumped(RECORDS[3])}",
    "two on a later line": f"{dumped(RECORDS[0])}\n{dumped(RECORDS[1])} {dumped(RECORDS[2])}\n{dumped(RECORDS[3])}",
    "arrays one after the other": dumped(RECORDS[:2]) + "\n" + dumped(RECORDS[2:]),
    "by title": dumped({f"title {i}": record for i, record in enumerate(RECORDS)}),
    "columns": dumped({key: {str(i): r[key] for i, r in enumerate(RECORDS)} for key in RECORDS[0]}),
    "columns by name": dumped(
        {key: {f"row {i}": r[key] for i, r in enumerate(RECORDS)} for key in RECORDS[0]}
    ),
    "lists": dumped({key: [r[key] for r in RECORDS] for key in RECORDS[0]}),
    "split": dumped(
        {"columns": list(RECORDS[0]), "index": [0, 1, 2, 3], "data": [list(r.values()) for r in RECORDS]}
    ),
    "table": dumped({"schema": {"fields": [{"name": "text"}]}, "data": RECORDS}),
    "paragraphs": "\n".join(dumped({"text": text.split("\n")}) for text in TEXTS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_every_layout_of_json_gives_its_records_whatever_the_file_is_called(tmp_path, layout, ending):
    if layout == "lists" and ending == "jsonl":
        pytest.skip("a line of lists is a record there")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(LAYOUTS[layout].encode())
    _, _, texts, others = read_whole(path)
    assert texts == TEXTS and not others
    assert documents_of(path, text_field=None if layout == "array of texts" else "text") == TEXTS


def test_what_pandas_writes_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(RECORDS)
    for orient in ("records", "columns", "index", "split", "table"):
        frame.to_json(tmp_path / "a.json", orient=orient)
        assert documents_of(tmp_path / "a.json") == TEXTS, orient
    frame.to_json(tmp_path / "a.json", orient="records", lines=True)
    assert documents_of(tmp_path / "a.json") == TEXTS
    for index, sep in ((True, ","), (False, ","), (False, ";")):
        frame.to_csv(tmp_path / "a.csv", index=index, sep=sep)
        assert documents_of(tmp_path / "a.csv") == TEXTS, (index, sep)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a b"}] x', r"line 1: not JSON \(Expecting value\)"),
        ('[{"text": "a b"}]]', "line 1: not JSON"),
        ('[{"text": "a b"},]', r"a value is expected behind ',', found ']'"),
        ('[{"text": "a b"} {"text": "c"}]', r"line 1: not JSON \(',' or ']' is expected, found '{'\)"),
        ('[{"text": "a b"},\n{"text": "c"},,{"text": "d"}]', "line 2: not JSON"),
        ('{"text": "a b"},\n{"text": "c"}', "line 1: not JSON"),
        ('{"a": {"text": "b c"}, "d": {"text": "e f"}} {', "cut short in line 1"),
        ('{"text": "a b"}\n{"text": "c', "cut short in line 2"),
        ('{"text": "a b"}\n{"text": "c"}\nnull and void', "line 3: not JSON"),
        ('{"text": "a b"}\n{"text": "one", "text": "two"}', "an object holds 'text' twice"),
        ("[" * 100_000, "recursion|not JSON"),
        (
            '{"version": "1.1", "data": [{"text": "a b"}]}',
            r"one object whose 'data' is a list of objects; .*jq -c '\.data\[\]'",
        ),
        ('{"text": ["a", "b"], "label": [1]}', r"columns of different lengths \(text 2, label 1\)"),
        (
            '{"question": "why is it so", "answer": "it just is"}',
            r"not clear; there are answer \('it just is'\), question",
        ),
    ],
)
def test_broken_json_is_an_error_with_its_place(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        documents_of(path)
    assert "\n" not in str(caught.value)


def test_json_that_breaks_late_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "a.json"
    for ending in ("json", "jsonl"):
        path = tmp_path / f"a.{ending}"
        path.write_text('{"text": "a b"}\n' * 1000 + '{"text": "c\n')
        with pytest.raises(DataError, match=r"byte 16000: not JSON .*mend or remove that line"):
            documents_of(path)
    path.write_text("[" + '{"text": "a b"},\n' * 1000 + '{"text": broken}]')
    with pytest.raises(DataError, match=r"line 1001: not JSON \(Expecting value\)"):
        documents_of(path)


def test_line_ends_are_counted_once_however_long_a_record_is():
    class Counting(str):
        counted = 0

        def count(self, sign, start, end):
            Counting.counted += end - start
            return super().count(sign, start, end)

        def __add__(self, other):
            return Counting(super().__add__(other))

        def __getitem__(self, index):
            found = super().__getitem__(index)
            return Counting(found) if isinstance(index, slice) else found

    text = dumped(["x" * 300_000, *["two words"] * 1000], indent=0)
    scanner = Scanner(io.StringIO(text), "a")
    scanner._buffer = Counting()
    places = [place for place, _ in records(scanner, "values", None)]
    assert places == [f"line {number}" for number in range(2, 1003)]
    assert len(text) // 2 < Counting.counted < 2 * len(text)


def test_one_field_is_chosen_for_all_files_or_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two", "title": "three four"}\n')
    (tmp_path / "b.jsonl").write_text('{"content": "five six"}\n')
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(
        DataError, match=r"b\.jsonl' has no field 'text', which holds the text in other files; .*content"
    ):
        describe_all(paths, Settings())
    files, _ = describe_all(paths, Settings("text"))
    items = [
        item
        for number, file in enumerate(files)
        for unit in units(file, number)
        for item in read_unit(file, unit)
    ]
    assert [item.content for item in items if isinstance(item, Document)] == ["one two"]
    assert items[1] == LeftOut(1, "byte 0", "without the field 'text'")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"id": "a1", "url": "http://x.y/z w", "sha256": "ab" * 32, "content": "some words"}, "content"),
        ({"hash": "ab" * 32, "words": "some words here"}, "words"),
        ({"title": "A title", "essay": "a much longer text that goes on and on " * 5}, "essay"),
        ({"t": "x"}, "t"),
        ({"meta": {"language": "en", "text": "some words"}, "id": "7"}, "meta.text"),
        ({"a": "two words", "b": "three more words"}, None),
        ({"x": "abc", "y": "def"}, None),
    ],
)
def test_the_field_is_the_stated_one_or_asked_for(tmp_path, record, field):
    path = tmp_path / "a.jsonl"
    path.write_text(dumped(record) + "\n")
    if field is None:
        with pytest.raises(
            DataError, match=r"which field holds the text is not clear; .*: name it with --text-field"
        ):
            documents_of(path)
    else:
        assert documents_of(path) == [text_of(record, field).strip()]


def test_a_dotted_path_leads_into_objects_and_a_name_with_dots_goes_before():
    record = {"meta": {"text": "inner", "a.b": {"c": "deep"}}, "x.y": "flat", "x": {"y": "nested"}}
    assert text_of(record, "meta.text") == "inner" and text_of(record, "x.y") == "flat"
    assert text_of(record, "meta.a.b.c") == "deep"
    assert text_of(record, "meta.none").reason == "without the field 'meta.none'"


def test_a_late_field_is_found_in_all_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id":"x"}\n' * 250 + '{"id":"y","text":"real text"}\n' * 250)
    _, _, texts, others = read_whole(path, "text")
    assert texts == ["real text"] * 250 and len(others) == 250
    with pytest.raises(
        DataError, match=r"no text in field 'none', nor has any other file; its string fields are id: name"
    ):
        documents_of(path, "none")


# CSV


def write_rows(path, rows, **options):
    with path.open("w", newline="") as file:
        csv.writer(file, **options).writerows(rows)
    return path


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_the_separator_of_a_csv_is_found_and_said(tmp_path, separator):
    texts = [text.replace("\n", " ").replace('"', "") for text in TEXTS] if separator == "\t" else TEXTS
    path = write_rows(tmp_path / "a.csv", [["id", "text"], *enumerate(texts)], delimiter=separator)
    _, note, found, _ = read_whole(path)
    assert found == texts
    names = {",": "comma", ";": "semicolon", "|": "bar", "\t": "tab"}
    quoting = "no quoting" if separator == "\t" else "standard quoting"
    assert f"separator {names[separator]}, {quoting}, header id, text" in note


def test_nothing_is_quoted_behind_tabs(tmp_path):
    rows = [(i, f"{chr(34) if i == 4 else ''}sentence number {i}") for i in range(1, 40)]
    for name in ("a.tsv", "a.csv"):
        path = tmp_path / name
        path.write_text("id\tsentence\n" + "".join(f"{i}\t{text}\n" for i, text in rows))
        assert documents_of(path) == [text for _, text in rows]


@pytest.mark.parametrize("sign", ["\u2028", "\x0b", "\x0c", "\x1c", "\x85"])
def test_what_ends_a_line_for_python_alone_ends_no_row(tmp_path, sign):
    path = tmp_path / "a.csv"
    path.write_text(f"id,text\n1,one{sign}two words\n2,three\n")
    assert documents_of(path) == [f"one{sign}two words", "three"]


def test_a_file_without_a_header_says_so_or_is_refused(tmp_path):
    path = tmp_path / "a.tsv"  # CoLA's shape
    path.write_text("gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe weights made the rope.\n")
    with pytest.raises(
        DataError, match=r"first row looks like data, .*gj04 \| 1 .*--csv-no-header .*--csv-header"
    ):
        documents_of(path)
    found = ["The sailors rode the breeze.", "The weights made the rope."]
    assert documents_of(path, csv=Asked(header=False)) == found
    assert documents_of(path, "4", csv=Asked(header=False)) == found
    path.write_text("positive\tgood film\npositive\tfine film\n")
    with pytest.raises(DataError, match="looks like data"):
        documents_of(path)
    assert documents_of(path, csv=Asked(header=True), text_field="good film") == ["fine film"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,one two\n2,three,four\n", r"row 3 has 3 columns, the first 2\).*--csv-ragged"),
        (
            "id,text\n" + "1,one two\n" * 30000 + "2,three,four\n",
            r"line 30002: 3 columns, where the header has 2",
        ),
        ('id,text\n1,"one two\n2,three\n', "quotes do not fit the rules, such as one that is never closed"),
        ("id,text\n" + "1,one two\n" * 30000 + '2,"three\n', r"line 30002: a quote is never closed"),
        ("text,text\n1,one two\n", r"two columns called 'text'.*--csv-no-header"),
        (
            "id;text:x\none two\n",
            r"a single column when separated by comma, but its first line holds semicolon",
        ),
        ("1,one\n2,two\n", "first row looks like data"),
    ],
)
def test_what_is_not_clear_in_a_csv_is_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        documents_of(path)
    assert "\n" not in str(caught.value)


def test_options_settle_a_dialect(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,one two\n2,three,four\n3\n")
    _, _, texts, others = read_whole(path, csv=Asked(ragged=True))
    assert texts == ["one two", "three"]
    assert others == [LeftOut(0, "line 4", "without the field 'text'")]
    path.write_text('id,text\n1,"say \\"so\\", he said"\n')
    assert documents_of(path, csv=Asked(quoting="backslash")) == ['say "so", he said']
    path.write_text('id,text\n1,"open\n2,b"c\n')
    assert documents_of(path, csv=Asked(quoting="none")) == ['"open', 'b"c']
    path.write_text("id~text\n1~one, two\n")
    assert documents_of(path, csv=Asked(separator="~")) == ["one, two"]
    path.write_text("text\nhello\n\nworld\n")
    assert documents_of(path) == ["hello", "world"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"csv_separator": "ab"}, r"csv_separator 'ab' is not one character; allowed: tab, comma"),
        ({"csv_quoting": "all"}, "csv_quoting 'all' is not known; allowed: standard, backslash, none"),
        ({"invalid_utf8": "drop"}, "invalid_utf8 'drop' is not known; allowed: stop, replace"),
        ({"text_field": 7}, "text_field 7 is no name"),
        ({"line_documents": "yes"}, "line_documents 'yes': allowed are true and false"),
        ({"csv_header": "no"}, "csv_header 'no': allowed are true and false"),
        ({"lines": True}, "source 'text' has no option 'lines'"),
    ],
)
def test_an_option_that_is_not_allowed_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        settings_of(options)


# tables


def write_arrow(path, table, *, stream):
    opened = pa.OSFile(str(path), "wb")
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_only_the_columns_with_text_of_a_table_are_decoded(tmp_path, kind):
    table = pa.table(
        {
            "id": [1, 2, 3, 4],
            "day": [date(2020, 1, 1)] * 4,
            "text": pa.array(TEXTS).dictionary_encode(),
            "paragraphs": [["a b", "c"], None, [], ["d"]],
            "meta": [{"text": "inner one", "n": 1}, {"text": None, "n": 2}, None, {"text": "last", "n": 4}],
        }
    )
    path = tmp_path / f"a.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        write_arrow(path, table, stream=kind == "stream")
    file, _, texts, _ = read_whole(path)
    assert texts == TEXTS and file.how == {"columns": ["text"]}
    assert documents_of(path, "paragraphs") == ["a b\nc", "", "", "d"]
    _, _, texts, others = read_whole(path, "meta.text")
    assert texts == ["inner one", "", "last"]
    assert others == [LeftOut(0, "row 3", "without the field 'meta.text'")]
    with pytest.raises(DataError, match="no text in field 'id'"):
        documents_of(path, "id")
    whole = path.read_bytes()
    for cut in (len(whole) - 8, len(whole) // 2, 100):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="damaged or no|cut short"):
            documents_of(path)


def test_a_folder_that_datasets_saved_is_read_without_its_metadata(tmp_path):
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    write_arrow(
        folder / "data-00000-of-00001.arrow", pa.table({"text": TEXTS, "label": [0] * 4}), stream=True
    )
    write_arrow(folder / "cache-1f2e.arrow", pa.table({"text": TEXTS}), stream=True)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "dataset_info.json").write_text('{"description": "some words about it"}')
    found = find_files([tmp_path])
    assert [path.name for path in found.files] == ["data-00000-of-00001.arrow"]
    assert len([reason for _, reason in found.left_out if reason == METADATA]) == 4
    assert documents_of(found.files[0]) == TEXTS


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}]},
         "lacks 'data-00001-of-00002.arrow', which its state.json names; fetch it again"),
        ({"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]},
         "is a selection of rows of its files; save it again by load_from_disk, flatten_indices and save_to_disk "
         "of the library datasets"),
        ([], "is damaged or of another version"),
    ],
)  # fmt: skip
def test_a_saved_folder_that_is_not_whole_or_not_plain_is_refused(tmp_path, state, message):
    write_arrow(tmp_path / "data-00000-of-00002.arrow", pa.table({"text": TEXTS}), stream=True)
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=message):
        find_files([tmp_path])


def test_an_arrow_file_that_a_saved_folder_does_not_name_is_left_out(tmp_path):
    for name in ("data-00000-of-00001.arrow", "old.arrow"):
        write_arrow(tmp_path / name, pa.table({"text": TEXTS}), stream=True)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    found = find_files([tmp_path])
    assert [path.name for path in found.files] == ["data-00000-of-00001.arrow"]
    assert (str(tmp_path / "old.arrow"), "not named in the state.json beside it") in found.left_out


# bytes


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_text_with_a_byte_order_mark_is_read(tmp_path, encoding, name):
    content = {
        "a.txt": "one ü\n\ntwo\n",
        "a.jsonl": '{"text": "one ü"}\n{"text": "two"}\n',
        "a.csv": "id,text\n1,one ü\n2,two\n",
    }[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    found = [text.removeprefix("\ufeff") for text in documents_of(tmp_path / name)]
    assert found == ["one ü", "two"]


def test_utf16_without_a_mark_and_other_binaries_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("one two\n".encode("utf-16-le") * 9)
    with pytest.raises(
        DataError, match=r"no text in UTF-8 \(72 of its first 144 bytes are zero\).*iconv -f UTF-16LE"
    ):
        documents_of(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.csv", "d.json"])
def test_bytes_that_are_not_utf8_are_an_error_or_replaced_and_counted(tmp_path, name):
    content = {
        "a.txt": b"fine\n\ncaf\xe9 au\n",
        "b.jsonl": b'{"text": "fine"}\n{"text": "caf\xe9 au"}\n',
        "c.csv": b"id,text\n1,fine\n2,caf\xe9 au\n",
        "d.json": b'[{"text": "fine"}, {"text": "caf\xe9 au"}]',
    }[name]
    (tmp_path / name).write_bytes(content)
    at = content.index(b"\xe9")
    with pytest.raises(DataError, match=rf"is not UTF-8 at byte {at} "):
        documents_of(tmp_path / name)
    _, _, texts, others = read_whole(tmp_path / name, replace=True)
    assert texts == ["fine", "caf\ufffd au"]
    assert others == [Noticed(0, f"byte {at}", "places that were not UTF-8, replaced by U+FFFD", 1)]


def test_replaced_bytes_are_counted_once_however_many_parts_read_them(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_RANGE_BYTES", 100)
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,caf\xe9 au\n" + b"2,fine words\n" * 30)
    [file], _ = describe_all([path], Settings(replace=True))
    assert len(units(file, 0)) > 1
    *_, others = read_whole(path, replace=True)
    assert [item.times for item in others] == [1]


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.txt.gz"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(
            DataError, match="is a git-lfs pointer, not the file itself; fetch that with: git lfs pull"
        ):
            documents_of(tmp_path / name)


def test_line_ends_of_any_system_end_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for end in ("\n", "\r\n", "\r"):
        body = f"one{end}two{end}{end}three{end} {end}{end}four"
        path.write_bytes(body.encode())
        for range_bytes in (1, 2, 3, 5, 8, 1000):
            monkeypatch.setattr(source, "_RANGE_BYTES", range_bytes)
            assert documents_of(path) == ["one\ntwo", "three", "four"], (end, range_bytes)
            assert documents_of(path, line_documents=True) == ["one", "two", "three", "four"], (
                end,
                range_bytes,
            )


def test_mixed_line_ends_are_read_alike_however_a_file_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for seed in range(30):
        rng = random.Random(seed)
        path.write_bytes("".join(rng.choices(["a", "b c", " ", "\n", "\r", "\r\n", "ü"], k=40)).encode())
        by_cut = []
        for range_bytes in (1, 3, 7, 1000):
            monkeypatch.setattr(source, "_RANGE_BYTES", range_bytes)
            by_cut.append([documents_of(path), documents_of(path, line_documents=True)])
        assert all(found == by_cut[0] for found in by_cut), seed
        lines = path.read_text().split("\n")  # all line ends are ends to Python
        assert by_cut[0][1] == [line.strip() for line in lines if line.strip()], seed
