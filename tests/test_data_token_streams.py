"""Token streams of others: no document is glued to another, doubled or lost, in import and in place alike."""

import random
import shutil
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from minilm.data.builder.build import import_data
from minilm.data.errors import DataError
from minilm.data.read.indexed_dataset import IndexedRows
from minilm.data.sources.megatron import read as read_megatron
from minilm.data.sources.vocabulary import DROPPED, END, from_fairseq_dict, from_tokenizer
from tests.data_cases import CLS, SEP, SPECIAL, make_tokenizer, write_megatron
from tests.test_data_foreign_formats import SMALL, documents_in, write_fairseq, write_legacy
from tests.test_data_tokenizer import save, with_normalizer

PAD = 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("teacher"))


def random_documents(seed, count=60):
    rng = random.Random(seed)
    return [[rng.randrange(5, 41) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def pieces_of(documents):
    return sorted(tuple(ids[i : i + 14]) for ids in documents for i in range(0, len(ids), 14))


def independent(prefix):
    """The documents of a Megatron pair, cut behind every SEP, by loops of struct.unpack."""
    raw, values = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    code, n, d = struct.unpack_from("<BQQ", raw, 17)
    width, letter = {8: (2, "H"), 4: (4, "i"), 5: (8, "q")}[code]
    found = []
    bounds = [struct.unpack_from("<q", raw, 34 + 12 * n + 8 * k)[0] for k in range(d)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        document = []
        for s in range(begin, end):
            [length] = struct.unpack_from("<i", raw, 34 + 4 * s)
            [pointer] = struct.unpack_from("<q", raw, 34 + 4 * n + 8 * s)
            for k in range(length):
                [token] = struct.unpack_from(f"<{letter}", values, pointer + width * k)
                if token == SEP:
                    found.append(document)
                    document = []
                elif token not in (CLS, PAD):
                    document.append(token)
        found.append(document)
    return [document for document in found if document]


def bring(prefix, teacher, out, source="megatron", **options):
    given = prefix if isinstance(prefix, list) else [prefix]
    options = options or {"source_tokenizer": teacher}
    return import_data(given, teacher, out, source=source, options=options, packing="document", **SMALL)


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5)])
@pytest.mark.parametrize("seed", range(3))
def test_documents_are_cut_at_every_end_of_document(tmp_path, teacher, dtype, code, seed):
    rng, documents = random.Random(seed), random_documents(seed)
    groups, at = [], 0
    while at < len(
        documents
    ):  # several documents a sequence, several sequences a document, with and without its end
        some = documents[at : at + rng.randint(1, 5)]
        at += len(some)
        stream = [token for ids in some for token in (*ids, SEP)]
        stream = stream if rng.random() < 0.5 else stream[:-1]
        cut = rng.randrange(len(stream))
        groups.append([stream[:cut], stream[cut:]] if cut else [stream])
    prefix = write_megatron(tmp_path / "m", groups, dtype, code)
    expected = independent(prefix)
    assert sorted(expected) == sorted(documents)
    report = bring(prefix, teacher, tmp_path / "out")
    assert report.documents == len(documents) and documents_in(tmp_path / "out") == pieces_of(expected)
    assert any("a document ends at '[SEP]' (id 3)" in note for note in report.notes)


def test_two_documents_packed_into_one_sequence_with_the_ids_of_bert(tmp_path):
    names = [f"t{i}" for i in range(20_000)]
    for name, number in zip(SPECIAL, (0, 100, 101, 102, 103), strict=True):
        names[number] = name
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bert = save(tokenizer, tmp_path / "bert")
    one = [1996, 4937, 2938, 2006, 1996, 13523]
    two, three = [1037, 3899, 2743, 1999, 1996, 2380], [5055, 6170, 2012, 6440]
    prefix = write_megatron(tmp_path / "d", [[[*one, 102, *two, 102]], [[*three, 102]]])
    assert bring(prefix, bert, tmp_path / "out").documents == 3
    assert documents_in(tmp_path / "out") == sorted([tuple(one), tuple(two), tuple(three)])
    rows = IndexedRows(prefix, tokenizer=bert, seq_len=16, source_tokenizer=bert)
    assert rows.read([0]).input_ids.tolist() == [[101, *one, 102, *two, 102, 102]]


def test_doubled_ends_padding_and_begins_make_no_documents(tmp_path, teacher):
    prefix = write_megatron(
        tmp_path / "m", [[[CLS, 5, 6, SEP, SEP, CLS, 7, 8, SEP, PAD, PAD]], [[SEP]], [[9] * 20]]
    )
    report = bring(prefix, teacher, tmp_path / "out")
    assert (report.documents, report.empty_documents) == (3, 1)
    assert documents_in(tmp_path / "out") == pieces_of([[5, 6], [7, 8], [9] * 20])


def test_units_do_not_change_the_bytes_of_cut_documents(tmp_path, teacher, monkeypatch):
    documents = random_documents(7)
    groups = [[[t for ids in documents[i : i + 3] for t in (*ids, SEP)]] for i in range(0, len(documents), 3)]
    prefix = write_megatron(tmp_path / "m", groups)
    one = bring(prefix, teacher, tmp_path / "one")
    monkeypatch.setattr("minilm.data.sources.megatron.UNIT_TOKENS", 90)
    assert bring(prefix, teacher, tmp_path / "many").fingerprint == one.fingerprint
    ids = from_tokenizer(teacher, AutoTokenizer.from_pretrained(teacher))
    spec = {"prefixes": [str(prefix)], "ids": ids.ids, "names": ids.names}
    positions = [document.position for document in read_megatron(spec, [0, 0, len(groups)])]
    assert len(set(positions)) == len(positions) == len(documents)


@pytest.mark.parametrize("layout", ["fairseq", "fairseq-legacy"])
def test_an_eos_inside_a_sequence_of_fairseq_cuts_and_the_one_at_its_end_does_not(tmp_path, teacher, layout):
    names = [
        token
        for token, _ in sorted(AutoTokenizer.from_pretrained(teacher).get_vocab().items(), key=lambda t: t[1])
    ]
    (tmp_path / "dict.txt").write_text(
        "".join(f"{name} 1\n" for name in names[5:])
    )  # id 4 is the teacher's 5
    write = write_fairseq if layout == "fairseq" else write_legacy
    prefix = write(tmp_path / "f", [[4, 5, 2], [6, 7, 2], [2], [8, 9, 2, 10, 11, 2], [12, 2]])
    bring(prefix, teacher, tmp_path / "out", layout, dict=str(tmp_path / "dict.txt"))
    assert documents_in(tmp_path / "out") == sorted([(5, 6, 7, 8), (9, 10), (11, 12, 13)])


def stream_in_place(prefix, teacher):
    rows = IndexedRows(prefix, tokenizer=teacher, seq_len=16, source_tokenizer=teacher)
    order = list(range(rows.num_rows))
    random.Random(1).shuffle(order)
    batch = rows.read(order)
    assert (batch.input_ids[:, 0] == CLS).all() and (batch.input_ids[:, -1] == SEP).all()
    return [
        t for _, row in sorted(zip(order, batch.input_ids.tolist(), strict=True)) for t in row[1:-1]
    ], rows


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_in_place_a_separator_stands_between_all_documents(tmp_path, teacher, ended, seed):
    documents = random_documents(seed)
    groups = [[[*ids, SEP] if ended else ids] for ids in documents]
    prefix = write_megatron(tmp_path / "m", groups)
    found, rows = stream_in_place(prefix, teacher)
    expected = [token for ids in documents for token in (*ids, SEP)]
    assert rows.num_rows == len(expected) // 14 and found == expected[: len(found)]
    bring(prefix, teacher, tmp_path / "out")
    assert documents_in(tmp_path / "out") == pieces_of(documents)


def test_in_place_refuses_a_stream_where_some_documents_have_no_end(tmp_path, teacher):
    documents = random_documents(3)
    groups = [[[*ids, SEP]] if i % 3 else [ids] for i, ids in enumerate(documents)]
    prefix = write_megatron(tmp_path / "m", groups)
    message = r"m.bin': the document that ends before token \d+ has no end-of-document id, and others have; .* import"
    with pytest.raises(DataError, match=message):
        stream_in_place(prefix, teacher)
    many = [[[5, 6, SEP]] for _ in range(4000)]
    many[1777] = [[5, 6, 7]]  # no sample of the check at opening
    prefix = write_megatron(tmp_path / "n", many)
    rows = IndexedRows(prefix, tokenizer=teacher, seq_len=16, source_tokenizer=teacher)
    rows.read(range(100))
    with pytest.raises(DataError, match=r"ends before token 5334 has no end-of-document id"):
        rows.read([1777 * 3 // 14])


def test_in_place_refuses_sequences_out_of_order(tmp_path, teacher):
    prefix = write_megatron(tmp_path / "m", [[[5] * 20], [[6] * 20]])
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    raw[42:58] = struct.pack("<2q", 40, 0)
    prefix.with_suffix(".idx").write_bytes(raw)
    with pytest.raises(
        DataError, match="do not lie one after another in its .bin, so it can't be read in place"
    ):
        stream_in_place(prefix, teacher)
    bring(prefix, teacher, tmp_path / "out")
    assert documents_in(tmp_path / "out") == pieces_of([[5] * 20, [6] * 20])


def test_a_pair_named_twice_is_taken_once_and_said(tmp_path, teacher):
    documents = random_documents(1)
    prefix = write_megatron(tmp_path / "d", [[ids] for ids in documents])
    (tmp_path / "linked.bin").symlink_to(prefix.with_suffix(".bin"))
    shutil.copy(prefix.with_suffix(".idx"), tmp_path / "linked.idx")
    (tmp_path / "hard.bin").hardlink_to(prefix.with_suffix(".bin"))
    (tmp_path / "hard.idx").symlink_to(prefix.with_suffix(".idx"))
    again = [f"{prefix}.idx", tmp_path / "linked", tmp_path / "hard.bin"]
    report = bring([f"{prefix}.bin", *again], teacher, tmp_path / "out")
    assert report.documents == len(documents)
    assert report.notes[1:] == [f"{given}: the same pair as {prefix}.bin, taken once" for given in again]
    (tmp_path / "copy").mkdir()
    for ending in (".bin", ".idx"):
        shutil.copy(prefix.with_suffix(ending), tmp_path / "copy" / f"d{ending}")
    both = bring([prefix, tmp_path / "copy" / "d"], teacher, tmp_path / "both")
    assert both.documents == 2 * len(documents)  # another file, however alike


def test_an_index_without_documents_says_what_is_missing(tmp_path, teacher):
    prefix = write_megatron(tmp_path / "m", [[[5, 6], [7, 8]]])
    raw = prefix.with_suffix(".idx").read_bytes()
    for bounds in ([], [0]):
        cut = (
            raw[:26]
            + struct.pack("<Q", len(bounds))
            + raw[34 : 34 + 24]
            + struct.pack(f"<{len(bounds)}q", *bounds)
        )
        prefix.with_suffix(".idx").write_bytes(cut)
        message = r"m.idx' has 2 sequences and no documents: its writer never called end_document\(\)"
        with pytest.raises(DataError, match=message):
            bring(prefix, teacher, tmp_path / "out")
        with pytest.raises(DataError, match=message):
            stream_in_place(prefix, teacher)
    empty = write_megatron(tmp_path / "e", [])
    with pytest.raises(
        DataError, match=r"e.idx' holds no sequences: the text that it was made from was empty"
    ):
        bring(empty, teacher, tmp_path / "out")
    one = write_megatron(tmp_path / "one", [[[5] * 20]])
    assert bring([empty, one], teacher, tmp_path / "both").documents == 1


def test_dictionaries_are_split_at_line_feeds_and_counts_may_be_anything(tmp_path, teacher):
    symbols = ["a", "\x85", "\u2028", "\x0b", "\x1c", "b\u2029c", "\r", "x y", "\xa0"]
    counts = ["1", "-3", "1.5e9", "many", "٣", "0", "NaN", "7 #fairseq:overwrite", "12"]
    lines = "".join(f"{symbol} {count}\n" for symbol, count in zip(symbols, counts, strict=True))
    path = tmp_path / "dict.txt"
    loaded = AutoTokenizer.from_pretrained(teacher)
    for raw in (lines, lines.removesuffix("\n"), lines.replace("\n", "\r\n")):
        path.write_bytes(raw.encode())
        mapping = from_fairseq_dict(path, loaded, None)
        assert mapping.names[4:] == symbols
        assert mapping.ids[:3] == [DROPPED, DROPPED, END] and mapping.ids[4] == loaded.get_vocab()["a"]
    path.write_text("a 1\n\nb 2\n")
    with pytest.raises(DataError, match=r"dict.txt', line 2: `symbol count` is expected, got ''"):
        from_fairseq_dict(path, loaded, None)


def test_a_source_of_the_same_vocabulary_and_other_lower_casing_is_refused(tmp_path, teacher):
    cased = with_normalizer(teacher, tmp_path / "cased", normalizers.BertNormalizer(lowercase=False))
    prefix = write_megatron(tmp_path / "m", [[[5] * 20]])
    with pytest.raises(
        DataError,
        match=r"has the teacher's vocabulary, but another lower-casing, .* becomes .*; if the ids are the teacher's",
    ):
        bring(prefix, teacher, tmp_path / "out", source_tokenizer=cased)


def test_tokens_of_no_sequence_are_not_read_in_place(tmp_path, teacher):
    prefix = write_megatron(tmp_path / "m", [[[5] * 27 + [SEP]]])
    with prefix.with_suffix(".bin").open("ab") as file:
        file.write(np.full(14, 9, "<u2").tobytes())
    found, rows = stream_in_place(prefix, teacher)
    assert rows.num_rows == 2 and found == [5] * 27 + [SEP]
