"""Packed text: all members, streams and frames are read, whatever the file is called; what is none is an error."""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from minilm.data.errors import DataError
from minilm.data.sources import text
from minilm.data.sources.unpack import open_unpacked
from tests.data_cases import make_documents

# zstd with a checksum, as its program writes it: without one no reader can know of all damage in a frame
PACK_ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress
PACK = {"gz": gzip.compress, "xz": lzma.compress, "zst": PACK_ZSTD, "bz2": bz2.compress}
PROGRAMS = {"gz": "gzip", "xz": "xz", "zst": "zstd", "bz2": "bzip2"}
FIRST, SECOND = b"one\ntwo\n", b"three\nfour\n"
LINES = ["one", "two", "three", "four"]


def read(path):
    """The documents of a file or folder, as a build reads them."""
    plan = text.plan([path], None, {})
    plan = json.loads(json.dumps([plan.spec, plan.units]))  # as it travels
    found = sorted((d.file, d.position, d.content) for unit in plan[1] for d in text.read(plan[0], unit))
    return [content for _, _, content in found]


def written(path, raw):
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("packer", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.{}", "a.txt.GZ", "a.txt.xz", "a.text.bz2"])
def test_all_parts_are_read_whatever_the_file_is_called(tmp_path, packer, name):
    pack = PACK[packer]
    raw = pack(FIRST) + pack(b"") + pack(SECOND)
    assert read(written(tmp_path / name.format(packer), raw)) == LINES


def test_legal_padding_is_skipped(tmp_path):
    one, two = lzma.compress(FIRST), lzma.compress(SECOND)
    assert read(written(tmp_path / "a.txt.xz", one + bytes(4) + two + bytes(8))) == LINES
    raw = gzip.compress(FIRST) + gzip.compress(SECOND)
    assert read(written(tmp_path / "b.txt.gz", raw + bytes(512 - len(raw) % 512))) == LINES  # of a tape


def test_zstd_in_all_its_shapes(tmp_path):
    skippable = b"\x53\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"nothing"
    pack = zstandard.compress
    raw = skippable + pack(FIRST) + skippable + pack(SECOND) + skippable
    assert read(written(tmp_path / "skippable.txt.zst", raw)) == LINES
    big = "\n".join(make_documents(500)).encode()
    for log in (28, 31):
        parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True, write_checksum=True)
        writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        raw = writer.compress(big) + writer.flush()
        assert zstandard.get_frame_parameters(raw).window_size == 1 << log
        assert len(read(written(tmp_path / f"{log}.txt.zst", raw))) == 500


def test_gzip_headers_with_everything_in_them(tmp_path):
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packed.compress(FIRST) + packed.flush()
    begin = (
        b"\x1f\x8b\x08\x1e" + bytes(4) + b"\x00\x03" + b"\x04\x00ABCD" + b"name.txt\x00" + b"a comment\x00"
    )
    begin += (zlib.crc32(begin) & 0xFFFF).to_bytes(2, "little")
    end = zlib.crc32(FIRST).to_bytes(4, "little") + len(FIRST).to_bytes(4, "little")
    assert read(written(tmp_path / "a.txt.gz", begin + body + end + gzip.compress(SECOND))) == LINES


@pytest.mark.parametrize("packer", PACK)
def test_empty_packed_parts_are_no_text(tmp_path, packer):
    pack = PACK[packer]
    assert read(written(tmp_path / f"a.txt.{packer}", pack(b"") + pack(FIRST) + pack(b""))) == ["one", "two"]
    (tmp_path / f"b.txt.{packer}").write_bytes(pack(b""))
    assert read(tmp_path) == ["one", "two"]


def damage(packer):
    pack = PACK[packer]
    one, two = pack(FIRST), pack(SECOND)
    bad = bytearray(two)
    bad[len(bad) // 2] ^= 1
    yield "second part damaged", one + bytes(bad)
    yield "second part cut", one + two[:-3]
    yield "begin of a second part", one + two[:3]
    yield "words behind", one + b"and some words\n"
    yield "another packer behind", one + PACK["xz" if packer == "gz" else "gz"](SECOND)
    yield "no part", b"not packed\n"
    if packer != "gz":
        yield "zeros behind", one + bytes(3)


@pytest.mark.parametrize("packer", PACK)
def test_what_is_no_whole_part_is_an_error_of_one_line_with_the_file(tmp_path, packer):
    for what, raw in damage(packer):
        path = written(tmp_path / f"{what}.txt.{packer}", raw)
        with pytest.raises(DataError) as caught:
            read(path)
        told = str(caught.value)
        assert str(path) in told and "\n" not in told and len(told) < 300 + len(str(path)), what
        if what == "no part":
            assert f"is not packed, though its name ends in .{packer}; name it" in told
        else:
            assert "at byte" in told or "before byte" in told, told


def test_words_that_begin_like_a_packer_are_words(tmp_path):
    assert read(written(tmp_path / "a.txt", b"BZh is no word\nPAR1 neither\n")) == [
        "BZh is no word",
        "PAR1 neither",
    ]
    assert read(written(tmp_path / "b.txt", b"PAR1 the first\nthe last PAR1")) == [
        "PAR1 the first",
        "the last PAR1",
    ]


def tar_bytes():
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return raw.getvalue()


def npy_bytes():
    raw = io.BytesIO()
    np.save(raw, np.arange(3))
    return raw.getvalue()


OTHER = {
    "a PNG picture": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "a JPEG picture": b"\xff\xd8\xff\xe0" + bytes(30),
    "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "a zip archive": b"PK\x03\x04" + bytes(30),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c" + bytes(30),
    "packed with lz4": b"\x04\x22\x4d\x18" + bytes(30),
    "a tar archive": tar_bytes(),
    "a NumPy array": npy_bytes(),
    "a pickle": b"\x80\x04\x95" + bytes(30),
    "an SQLite database": b"SQLite format 3\x00" + bytes(30),
    "packed with gzip once more": gzip.compress(FIRST),
    "an index of Megatron": b"MMIDIDX\x00\x00" + bytes(30),
    "an arrow file": b"ARROW1\x00\x00" + bytes(30),
}


@pytest.mark.parametrize("what", OTHER)
@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv.gz"])
def test_other_files_under_a_name_of_text_are_named(tmp_path, what, ending):
    packer = PACK.get(ending.rpartition(".")[2], bytes)
    if packer is bytes and "once more" in what:
        pytest.skip("packed once, which is read")
    path = written(tmp_path / f"a.{ending}", packer(OTHER[what]))
    with pytest.raises(DataError, match=what) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.parquet"])
def test_a_parquet_file_is_read_whatever_it_is_called(tmp_path, name):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / name)
    assert read(tmp_path / name) == ["one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("packer", PACK)
def test_a_small_file_that_unpacks_to_much_costs_little_memory(tmp_path, packer):
    path = written(tmp_path / f"a.txt.{packer}", PACK[packer](b"\0" * 330_000_000))
    code = f"""
import re
from pathlib import Path
from minilm.data.sources.unpack import open_unpacked
def peak():  # getrusage remembers the peak of the process that forked this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
with open_unpacked({str(path)!r}) as stream:
    assert sum(len(piece) for piece in iter(lambda: stream.read(1 << 20), b"")) == 330_000_000
print((peak() - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(done.stdout) < 120


def differences(tmp_path, packer, rng, count):
    """Damages packed text `count` times; a line for each whose bytes the packer's own program gives otherwise."""
    program = PROGRAMS[packer]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    raw = "\n".join(make_documents(60)).encode()
    whole = PACK[packer](raw[:3000]) + PACK[packer](raw[3000:])
    path, wrong = tmp_path / f"a.txt.{packer}", []
    for _ in range(count):
        damaged, at = bytearray(whole), rng.randrange(len(whole))
        match rng.choice(["flip", "flip", "cut", "insert", "append", "repeat", "drop"]):
            case "flip":
                damaged[at] ^= 1 << rng.randrange(8)
            case "cut":
                del damaged[at:]
            case "insert":
                damaged[at:at] = rng.randbytes(rng.randint(1, 9))
            case "append":
                damaged += rng.choice([rng.randbytes(rng.randint(1, 40)), bytes(rng.randint(1, 40))])
            case "repeat":
                damaged += whole[: rng.choice([at, len(whole)])]
            case "drop":
                del damaged[at : at + rng.randint(1, 9)]
        path.write_bytes(damaged)
        done = subprocess.run([program, "-dc", str(path)], capture_output=True, check=False)
        try:
            read(path)
            with open_unpacked(str(path)) as stream:
                found = stream.read()
        except DataError as error:
            if "\n" in str(error) or str(path) not in str(error):
                wrong.append(f"{packer}: {error}")
            continue
        if done.returncode or found != done.stdout:
            wrong.append(f"{packer}: {len(found)} bytes, {program} {len(done.stdout)} {done.stderr[:80]!r}")
    return wrong


@pytest.mark.parametrize("packer", PACK)
def test_damage_is_never_silent(tmp_path, packer):
    assert differences(tmp_path, packer, random.Random(1), 50) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("packer", PACK)
def test_a_thousand_damages_are_never_silent(tmp_path, packer):
    assert differences(tmp_path, packer, random.Random(2), 1000) == []
