"""Other programs' token files: parsed by their layout to the byte, mapped by name, or refused."""

import importlib.util
import io
import json
import os
import struct
import tarfile

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minilm.data.builder.build import import_data
from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.read.indexed_dataset import IndexedRows
from minilm.data.read.reader import RowReader
from minilm.data.read.rows import Corpus
from minilm.data.sources import megatron
from minilm.data.sources.indexed import read_index
from minilm.data.sources.tar_members import members
from minilm.data.storage import remote
from minilm.data.storage.retry import RetryPolicy
from minilm.data.stream import Stream
from minilm.data.tokenizer import load_tokenizer
from tests.bad_server import BadServer
from tests.data_cases import CLS, SEP, in_a_child, make_data, make_documents, make_tokenizer, write_megatron

SMALL = {"seq_len": 16, "rows_per_block": 8, "shard_bytes": 20_000, "processes": 1}


def write_fairseq(prefix, sequences, dtype="<u2", code=8):
    lengths = [len(s) for s in sequences]
    pointers = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    raw = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, code, len(sequences))
    raw += np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(raw)
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    return prefix


def write_legacy(prefix, sequences):
    lengths = [len(s) for s in sequences]
    raw = b"TNTIDX\x00\x00" + struct.pack("<QQQQQ", 1, 4, 4, len(sequences), len(sequences))
    raw += np.arange(len(sequences) + 1, dtype="<i8").tobytes()
    raw += np.cumsum([0, *lengths]).astype("<i8").tobytes() + np.array(lengths, "<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(raw)
    prefix.with_suffix(".bin").write_bytes(b"".join((np.array(s, "<i4") + 1).tobytes() for s in sequences))
    return prefix


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def coded(teacher):
    """Token ids of documents, by the teacher's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    return [
        tokenizer(d, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        for d in make_documents(40)
    ]


def documents_in(folder):
    """Documents of a data set packed "document", each as one tuple, from rows in order of the shuffle."""
    reader = RowReader(folder)
    batch = reader.read(range(reader.num_rows))
    mask = batch.mask if batch.mask is not None else torch.ones_like(batch.input_ids, dtype=torch.bool)
    return sorted(tuple(row[m][1:-1].tolist()) for row, m in zip(batch.input_ids, mask, strict=True))


def pieces_of(coded):
    return sorted(tuple(ids[i : i + 14]) for ids in coded for i in range(0, len(ids), 14))


@pytest.mark.parametrize(("dtype", "code", "modes"), [("<u2", 8, False), ("<i4", 4, True), ("<i8", 5, False)])
def test_megatron_documents_arrive_whole(tmp_path, teacher, coded, dtype, code, modes):
    documents = [[ids[:3], ids[3:]] if len(ids) > 3 else [ids] for ids in coded]
    prefix = write_megatron(tmp_path / "m", documents, dtype, code, modes)
    options = {"source_tokenizer": teacher}
    report = import_data(
        [prefix], teacher, tmp_path / "out", source="megatron", options=options, packing="document", **SMALL
    )
    assert report.documents == 40 and documents_in(tmp_path / "out") == pieces_of(coded)
    again = import_data(
        [prefix], teacher, tmp_path / "out", source="megatron", options=options, packing="document", **SMALL
    )
    assert again == report


def test_megatron_units_do_not_change_the_bytes(tmp_path, teacher, coded, monkeypatch):
    prefix = write_megatron(tmp_path / "m", [[ids] for ids in coded])
    options = {"source": "megatron", "options": {"source_tokenizer": teacher}, "held_out": 0.2, **SMALL}
    one = import_data([prefix], teacher, tmp_path / "one", **options)
    monkeypatch.setattr("minilm.data.sources.megatron.UNIT_TOKENS", 300)
    many = import_data([prefix], teacher, tmp_path / "many", **options)
    assert one.fingerprint == many.fingerprint and many.held_out_documents > 0


def fairseq_dict(tmp_path, names):
    path = tmp_path / "dict.txt"
    path.write_text("".join(f"{name} {1000 - i}\n" for i, name in enumerate(names)) + "madeupword0000 0\n")
    return path


def as_fairseq(coded, teacher, separated):
    """The documents in fairseq's own numbering: (names of the dictionary, sequences)."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    names = list(reversed([t for t in tokenizer.get_vocab() if not t.startswith("[")]))
    number = {name: i + 4 for i, name in enumerate(names)}
    sequences = []
    for ids in coded:
        own = [number[token] for token in tokenizer.convert_ids_to_tokens(ids)]
        cut = len(own) // 2
        sequences += [[*own[:cut], 2], [*own[cut:], 2], [2]] if separated else [[*own, 2]]
    return names, sequences


@pytest.mark.parametrize("separated", [True, False])
@pytest.mark.parametrize("layout", ["fairseq", "fairseq-legacy"])
def test_fairseq_documents_arrive_whole_and_mapped_by_name(tmp_path, teacher, coded, separated, layout):
    names, sequences = as_fairseq(coded, teacher, separated)
    write = write_fairseq if layout == "fairseq" else write_legacy
    prefix = write(tmp_path / "f", sequences)
    options = {"dict": str(fairseq_dict(tmp_path, names))}
    report = import_data(
        [prefix], teacher, tmp_path / "out", source=layout, options=options, packing="document", **SMALL
    )
    assert report.documents == 40 and documents_in(tmp_path / "out") == pieces_of(coded)


def test_fairseq_symbols_that_are_numbers_need_the_encoder(tmp_path, teacher, coded):
    names, sequences = as_fairseq(coded, teacher, True)
    prefix = write_fairseq(tmp_path / "f", sequences)
    numbers = fairseq_dict(tmp_path, [str(i) for i in range(len(names))])
    call = {"source": "fairseq", "packing": "document", **SMALL}
    with pytest.raises(
        DataError, match=r"symbols of .* are numbers of another vocabulary; name its encoder\.json"
    ):
        import_data([prefix], teacher, tmp_path / "out", options={"dict": str(numbers)}, **call)
    (tmp_path / "encoder.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    options = {"dict": str(numbers), "encoder": str(tmp_path / "encoder.json")}
    import_data([prefix], teacher, tmp_path / "out", options=options, **call)
    assert documents_in(tmp_path / "out") == pieces_of(coded)


def test_a_token_without_namesake_is_refused(tmp_path, teacher, coded):
    other = make_tokenizer(tmp_path / "other", extra_tokens=3)
    call = {"source": "megatron", "options": {"source_tokenizer": other}, **SMALL}
    fine = write_megatron(tmp_path / "fine", [[ids] for ids in coded])
    import_data([fine], teacher, tmp_path / "fine-out", **call)
    extra = len(AutoTokenizer.from_pretrained(teacher))
    bad = write_megatron(tmp_path / "bad", [[ids] for ids in [*coded, [5, extra + 1]]])
    with pytest.raises(
        DataError, match=rf"token '\[x1\]' \(id {extra + 1}\) is not in the teacher's vocabulary"
    ):
        import_data([bad], teacher, tmp_path / "out", **call)
    worse = write_megatron(tmp_path / "worse", [[[5, 60_000]]])
    with pytest.raises(DataError, match="token id 60000 is outside the named vocabulary of"):
        import_data([worse], teacher, tmp_path / "out", **call)
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_say_their_vocabulary_are_refused(tmp_path, teacher, coded):
    prefix = write_megatron(tmp_path / "m", [[ids] for ids in coded])
    with pytest.raises(
        DataError, match=r"files of megatron do not say .* name the tokenizer .* `source_tokenizer`"
    ):
        import_data([prefix], teacher, tmp_path / "out", source="megatron", **SMALL)
    with pytest.raises(DataError, match=r"files of fairseq need fairseq's dict\.txt"):
        import_data([prefix], teacher, tmp_path / "out", source="fairseq", **SMALL)
    with pytest.raises(DataError, match=r"source 'megatron' has no option 'dict'; allowed: source_tokenizer"):
        import_data([prefix], teacher, tmp_path / "out", source="megatron", options={"dict": "x"}, **SMALL)
    with pytest.raises(
        DataError, match="source 'arrow' is not known; there are: fairseq, fairseq-legacy, megatron"
    ):
        import_data([prefix], teacher, tmp_path / "out", source="arrow", **SMALL)


def test_layouts_are_told_apart_and_damage_is_named(tmp_path):
    megatron = write_megatron(tmp_path / "m", [[[1, 2], [3]], [[4]]])
    fairseq = write_fairseq(tmp_path / "f", [[1, 2], [3]])
    assert read_index(megatron, "megatron").documents.tolist() == [0, 2, 3]
    assert read_index(f"{fairseq}.idx", "fairseq").lengths.tolist() == [2, 1]
    with pytest.raises(
        DataError, match=r"has the layout of fairseq, not of megatron; import it with --from fairseq"
    ):
        read_index(fairseq, "megatron")
    with pytest.raises(DataError, match="has the layout of megatron, not of fairseq"):
        read_index(megatron, "fairseq")
    whole = megatron.with_suffix(".idx").read_bytes()
    for cut in (3, 20, 33, len(whole) - 1):
        megatron.with_suffix(".idx").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"(cut short|no index)"):
            read_index(megatron, "megatron")
    for at, message in ((9, "has version 0"), (17, "values of type 9"), (-8, "document bounds")):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        megatron.with_suffix(".idx").write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read_index(megatron, "megatron")
    megatron.with_suffix(".idx").write_bytes(whole)
    megatron.with_suffix(".bin").write_bytes(b"\x01\x00")
    with pytest.raises(DataError, match="holds 1 tokens, but its index points up to 4"):
        read_index(megatron, "megatron")
    with pytest.raises(DataError, match=r"nothing\.idx' is missing; name the common prefix"):
        read_index(tmp_path / "nothing", "megatron")


def test_a_pair_is_read_in_place(tmp_path, teacher, coded):
    prefix = write_megatron(tmp_path / "m", [[[*ids, SEP]] for ids in coded])
    rows = IndexedRows(prefix, tokenizer=teacher, seq_len=16, source_tokenizer=teacher)
    stream = [token for ids in coded for token in (*ids, SEP)]
    batch = rows.read([1, 0])
    assert batch.input_ids[1].tolist() == [CLS, *stream[:14], SEP]
    assert batch.input_ids[0].tolist() == [CLS, *stream[14:28], SEP]
    assert rows.num_rows == len(stream) // 14
    with pytest.raises(DataError, match=r"row \d+ does not exist; these data have rows 0 to \d+"):
        rows.read([rows.num_rows])
    with pytest.raises(DataError, match="files of megatron do not say which vocabulary"):
        IndexedRows(prefix, tokenizer=teacher, seq_len=16)
    names, sequences = as_fairseq(coded, teacher, False)
    legacy = write_legacy(tmp_path / "l", sequences)
    same = IndexedRows(legacy, tokenizer=teacher, seq_len=16, fairseq_dict=fairseq_dict(tmp_path, names))
    assert torch.equal(same.read(range(same.num_rows)).input_ids, rows.read(range(rows.num_rows)).input_ids)
    assert same.fingerprint != rows.fingerprint


def test_a_pair_that_is_cut_while_it_is_read_is_an_error_and_kills_nobody(tmp_path, teacher, coded):
    prefix = write_megatron(tmp_path / "m", [[ids] for ids in coded * 12])
    assert prefix.with_suffix(".bin").stat().st_size > 3 * 4096

    def work():
        rows = IndexedRows(prefix, tokenizer=teacher, seq_len=16, source_tokenizer=teacher)
        rows.read([0, rows.num_rows - 1])
        os.truncate(prefix.with_suffix(".bin"), 4097)
        for _ in range(2):  # it stays so
            with pytest.raises(
                DataError, match=r"m.bin', at byte \d+: its bytes cannot be read .* put the file back"
            ):
                rows.read([0, rows.num_rows - 1])
        return "done"

    assert in_a_child(work) == "done"


def test_a_pair_that_is_cut_while_it_is_imported_is_an_error_and_kills_nobody(tmp_path, teacher, coded):
    prefix = write_megatron(tmp_path / "pair", [[ids] for ids in coded * 40])
    plan = megatron.plan([prefix], load_tokenizer(teacher), {"source_tokenizer": teacher})

    def read_and_cut():
        documents = megatron.read(plan.spec, plan.units[0])
        next(documents)
        os.truncate(f"{prefix}.bin", 3 * 4096)
        with pytest.raises(DataError) as caught:
            list(documents)
        return caught.value

    assert "pair.bin' is cut short at byte 12288, though it was longer before" in in_a_child(read_and_cut)


def test_a_pair_in_place_is_a_stream_and_a_corpus(tmp_path, teacher, coded):
    prefix = write_megatron(tmp_path / "m", [[ids] for ids in coded])
    rows = IndexedRows(prefix, tokenizer=teacher, seq_len=16, source_tokenizer=teacher)
    stream = Stream(rows, seed=1, batch=8, micro_batch=4)
    assert stream.micro_batch(3, 1).input_ids.shape == (4, 16) and stream.fingerprint == rows.fingerprint
    folder = make_data(tmp_path / "d")
    mixed = Stream([Corpus(rows, 1), Corpus(RowReader(folder), 1)], seed=1, batch=8, micro_batch=8)
    assert mixed.micro_batch(0, 0).input_ids.shape == (8, 16)
    assert mixed.counters.rows == 4 + 8


def write_tar(path, samples):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, raw in samples:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def npy(ids):
    buffer = io.BytesIO()
    np.save(buffer, np.array(ids, np.int32))
    return buffer.getvalue()


def test_tars_of_text_json_and_tokens(tmp_path, teacher, coded):
    documents = make_documents(40)
    call = {"source": "webdataset", "packing": "document", **SMALL}
    cases = {
        "txt": [(f"{i:04d}.txt", d.encode()) for i, d in enumerate(documents)],
        "json": [
            (f"{i:04d}.json", json.dumps({"id": "x", "t": d}).encode()) for i, d in enumerate(documents)
        ],
        "npy": [(f"{i:04d}.tokens.npy", npy(ids)) for i, ids in enumerate(coded)],
    }
    for kind, samples in cases.items():
        half = len(samples) // 2
        tars = [
            write_tar(tmp_path / f"{kind}-{n}.tar", part)
            for n, part in enumerate((samples[:half], samples[half:]))
        ]
        options = {"source_tokenizer": teacher} if kind == "npy" else {}
        import_data(tars, teacher, tmp_path / kind, options=options, **call)
        assert documents_in(tmp_path / kind) == pieces_of(coded)
    manifests = [load_manifest(tmp_path / kind).fingerprint for kind in cases]
    assert manifests[0] == manifests[1] == manifests[2]


def test_tars_are_read_strictly(tmp_path, teacher):
    samples = [(f"{i:04d}.txt", d.encode()) for i, d in enumerate(make_documents(20))]
    path = write_tar(tmp_path / "a.tar", samples)
    whole = path.read_bytes()
    second = 512 + -(-len(samples[0][1]) // 512) * 512

    def read():
        import_data([path], teacher, tmp_path / "out", source="webdataset", **SMALL)

    for damaged, message in (
        (whole[: second + 150] + b"x" + whole[second + 151 :], rf"is damaged at byte {second}"),
        (whole[: second + 100], rf"is cut short behind '0000.txt', at byte {second + 100}"),
        (whole[:5000], "cut short"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read()
    write_tar(path, [*samples, *((f"x{i}.bin", b"123") for i in range(21))])
    with pytest.raises(
        DataError, match=r"51\.2% of 41 records gave no document, .* 21 without the part 'txt'"
    ):
        read()
    write_tar(path, [("x.cls", b"1")])
    with pytest.raises(DataError, match=r"has no field None of kind txt, json, npy; its samples have: cls"):
        read()
    assert not (tmp_path / "out").exists()


def test_nothing_in_a_tar_or_its_name_is_executed(tmp_path, teacher):
    bomb = np.array([{"a": 1}], dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, bomb, allow_pickle=True)
    path = write_tar(tmp_path / "a.tar", [("0.npy", buffer.getvalue())])
    call = {"source": "webdataset", "options": {"source_tokenizer": teacher}, **SMALL}
    with pytest.raises(DataError, match=r"Object arrays cannot be loaded"):
        import_data([path], teacher, tmp_path / "out", **call)
    for url, message in (
        (f"pipe:touch {tmp_path}/touched", "scheme 'pipe' is not read by the importer"),
        (f"pipe://touch {tmp_path}/touched", "cannot be read from; allowed are URLs of"),
    ):
        with pytest.raises(DataError, match=message):
            import_data([url], teacher, tmp_path / "out", **call)
    assert not (tmp_path / "touched").exists()


def test_a_tar_is_walked_the_same_however_its_bytes_come(tmp_path):
    samples = [(f"{i:04d}.txt", b"x" * (i * 97 % 1500)) for i in range(30)]
    raw = write_tar(tmp_path / "a.tar", samples).read_bytes()

    class Slow(io.BytesIO):
        most = 0

        def read(self, size=-1):
            return super().read(min(self.most, size))

    for most in (1, 511, 512, 513, 4096, len(raw)):
        stream = Slow(raw)
        stream.most = most
        assert [(m.name, m.read()) for m in members(stream, "a.tar")] == samples
    for cut in (0, 100, 512, 5000):
        with pytest.raises(DataError, match=f"cut short behind .* at byte {cut}"):
            list(members(io.BytesIO(raw[:cut]), "a.tar"))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Tars behind a server, and what they would give from the disk."""
    monkeypatch.setattr(remote, "_PIECE_BYTES", 4096)
    quick = RetryPolicy(tries=8, first_wait_seconds=0.01, longest_wait_seconds=0.02, request_seconds=1.0)
    monkeypatch.setattr(remote, "RetryPolicy", lambda: quick)
    folder = tmp_path / "served"
    folder.mkdir()
    documents = make_documents(40)
    for n in range(2):
        part = [(f"{i:04d}.txt", d.encode()) for i, d in enumerate(documents) if i // 20 == n]
        write_tar(folder / f"{n}.tar", part)
    running = BadServer(folder)
    yield running
    running.close()


@pytest.mark.parametrize("fault", ["none", "500", "short", "no-range"])
def test_tars_behind_urls_give_the_same_as_files(tmp_path, teacher, served, fault):
    call = {"source": "webdataset", **SMALL}
    near = import_data(sorted(served.folder.iterdir()), teacher, tmp_path / "near", **call)
    urls = [f"{served.url}/{n}.tar" for n in range(2)]
    if fault != "none":
        served.faults = {"0.tar": [fault], "1.tar": ["none"] * 3 + [fault]}
    far = import_data(urls, teacher, tmp_path / "far", **call)
    assert far.fingerprint == near.fingerprint
    before = len(served.requests)
    assert import_data(urls, teacher, tmp_path / "far", **call) == far
    assert len(served.requests) - before < 12  # found done, by what the server says of the tars


def test_a_tar_that_cannot_be_had_or_changes_is_an_error_with_its_url(tmp_path, teacher, served):
    call = {"source": "webdataset", **SMALL}
    url = f"{served.url}/1.tar"

    def read():
        import_data([f"{served.url}/0.tar", url], teacher, tmp_path / "out", **call)

    for fault, message in (("404", "no such object"), ("403", "refuses"), ("500", r"tried 8 times")):
        served.always = {"1.tar": fault}
        with pytest.raises(DataError, match=rf"{url}.*{message}"):
            read()
    served.always = {}
    raw = (served.folder / "1.tar").read_bytes()
    (served.folder / "1.tar").write_bytes(raw[:5000])
    with pytest.raises(DataError, match=rf"{url}' is (no tar, or is )?cut short"):
        read()
    (served.folder / "1.tar").write_bytes(raw)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(
            served, "tag", lambda path: str(len(served.requests))
        )  # another object at every request
        with pytest.raises(
            DataError, match=rf"{served.url}/\d.tar: the object was replaced while it was read"
        ):
            read()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_files_of_the_real_megatron_writer(tmp_path, teacher, coded):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "real.bin"), dtype=np.uint16)
    for ids in coded:
        builder.add_document(torch.tensor(ids), [2, len(ids) - 2] if len(ids) > 2 else [len(ids)])
    builder.finalize(str(tmp_path / "real.idx"))
    mine = write_megatron(tmp_path / "mine", [[i[:2], i[2:]] if len(i) > 2 else [i] for i in coded])
    for ending in (".idx", ".bin"):
        assert (tmp_path / f"real{ending}").read_bytes() == mine.with_suffix(ending).read_bytes()
    options = {"source_tokenizer": teacher}
    import_data(
        [tmp_path / "real"],
        teacher,
        tmp_path / "o",
        source="megatron",
        options=options,
        packing="document",
        **SMALL,
    )
    assert documents_in(tmp_path / "o") == pieces_of(coded)
