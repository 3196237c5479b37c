"""Tars of others: every header is walked; whatever GNU tar writes is read as it reads it, or refused by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import tarfile

import pytest
import zstandard

from minilm.data.builder.build import import_data
from minilm.data.errors import DataError
from minilm.data.sources.accounts import LeftOut
from minilm.data.sources.plugin import Document
from minilm.data.sources.tar_members import members
from minilm.data.sources.unpack import unpacked_stream
from minilm.data.sources.web import plan, read
from tests.data_cases import make_documents, make_tokenizer
from tests.test_data_foreign_formats import SMALL, npy, write_tar

GNU_TAR = (
    shutil.which("tar") is not None
    and "GNU" in subprocess.run(["tar", "--version"], capture_output=True, text=True, check=False).stdout
)
needs_gnu_tar = pytest.mark.skipif(not GNU_TAR, reason="GNU tar is not installed")
PACKERS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor(
        write_checksum=True
    ).compress,  # as zstd writes it; without, damage is not told
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("teacher"))


def numbered(first, end):
    return [(f"{i:06d}.txt", f"sample number {i}".encode()) for i in range(first, end)]


def texts(*paths, notes=None, **options):
    """What the import takes from tars, in order."""
    made = plan(list(paths), None, options)
    if notes is not None:
        notes += made.notes
    spec = json.loads(json.dumps(made.spec))
    return [document.content for unit in made.units for document in read(spec, unit) if is_document(document)]


def is_document(item):
    return isinstance(item, Document)


def items(path, **options):
    """Texts, and what was left out."""
    made = plan([path], None, options)
    found = [item for unit in made.units for item in read(made.spec, unit)]
    return [item.content if is_document(item) else item for item in found]


def walked(raw):
    return [
        (m.name, m.read()) for m in members(unpacked_stream(io.BytesIO(raw), "a"), "a") if m.kind == "file"
    ]


def test_a_zeroed_header_in_the_middle_is_an_error_with_its_byte(tmp_path, teacher):
    path = write_tar(tmp_path / "a.tar", numbered(0, 8))
    whole = path.read_bytes()
    for header in range(0, 8 * 1024, 1024):
        path.write_bytes(whole[:header] + bytes(512) + whole[header + 512 :])
        with pytest.raises(DataError, match=rf"is damaged at byte {header} \(a lone block of zeros"):
            import_data([path], teacher, tmp_path / "out", source="webdataset", **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_damaged_header_is_an_error_with_its_byte(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered(0, 8))
    whole = path.read_bytes()
    for header in range(1024, 8 * 1024, 1024):
        for at in (0, 124, 148, 156, 257):
            raw = bytearray(whole)
            raw[header + at] ^= 1
            path.write_bytes(raw)
            with pytest.raises(DataError, match=f"a.tar' is damaged at byte {header} "):
                texts(path)


def test_archives_one_after_another_are_all_read_and_told(tmp_path):
    parts = [write_tar(tmp_path / f"{n}.tar", numbered(0, 3 + n)).read_bytes() for n in range(3)]
    path, notes = tmp_path / "all.tar", []
    path.write_bytes(b"".join(parts))
    assert len(texts(path, notes=notes)) == 12  # equal names in different archives are different samples
    assert "(12 samples, 3 archives one after another)" in notes[0]
    shorter = parts[0].rstrip(b"\0")
    shorter += bytes(-len(shorter) % 512)
    path.write_bytes(shorter + bytes(1024) + parts[1])
    assert len(texts(path)) == 7
    path.write_bytes(shorter + bytes(512))
    assert len(texts(path)) == 3  # one block of zeros at the very end
    path.write_bytes(shorter)
    with pytest.raises(DataError, match=r"cut short behind '000002.txt', at byte 3072"):
        texts(path)
    path.write_bytes(parts[0] + b"and more")
    with pytest.raises(DataError, match=rf"is cut short behind '000002.txt', at byte {len(parts[0]) + 8}"):
        texts(path)
    path.write_bytes(parts[0] + b"x" * 512)
    with pytest.raises(DataError, match=f"is damaged at byte {len(parts[0])}"):
        texts(path)


def test_doubled_names_are_refused_with_both_places(tmp_path):
    for where in (1, 4):
        samples = numbered(0, 5)
        samples.insert(where, ("000000.txt", b"another"))
        path = write_tar(tmp_path / "a.tar", samples)
        with pytest.raises(
            DataError, match=rf"holds '000000.txt' twice, at bytes 0 and {1024 * where}; which one"
        ):
            texts(path)
    path = write_tar(tmp_path / "b.tar", [("0.txt", b"one"), ("0.TXT", b"two")])
    with pytest.raises(DataError, match="holds part 'txt' of sample '0' twice, at bytes 0 and 1024"):
        texts(path)


def test_foreign_members_are_left_out_and_counted(tmp_path):
    foreign = [
        "README",
        "README.txt",
        "LICENSE.md",
        ".DS_Store",
        "._000000.txt",
        "__MACOSX/000000.txt",
        "sub/.hid.txt",
    ]
    samples = [(name, b"no sample at all") for name in foreign]
    both = [*samples[:2], *numbered(0, 2), *samples[2:], *numbered(2, 4)]
    notes = []
    path = write_tar(tmp_path / "a.tar", both)
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert texts(path, notes=notes) == [raw.decode() for _, raw in numbered(0, 4)]
    assert (
        "(4 samples, 7 members that are no samples left out (README, README.txt, LICENSE.md, …))" in notes[0]
    )
    with pytest.raises(DataError, match="holds no samples"):
        texts(write_tar(tmp_path / "b.tar", samples))


def add_special(path, kind):
    with tarfile.open(path, "w") as tar:
        for name, raw in numbered(0, 2):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
        info = tarfile.TarInfo("000002.txt")
        info.type, info.linkname = kind, "000000.txt"
        tar.addfile(info)
    return path


@pytest.mark.parametrize(
    ("kind", "what"), [(tarfile.LNKTYPE, "hard link"), (tarfile.SYMTYPE, "symbolic link")]
)
def test_a_text_that_is_a_link_is_refused_and_another_part_that_is_one_is_no_matter(tmp_path, kind, what):
    path = add_special(tmp_path / "a.tar", kind)
    with pytest.raises(
        DataError,
        match=rf"at byte 2048: '000002.txt' is a {what} to '000000.txt', not the text itself; write it with tar",
    ):
        texts(path)
    with tarfile.open(path, "w") as tar:
        for name, raw in [("0.txt", b"the text"), ("1.txt", b"more text")]:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
            link = tarfile.TarInfo(name.replace("txt", "jpg"))
            link.type, link.linkname = kind, "other.jpg"
            tar.addfile(link)
    assert texts(path) == ["the text", "more text"]


@pytest.mark.parametrize("packer", PACKERS)
def test_packed_tars_give_the_same_and_damage_in_them_is_named(tmp_path, packer):
    raw = write_tar(tmp_path / "plain.tar", numbered(0, 60)).read_bytes()
    pack, path = PACKERS[packer], tmp_path / "a.bin"  # known by its first bytes
    expected = [text.decode() for _, text in numbered(0, 60)]
    path.write_bytes(pack(raw))
    assert texts(path) == expected
    path.write_bytes(pack(raw[:5000]) + pack(raw[5000:5001]) + pack(raw[5001:]))  # several members or frames
    assert texts(path) == expected
    for damaged, message in (
        (pack(raw)[:-9], "cut short at byte|damaged before byte"),
        (pack(raw) + b"garbage behind it", "what follows at byte .* is no further packed part"),
        (pack(raw) + pack(raw)[: len(pack(raw)) // 2], "cut short at byte|damaged before byte"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"a.bin'?:? .*({message})"):
            texts(path)


def test_padding_between_packed_parts_is_legal_where_the_format_says_so():
    for packer, legal in (("gz", (1, 4, 70_000)), ("xz", (4, 8, 70_000)), ("bz2", ()), ("zst", ())):
        part = PACKERS[packer](b"abc")
        for zeros in (1, 3, 4, 8, 70_000):
            stream = unpacked_stream(io.BytesIO(part + bytes(zeros) + part), "a")
            found = b""
            try:
                while piece := stream.read(100):
                    found += piece
            except DataError:
                assert zeros not in legal and packer != "gz"
            else:
                assert found == b"abcabc" and (packer == "gz" or (packer == "xz" and zeros % 4 == 0))


def test_captions_come_before_json_and_never_hashes_or_urls(tmp_path):
    record = {
        "caption": "a photo of a cat",
        "url": "https://example.org/1.jpg",
        "sha256": "ab" * 32,
        "key": "0 1 2",
    }
    samples = [
        part
        for i in range(3)
        for part in (
            (f"{i}.jpg", b"x"),
            (f"{i}.json", json.dumps(record).encode()),
            (f"{i}.txt", f"the text {i}".encode()),
        )
    ]
    notes = []
    path = write_tar(tmp_path / "a.tar", samples)
    assert texts(path, notes=notes) == ["the text 0", "the text 1", "the text 2"]
    assert "text from part 'txt', such as 'the text 0'" in notes[0]
    path = write_tar(tmp_path / "b.tar", [s for s in samples if not s[0].endswith("txt")])
    notes.clear()
    assert texts(path, notes=notes) == ["a photo of a cat"] * 3
    assert "text from part 'json', field 'caption', such as 'a photo of a cat'" in notes[0]
    assert texts(path, text_field="url") == ["https://example.org/1.jpg"] * 3
    renamed = {("t" if key == "caption" else key): value for key, value in record.items() if key != "key"}
    path = write_tar(tmp_path / "c.tar", [("0.json", json.dumps(renamed).encode())])
    assert texts(path) == ["a photo of a cat"]  # the only one that reads like prose
    path = write_tar(
        tmp_path / "d.tar", [("0.caption", b"this one"), ("0.json", json.dumps(record).encode())]
    )
    assert texts(path) == ["this one"]


def test_where_it_is_not_clear_what_the_text_is_the_import_asks(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.en.txt", b"two languages"), ("0.de.txt", b"zwei Sprachen")])
    with pytest.raises(DataError, match=r"which part .* is not clear: de.txt, en.txt; name it with --field"):
        texts(path)
    assert texts(path, field="de.txt") == ["zwei Sprachen"]
    two = {"title": "one of two", "abstract": "that read like prose", "id": "abc"}
    path = write_tar(tmp_path / "b.tar", [("0.json", json.dumps(two).encode())])
    with pytest.raises(
        DataError, match=r"which field .* is not clear; it has: abstract, id, title; name it with"
    ):
        texts(path)
    only_ids = {"sha256": "ab" * 32, "url": "https://example.org/a b"}
    path = write_tar(tmp_path / "c.tar", [("0.json", json.dumps(only_ids).encode())])
    with pytest.raises(
        DataError, match=r"which field of part 'json' is the text is not clear; it has: sha256, url"
    ):
        texts(path)
    with pytest.raises(
        DataError, match=r"no text in field 'txt' of part 'json' of its first 1 samples; it has"
    ):
        texts(path, text_field="txt")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"t": "x y"}, "without the field 'text'"),
        ({"text": 5}, "field 'text' is a number, no text"),
        (["text"], "a record that is a list, no object"),
        ("text", "a record that is a text, no object"),
        (7, "a record that is a number, no object"),
    ],
)
def test_a_record_without_its_text_is_left_out_with_its_sample(tmp_path, record, message):
    path = write_tar(
        tmp_path / "a.tar", [("0.json", b'{"text": "fine"}'), ("1.json", json.dumps(record).encode())]
    )
    assert items(path) == ["fine", LeftOut(0, "sample '1'", message)]
    path = write_tar(tmp_path / "b.tar", [("0.json", b'{"text": "fine"}'), ("1.json", b'{"text": null}')])
    assert texts(path) == ["fine", ""]


def test_a_tar_named_twice_is_taken_once_and_said(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered(0, 4))
    (tmp_path / "soft.tar").symlink_to(path)
    (tmp_path / "hard.tar").hardlink_to(path)
    notes = []
    assert len(texts(path, path, tmp_path / "soft.tar", tmp_path / "hard.tar", notes=notes)) == 4
    assert len(notes) == 4 and f"{tmp_path / 'soft.tar'}: the same tar as {path}, taken once" in notes


def test_token_arrays_are_left_to_the_vocabulary(tmp_path, teacher):
    path = write_tar(tmp_path / "a.tar", [("0.npy", npy(range(5, 30)))])
    with pytest.raises(DataError, match="do not say which vocabulary"):
        texts(path)
    report = import_data(
        [path], teacher, tmp_path / "out", source="webdataset", options={"source_tokenizer": teacher}, **SMALL
    )
    assert report.documents == 1


def make_tree(folder, rng):
    """Files with short, long and foreign names, holes, and links."""
    names = [f"{i:03d}.txt" for i in range(6)]
    names += [f"{'deep/' * 30}{i}-{'n' * 120}.txt" for i in range(3)] + ["ünïcode-名前.txt", "two words.txt"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])))
    with (folder / "holes.txt").open("wb") as file:
        for at in (1 << 16, 1 << 18, 1 << 19, 1 << 20, (1 << 20) + (1 << 18), 1 << 21):
            file.seek(at)
            file.write(b"x" * 4096)
    (folder / "hard.txt").hardlink_to(folder / "000.txt")
    (folder / "soft.txt").symlink_to("001.txt")
    os.mkfifo(folder / "pipe")


@needs_gnu_tar
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix --sparse", "gnu --sparse", "ustar", "v7"])
def test_every_form_that_gnu_tar_writes_is_walked_as_it_lists_it(tmp_path, form):
    folder = tmp_path / "tree"
    folder.mkdir()
    make_tree(folder, random.Random(form))
    path = tmp_path / "a.tar"
    form, *sparse = form.split()
    made = ["tar", f"--format={form}", *sparse, "-cf", str(path), "-C", str(folder), "."]
    done = subprocess.run(
        made, capture_output=True, text=True, check=False
    )  # ustar and v7 leave long names out
    assert path.exists() and (done.returncode == 0 or form in ("ustar", "v7"))
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    listed = subprocess.run(
        ["tar", "--quoting-style=literal", "-tf", str(path)], capture_output=True, check=True, env=environment
    ).stdout.decode()
    found = [(m, m.read() if m.kind == "file" else b"") for m in members(io.BytesIO(path.read_bytes()), "a")]
    assert [m.name.rstrip("/") for m, _ in found] == [name.rstrip("/") for name in listed.splitlines()]
    kinds = {m.name.removeprefix("./"): m.kind for m, _ in found}
    assert sorted(kinds[name] for name in ("hard.txt", "000.txt")) == ["file", "hard link"]
    assert kinds["soft.txt"] == "symbolic link" and kinds["holes.txt"] == (
        "sparse file" if sparse else "file"
    )
    for member, raw in found:
        if member.kind == "file":
            assert raw == (folder / member.name).read_bytes()


def gnu_tar_reads(path, out):
    """Every file by its name, as GNU tar unpacks it; None where it complains."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    done = subprocess.run(["tar", "-xf", str(path), "-C", str(out)], capture_output=True, check=False)
    if done.returncode or done.stderr:
        return None
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def damage_tars(tmp_path, rng, count):
    """Damages a tar `count` times; a line for each time that members are lost or differ without an error."""
    documents = [(f"{i:04d}.txt", d.encode()) for i, d in enumerate(make_documents(20))]
    path = tmp_path / "a.tar"
    whole = write_tar(path, documents).read_bytes()
    end = len(whole.rstrip(b"\0"))
    wrong = []
    for _ in range(count):
        raw, what = bytearray(whole), rng.choice(["flip", "flip", "zero", "cut", "swap"])
        at = rng.randrange(end)
        if what == "flip":
            raw[at] ^= 1 << rng.randrange(8)
        elif what == "zero":
            raw[at // 512 * 512 : at // 512 * 512 + 512] = bytes(512)
        elif what == "cut":
            del raw[at:]
        else:
            other = rng.randrange(end // 512) * 512
            block = bytes(raw[at // 512 * 512 :][:512])
            raw[at // 512 * 512 : at // 512 * 512 + 512] = raw[other : other + 512]
            raw[other : other + 512] = block
        path.write_bytes(raw)
        try:
            found = walked(bytes(raw))
        except DataError:
            continue
        theirs = gnu_tar_reads(path, tmp_path / "unpacked")
        if len(found) != len(documents):
            wrong.append(f"{what} at {at}: {len(found)} members of {len(documents)}, and no error")
        elif theirs is None or dict(found) != theirs:
            wrong.append(f"{what} at {at}: GNU tar reads it otherwise")
    return wrong


@needs_gnu_tar
def test_damage_in_tars_is_never_silent(tmp_path):
    assert damage_tars(tmp_path, random.Random(5), 80) == []


@needs_gnu_tar
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_damages_in_tars_are_never_silent(tmp_path):
    assert damage_tars(tmp_path, random.Random(6), 1000) == []


def damage_packed(tmp_path, packer, rng, count):
    """Damages packed bytes `count` times; a line for each time that the format's own program sees it otherwise."""
    program = {"gz": "gzip", "zst": "zstd", "bz2": "bzip2"}.get(packer, packer)
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    raw = " ".join(make_documents(60)).encode()
    whole = PACKERS[packer](raw[:3000]) + PACKERS[packer](raw[3000:])
    path, wrong = tmp_path / f"a.{packer}", []
    for _ in range(count):
        damaged, at = bytearray(whole), rng.randrange(len(whole))
        match rng.choice(["flip", "cut", "insert", "append"]):
            case "flip":
                damaged[at] ^= 1 << rng.randrange(8)
            case "cut":
                del damaged[max(6, at) :]
            case "insert":
                damaged[at:at] = rng.randbytes(rng.randint(1, 9))
            case "append":
                damaged += rng.choice([rng.randbytes(rng.randint(1, 40)), bytes(rng.randint(1, 40))])
        path.write_bytes(damaged)
        done = subprocess.run([program, "-dc", str(path)], capture_output=True, check=False)
        theirs = None if done.returncode else done.stdout
        ours, stream = b"", unpacked_stream(io.BytesIO(bytes(damaged)), "a")
        try:
            while piece := stream.read(1 << 20):
                ours += piece
        except DataError:
            continue
        if ours != theirs and ours != bytes(damaged):  # without its first bytes it is no packed file
            wrong.append(f"{packer}: {len(ours)} bytes, {program} {done.stderr[:80]!r}")
    return wrong


@pytest.mark.parametrize("packer", PACKERS)
def test_damage_in_packed_bytes_is_never_silent(tmp_path, packer):
    assert damage_packed(tmp_path, packer, random.Random(7), 40) == []


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("packer", PACKERS)
def test_a_thousand_damages_in_packed_bytes_are_never_silent(tmp_path, packer):
    assert damage_packed(tmp_path, packer, random.Random(8), 1000) == []
