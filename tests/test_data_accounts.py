"""The books balance: what an independent reader finds in the inputs is what the shards hold, account by account."""

import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from minilm.data.builder import tokenization
from minilm.data.builder.build import build, import_data
from minilm.data.builder.clean import MARKS, NULS, SURROGATES, Encoder, NotEncoded, clean
from minilm.data.errors import DataError
from minilm.data.format.manifest import BUILD_FILE
from minilm.data.format.seal import sealed
from minilm.data.read.reader import RowReader
from minilm.data.records import lines
from minilm.data.sources import text as source
from minilm.data.sources.accounts import Accounts, LeftOut, Noticed, books_of
from tests.data_cases import make_documents, make_tokenizer, write_megatron
from tests.test_data_foreign_formats import as_fairseq, fairseq_dict, write_fairseq, write_tar

ONE_ROW = {"seq_len": 512, "packing": "document", "processes": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def encode(teacher):
    tokenizer = Tokenizer.from_file(f"{teacher}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def rows_in(folder):
    reader = RowReader(folder)
    batch = reader.read(range(reader.manifest.rows))
    return [tuple(row[1 : n - 1].tolist()) for row, n in zip(batch.input_ids, batch.mask.sum(1), strict=True)]


RECORDS = [
    {"id": i, "text": text}
    for i, text in enumerate(
        [*make_documents(30), "", "  ", "half \ud83d here", "a [SEP] b", "x\0y", "\ufeffmark"]
    )
]
ODD = [{"id": 77}, {"text": 5}, {"text": None}, {"text": ["para one", "two"]}, "plain", 7, [1]]


def as_lines(path):
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, [*RECORDS, *ODD[:-1]])) + "\n")
    return path.with_suffix(".jsonl")


def as_array(path):
    path.with_suffix(".json").write_text(json.dumps([*RECORDS, *ODD], indent=1))
    return path.with_suffix(".json")


def of_json(path):
    raw = path.read_text()
    return json.loads(raw) if path.suffix == ".json" else [json.loads(line) for line in raw.splitlines()]


def whole_texts():
    return [r["text"].replace("\ud83d", "?").replace("\0", " ") for r in RECORDS]


def as_csv(path):
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(whole_texts())])
    return path.with_suffix(".csv")


def of_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def as_tsv(path):
    path.with_suffix(".tsv").write_text(
        "id\ttext\n" + "".join(f"{i}\t{chr(34)}{text}\n" for i, text in enumerate(whole_texts()))
    )
    return path.with_suffix(".tsv")


def of_tsv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def as_parquet(path):
    table = pa.table({"n": [1] * len(RECORDS) + [2], "text": [*whole_texts(), None]})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=7)
    return path.with_suffix(".parquet")


def of_parquet(path):
    return pq.read_table(path).to_pylist()


def as_tar(path):
    samples = [(f"{i}.json", json.dumps(record).encode()) for i, record in enumerate([*RECORDS, *ODD])]
    return write_tar(path.with_suffix(".tar"), [*samples, ("zz.cls", b"1"), ("README", b"about")])


def of_tar(path):
    with tarfile.open(path) as tar:
        raw = {name: tar.extractfile(name).read() for name in tar.getnames()}
    return [
        json.loads(data) if name.endswith(".json") else {} for name, data in raw.items() if name != "README"
    ]


def as_txt(path):
    path.with_suffix(".txt").write_text("\n\n".join(whole_texts()) + "\n")
    return path.with_suffix(".txt")


def of_txt(path):
    found = path.read_text().split("\n\n")
    return [{"text": text} for text in found if text.strip(" \n")]


READERS = {
    "txt": (as_txt, of_txt),
    "lines": (as_lines, of_json),
    "array": (as_array, of_json),
    "csv": (as_csv, of_csv),
    "tsv": (as_tsv, of_tsv),
    "parquet": (as_parquet, of_parquet),
    "tar": (as_tar, of_tar),
}


@pytest.mark.parametrize("kind", READERS)
def test_what_an_independent_reader_finds_is_what_the_shards_hold(
    tmp_path, teacher, encode, kind, monkeypatch
):
    monkeypatch.setattr(source, "_RANGE_BYTES", 3000)
    write, independent = READERS[kind]
    path = write(tmp_path / "a")
    call = {**ONE_ROW, "source": "webdataset" if kind == "tar" else "text", "options": {"text_field": "text"}}
    if kind == "txt":
        call["options"] = {}
    report = import_data([path], teacher, tmp_path / "out", **call)
    wanted, empty, left_out = [], 0, 0
    for record in independent(path):
        value = record.get("text", 5) if isinstance(record, dict) else 5
        value = "\n".join(value) if isinstance(value, list) else value
        if value == 5:
            left_out += 1
            continue
        value = (value or "").removeprefix("\ufeff").replace("\ud83d", "\ufffd").replace("\0", " ").strip()
        wanted += [encode(value)] if value else []
        empty += not value
    assert Counter(rows_in(tmp_path / "out")) == Counter(wanted)
    books = report.books
    assert (books.documents, books.empty, sum(books.left_out.values())) == (len(wanted), empty, left_out)
    assert books.records == len(wanted) + empty + left_out == len(independent(path))
    assert report.documents == books.documents and report.empty_documents == empty
    told = (tmp_path / "out" / "report" / "report.txt").read_text()
    assert f"1 file, {books.records} records: {len(wanted)} documents, {empty} empty" in told
    saved = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert saved["inputs"] == report.inputs and saved["books"]["left_out"] == books.left_out


@pytest.mark.parametrize("kind", ["megatron", "fairseq"])
def test_the_books_of_token_streams_balance(tmp_path, teacher, encode, kind):
    coded = [list(encode(text)) for text in make_documents(20)]
    options = {"source_tokenizer": teacher}
    if kind == "megatron":
        prefix = write_megatron(tmp_path / "a", [[ids] for ids in coded] + [[]])
    else:
        names, sequences = as_fairseq(coded, teacher, separated=True)
        prefix, options = (
            write_fairseq(tmp_path / "a", sequences),
            {"dict": str(fairseq_dict(tmp_path, names))},
        )
    report = import_data([prefix], teacher, tmp_path / "out", source=kind, options=options, **ONE_ROW)
    assert Counter(rows_in(tmp_path / "out")) == Counter(map(tuple, coded))
    [account] = report.inputs
    assert account["input"] == str(tmp_path / "a") and account["documents"] == 20 and not account["left_out"]
    assert account["records"] == 20 + account["empty"]


def test_sums_keep_the_first_place_and_names():
    one, two = Accounts(), Accounts()
    one.of(0)["documents"] = 2
    one.add(LeftOut(0, "line 3", "without it"))
    two.add(LeftOut(0, "line 9", "without it"))
    two.add(Noticed(1, "line 1", "odd things", 5))
    inputs = Accounts.sum_of([one.as_json(), json.loads(json.dumps(two.as_json()))]).named(["a", "b", "c"])
    books = books_of(inputs)
    assert [account["records"] for account in inputs] == [4, 0, 0]
    assert books.lines() == [
        "3 files, 4 records: 2 documents, 0 empty, 2 left out",
        "left out: 2 without it (first: a, line 3)",
        "5 odd things (first: b, line 1)",
    ]


@pytest.mark.parametrize("kind", ["text", "webdataset"])
def test_many_records_without_text_are_a_warning_and_more_an_error_unless_allowed(tmp_path, teacher, kind):
    def write(good, bad):
        records = [json.dumps({"text": f"words {i}"}) for i in range(good)] + ['{"id": 1}'] * bad
        if kind == "text":
            (tmp_path / "a.jsonl").write_text("\n".join(records))
            return tmp_path / "a.jsonl"
        return write_tar(tmp_path / "a.tar", [(f"{i}.json", r.encode()) for i, r in enumerate(records)])

    def read(path, out, **more):
        return import_data([path], teacher, tmp_path / out, source=kind, **ONE_ROW, **more)

    assert not read(write(200, 2), "a").books.warnings()
    [warning] = read(write(100, 100), "b").books.warnings()
    assert warning.startswith(
        "50.0% of the records gave no document (below 1% is usual): 100 without the field"
    )
    path = write(100, 101)
    with pytest.raises(
        DataError,
        match=r"50\.2% of 201 records gave no document, more than the 50% that are allowed: 101 without the field "
        r"'text' \(first: .*\); mend the input, .*--allow-skipped SHARE \(recipe: data\.allow_skipped\)",
    ):
        read(path, "c")
    assert not (tmp_path / "c").exists()
    assert read(path, "c", allow_skipped=0.6).documents == 100
    with pytest.raises(DataError, match="more than the 50%"):
        read(path, "c")
    with pytest.raises(DataError, match="more than the 0%"):
        read(write(200, 2), "d", allow_skipped=0.0)
    with pytest.raises(DataError, match=r"allow_skipped 2 is outside 0 … 1"):
        read(path, "e", allow_skipped=2)


def test_a_file_that_gives_nothing_is_named_among_others_that_do(tmp_path, teacher):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 300)
    (tmp_path / "b.jsonl").write_text('{"words": "some words"}\n' * 2)
    report = build([tmp_path], teacher, tmp_path / "out", text_field="text", **ONE_ROW)
    assert f"no document came from {tmp_path / 'b.jsonl'}, though they hold records" in report.warnings


def test_a_build_under_older_rules_is_not_taken_for_this_one(tmp_path, teacher):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    build([tmp_path / "a.jsonl"], teacher, tmp_path / "out", **ONE_ROW)
    saved = json.loads((tmp_path / "out" / BUILD_FILE).read_text())
    for name in ("reader_version", "special_tokens"):
        del saved["arguments"][name]
    for name in ("inputs", "files_left_out"):
        del saved["report"][name]
    saved.pop("seal", None)
    (tmp_path / "out" / BUILD_FILE).write_bytes(sealed(saved))
    with pytest.raises(DataError, match=r"built differently \(.*reader_version.* changed\)"):
        build([tmp_path / "a.jsonl"], teacher, tmp_path / "out", **ONE_ROW)


def test_names_of_special_tokens_stay_text_and_are_counted_or_become_tokens(tmp_path, teacher, encode):
    texts = ["before [SEP] after", "a [PAD] b [PAD]", "fill the [MASK] here"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = build([tmp_path / "a.jsonl"], teacher, tmp_path / "out", **ONE_ROW)
    rows = rows_in(tmp_path / "out")
    assert Counter(rows) == Counter(map(encode, texts))
    assert not {0, 2, 3, 4} & {number for row in rows for number in row}
    assert report.books.noticed == {"names of special tokens in the text, kept as text": 4}
    report = build([tmp_path / "a.jsonl"], teacher, tmp_path / "tokens", special_tokens="tokens", **ONE_ROW)
    assert sum(number in (0, 3, 4) for row in rows_in(tmp_path / "tokens") for number in row) == 4
    assert report.books.noticed == {"names of special tokens in the text, taken as tokens": 4}
    with pytest.raises(DataError, match="built differently"):
        build([tmp_path / "a.jsonl"], teacher, tmp_path / "tokens", **ONE_ROW)
    with pytest.raises(DataError, match=r"special_tokens 'both' is not known; allowed: text, tokens"):
        build([tmp_path / "a.jsonl"], teacher, tmp_path / "x", special_tokens="both", **ONE_ROW)


def test_what_no_tokenizer_takes_is_put_right_and_counted():
    assert clean("\ufeff a\0b \ud83d") == ("a b \ufffd", {MARKS: 1, NULS: 1, SURROGATES: 1})


def test_a_model_that_holds_the_name_as_a_piece_gets_it_written_apart(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "▁abs<>/")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), "text")
    text = "ab </s> ba"
    assert encoder.names_in(text) == 1
    for written in (text, "ab ＜/s＞ ba"):  # its normalizer makes the name of the second
        [ids] = encoder.encode([written])
        assert 1 not in ids and "".join(pieces[i][0] for i in ids) == "▁ab▁<▁/s>▁ba"


@pytest.mark.parametrize("kind", ["one line", "lines", "json", "csv"])
@pytest.mark.parametrize("packing", ["full", "document"])
def test_a_long_document_stays_one_whatever_it_is_cut_into(
    tmp_path, teacher, encode, kind, packing, monkeypatch
):
    monkeypatch.setattr(tokenization, "_PIECE", 200)
    monkeypatch.setattr(tokenization, "_HASHED_CHARACTERS", 60)
    monkeypatch.setattr(tokenization, "_RUN_TOKENS", 300)
    monkeypatch.setattr(tokenization, "_BATCH_CHARACTERS", 350)
    monkeypatch.setattr(lines, "PIECE_BYTES", 240)
    monkeypatch.setattr("minilm.data.builder.sort._INDEX_TOKENS", 50)
    monkeypatch.setattr("minilm.data.builder.phases._BUCKET_TOKENS", 2500)
    novels = [f"novel{n} " + " ".join(make_documents(5, seed=n)) for n in range(12)]
    path = tmp_path / {"one line": "a.txt", "lines": "a.txt", "json": "a.jsonl", "csv": "a.csv"}[kind]
    if kind == "json":
        path.write_text("".join(json.dumps({"text": novel}) + "\n" for novel in novels))
    elif kind == "csv":
        buffer = io.StringIO()
        csv.writer(buffer).writerows([["id", "text"], *enumerate(novels)])
        path.write_text(buffer.getvalue())
    elif kind == "lines":
        path.write_text("\n\n".join(novel.replace(" ", "\n") for novel in novels))
    else:
        path.write_text("\n".join(novels))
    options = {"seq_len": 18, "packing": packing, "processes": 1, "held_out": 0.3}
    report = build([path], teacher, tmp_path / "out", **options)
    assert report.documents == report.books.records == 12 and 0 < report.held_out_documents < 12
    wanted = [encode(novel) for novel in novels]
    assert min(map(len, wanted)) > 250
    found = {}
    for split in (tmp_path / "out", tmp_path / "out" / "held-out"):
        reader = RowReader(split)
        batch = reader.read(range(reader.manifest.rows))
        lengths = [18] * len(batch.input_ids) if batch.mask is None else batch.mask.sum(1).tolist()
        stream = [
            number
            for row, n in zip(batch.input_ids.tolist(), lengths, strict=True)
            for number in (row[1 : n - 1] if packing == "full" else row[1:n])
        ]
        found[split] = stream
    for ids in wanted:
        pieces = [ids] if packing == "full" else [ids[at : at + 16] for at in range(0, len(ids), 16)]
        joined = ",".join(
            str(i) for piece in pieces for i in (*piece, *((3,) if packing == "document" else ()))
        )
        holds = [f",{joined}" in f",{','.join(map(str, stream))}" for stream in found.values()]
        assert sum(holds) == 1 or packing == "full" and sum(holds) == 0  # the last may be cut at the last row
    sizes = sorted(map(len, wanted))
    assert report.tokens == sum(sizes)


def test_equal_long_texts_lie_on_one_side_whatever_their_format(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(tokenization, "_PIECE", 200)
    monkeypatch.setattr(tokenization, "_HASHED_CHARACTERS", 100)
    novels = [f"novel{n} " + " ".join(make_documents(5, seed=n)) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": novel}) + "\n" for novel in novels))
    (tmp_path / "a.txt").write_text("\n".join(novels))
    options = {"seq_len": 18, "packing": "document", "processes": 1, "held_out": 0.3}
    reports = [
        build([tmp_path / name], teacher, tmp_path / name.replace(".", "-"), **options)
        for name in ("a.jsonl", "a.txt")
    ]
    rows = [Counter(rows_in(tmp_path / name / "held-out")) for name in ("a-jsonl", "a-txt")]
    assert rows[0] == rows[1] and 0 < reports[0].held_out_documents < 20


def test_a_text_that_the_tokenizer_refuses_is_an_error_with_its_place(tmp_path, teacher, monkeypatch):
    def refuses(self, texts):
        if any("bad" in text for text in texts):
            raise NotEncoded("the tokenizer cannot encode it (panic)")
        return [type("Encoding", (), {"ids": [5]})() for _ in texts]

    monkeypatch.setattr(Encoder, "_encode", refuses)
    path = Path(tmp_path / "a.jsonl")
    path.write_text('{"text": "fine one"}\n{"text": "bad one"}\n')
    with pytest.raises(
        DataError, match=r"a\.jsonl', byte 21: the tokenizer cannot encode it \(panic\); mend or remove"
    ):
        build([path], teacher, tmp_path / "out", **ONE_ROW)
