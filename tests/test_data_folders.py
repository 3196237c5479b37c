"""Folders of text: links, hidden files, the build's own output, odd names, empty and other files; nothing is lost
without a word."""

import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from minilm.data.builder import phases
from minilm.data.builder.build import build, import_data
from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.open import open_rows
from minilm.data.sources.find import (
    BROKEN,
    BUILT,
    EMPTY,
    HIDDEN,
    NO_FILE,
    TWICE,
    find_files,
    summary,
)
from minilm.data.tokenizer import load_tokenizer
from tests.data_cases import make_documents, make_tokenizer
from tests.test_data_tars import write_tar

SMALL = {"seq_len": 16, "packing": "document", "processes": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(folder, **texts):
    """Files by name, `__` for the dot: `a__txt="text"`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def read(folder, *others):
    """The names of the files that are read, and reasons by the names of those that are not."""
    found = find_files([folder, *others])
    return [path.name for path in found.files], {Path(p).name: reason for p, reason in found.left_out}


def test_hidden_files_and_folders_are_left_out_and_said(tmp_path):
    write(tmp_path, a__txt="first")
    write(tmp_path / ".ipynb_checkpoints", a__txt="old")
    write(tmp_path / "sub" / ".git" / "deep", b__txt="old")
    write(tmp_path / "sub", b__txt="second")
    (tmp_path / "._a.txt").write_text("of a Mac")
    assert read(tmp_path) == (
        ["a.txt", "b.txt"],
        {"._a.txt": HIDDEN, ".ipynb_checkpoints": HIDDEN, ".git": HIDDEN},
    )
    assert read(tmp_path / "._a.txt")[0] == ["._a.txt"]  # named itself
    assert read(tmp_path / ".ipynb_checkpoints")[0] == ["a.txt"]
    assert read(tmp_path / "*")[0] == ["a.txt", "b.txt"]
    assert read(tmp_path / ".ipynb*" / "*.txt")[0] == ["a.txt"]


def test_links_are_followed_loops_end_and_a_broken_one_is_named(tmp_path):
    corpus = write(tmp_path / "corpus", a__txt="first")
    write(tmp_path / "elsewhere", b__txt="second")
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "c.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (corpus / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (corpus / "itself.txt").symlink_to("itself.txt")
    (corpus / "loop").symlink_to(corpus)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    names, left_out = read(corpus)
    assert names == ["a.txt", "c.txt"]
    assert left_out == {
        "b.txt": TWICE,
        "gone.txt": BROKEN,
        "itself.txt": BROKEN,
        "loop": TWICE,
        "corpus": TWICE,
        "elsewhere": TWICE,
    }
    assert any(
        "broken link: 2" in line and "gone.txt" in line for line in summary(find_files([corpus]).left_out)
    )
    with pytest.raises(DataError, match=r"gone\.txt' is a broken link to '.*nowhere\.txt'; mend the link"):
        find_files([corpus / "gone.txt"])


def test_many_loops_cost_nothing(tmp_path):
    for name in "abcdefgh":
        write(tmp_path / name, a__txt=name)
        for other in "abcdefgh":
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    assert len(find_files([tmp_path]).files) == 8


def test_a_file_named_twice_in_any_way_is_read_once(tmp_path):
    write(tmp_path, a__txt="first", b__txt="second")
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    assert read(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", tmp_path) == (
        ["a.txt", "b.txt"],
        {"hard.txt": TWICE},
    )


def test_unknown_endings_are_counted_and_named_in_one_line(tmp_path):
    write(tmp_path, a__txt="first", _SUCCESS="")
    for i in range(1000):
        (tmp_path / f"{i:04d}.log").write_text("x")
    (tmp_path / "data.parquet.gz").write_bytes(b"x")
    (tmp_path / "B.TXT.GZ").write_bytes(gzip.compress(b"second"))
    names, left_out = read(tmp_path)
    assert names == ["B.TXT.GZ", "a.txt"] and len(left_out) == 1002
    [line] = summary(find_files([tmp_path]).left_out)
    assert (
        "unknown ending (.log 1,000, none 1, .parquet.gz 1): 1,002 (" in line
        and len(line) < 400 + len(str(tmp_path)) * 3
    )
    with pytest.raises(DataError, match=r"0001\.log' has an ending that is not known; allowed: \."):
        find_files([tmp_path / "0001.log"])


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    write(tmp_path, a__log="x", b__md="y")
    write(tmp_path / ".hidden", a__txt="z")
    with pytest.raises(
        DataError, match=r"holds no text files; left out, hidden: 1 .*ending \(\.log 1, \.md 1\)"
    ):
        find_files([tmp_path])


def test_empty_files_are_counted_and_stop_nothing(tmp_path):
    write(tmp_path, a__txt="first", b__txt="", c__jsonl="")
    assert read(tmp_path) == (["a.txt"], {"b.txt": EMPTY, "c.jsonl": EMPTY})
    assert read(tmp_path / "b.txt", tmp_path / "a.txt")[0] == ["a.txt"]
    with pytest.raises(DataError, match=r"b\.txt' is empty \(0 bytes\), and so is all that was given"):
        find_files([tmp_path / "b.txt"])


def test_pipes_and_sockets_are_no_files(tmp_path):
    write(tmp_path, a__txt="first")
    os.mkfifo(tmp_path / "b.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c.txt"))
        assert read(tmp_path) == (["a.txt"], {"b.txt": NO_FILE, "c.txt": NO_FILE})
    with pytest.raises(DataError, match=r"b\.txt' is no regular file"):
        find_files([tmp_path / "b.txt"])


def test_the_output_of_builds_is_left_out(tmp_path, tokenizer):
    write(tmp_path, a__txt="\n\n".join(make_documents(20)))
    first = build([tmp_path], tokenizer, tmp_path, held_out=0.3, **SMALL)  # into the folder of the text
    assert build([tmp_path], tokenizer, tmp_path, held_out=0.3, **SMALL) == first
    second = build([tmp_path], tokenizer, tmp_path / "out", held_out=0.3, **SMALL)
    assert build([tmp_path], tokenizer, tmp_path / "out", held_out=0.3, **SMALL) == second
    assert first.fingerprint == second.fingerprint and second.documents == 20
    assert read(tmp_path)[1]["report"] == BUILT
    (tmp_path / "manifest.json").unlink()  # of a user's own: it is no data set
    assert "build.json" in read(tmp_path)[0]
    (tmp_path / ".build").mkdir()  # killed while it published
    assert read(tmp_path)[0] == ["a.txt"]


@pytest.mark.parametrize("how", ["longer", "shorter", "touched", "gone", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, tokenizer, how):
    write(tmp_path / "in", a__txt="\n\n".join(make_documents(20)), b__txt="other")
    path = tmp_path / "in" / "a.txt"

    def change(told):
        if told.phase != "sort" or told.done or not path.exists():
            return
        if how == "gone":
            path.unlink()
        elif how == "touched":
            os.utime(path, ns=(1, 1))
        elif how == "replaced":
            path.with_suffix(".new").write_text("x" * path.stat().st_size)
            path.with_suffix(".new").replace(path)
        else:
            path.write_text(path.read_text() * 2 if how == "longer" else "short")

    with pytest.raises(DataError, match=r"a\.txt' changed while it was read .*run the same command again"):
        build([tmp_path / "in"], tokenizer, tmp_path / "out", progress=change, **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_file_that_grows_before_it_is_read_is_an_error(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path, a__txt="one\n\ntwo\n") / "a.txt"
    prepare = phases.BuildRun.prepare

    def grow(self, saved, loaded):
        saved["files"][0].update(bytes=12, time=0)
        path.write_text("one\n\ntwo\n\nthree\n")
        prepare(self, saved, loaded)

    monkeypatch.setattr(phases.BuildRun, "prepare", grow)
    with pytest.raises(DataError, match=r"a\.txt' changed while it was read"):
        build([path], tokenizer, tmp_path / "out", **SMALL)


def test_a_name_that_begins_with_a_tilde_is_a_name_and_one_too_long_is_an_error(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.chdir(write(tmp_path, a__txt="first"))
    Path("a.txt").rename("~$a.txt")  # as Office calls its own
    assert build(["~$a.txt"], tokenizer, Path("~$out"), **SMALL).documents == 1
    assert Path("~$out", "manifest.json").exists()
    assert open_rows("~$out").num_rows == 1
    with pytest.raises(DataError, match=r"tokenizer '~\$none': no tokenizer.json"):
        load_tokenizer("~$none")
    with pytest.raises(DataError, match=r"xx\.txt' cannot be read \(File name too long\)"):
        find_files(["x" * 300 + ".txt"])


ODD_NAMES = [
    b"caf\xe9.txt",
    b"new\nline.txt",
    b"\xff\xfe.jsonl",
    b" .txt",
    b"-rf.txt",
    b"a[1]*?.txt",
    b"\x1b[2J.csv",
]


def test_any_bytes_are_a_file_name(tmp_path, tokenizer):
    folder = tmp_path / os.fsdecode(b"\xe9 folder")
    folder.mkdir()
    for number, name in enumerate(ODD_NAMES):
        text = f"number {number}"
        content = json.dumps({"t": text}) if b"json" in name else f"t\n{text}\n" if b"csv" in name else text
        (folder / os.fsdecode(name)).write_text(content)
    out = tmp_path / "out"
    report = build([folder], tokenizer, out, **SMALL)
    assert report.documents == len(ODD_NAMES)
    assert build([folder], tokenizer, out, **SMALL) == report  # found again by the names in build.json
    stamps = json.loads((out / "build.json").read_text())["files"]
    assert sorted(os.fsencode(Path(stamp["path"]).name) for stamp in stamps) == sorted(ODD_NAMES)
    assert "\x1b" not in (out / "report" / "report.txt").read_text()
    one = build([folder / os.fsdecode(b"a[1]*?.txt")], tokenizer, tmp_path / "one", **SMALL)
    assert one.documents == 1


@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict"])
def test_odd_names_are_printed_on_any_terminal(tmp_path, tokenizer, encoding):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ODD_NAMES[:3]:
        (folder / os.fsdecode(name)).write_text('{"t": "one"}')
    for name in (b"\xe9.log", "dé.log".encode(), b"b.log", b"c.log"):
        (folder / os.fsdecode(name)).write_text("x")
    command = [sys.executable, "-m", "minilm", "data", "build", folder, "--tokenizer", tokenizer, "--out"]
    options = [
        tmp_path / "out",
        "--held-out",
        "0",
        "--seq-len",
        "16",
        "--packing",
        "document",
        "--processes",
        "1",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, *options], capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"left out, unknown ending" in done.stdout
    (folder / os.fsdecode(b"\xe9.jsonl")).write_text("{")
    options[0] = tmp_path / "other"
    done = subprocess.run([*command, *options], capture_output=True, check=False, env=environment)
    assert done.returncode == 2 and done.stderr.startswith(b"minilm: error:"), done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_folders_of_tars_are_imported(tmp_path, tokenizer):
    folder = tmp_path / "shards" / "deep"
    folder.mkdir(parents=True)
    write_tar(folder / "a.tar", [("1.txt", b"one")])
    (folder / "b.tar.gz").write_bytes(
        gzip.compress(write_tar(tmp_path / "b.tar", [("2.txt", b"two")]).read_bytes())
    )
    (folder / "index.json").write_text("{}")
    report = import_data([tmp_path / "shards"], tokenizer, tmp_path / "out", source="webdataset", **SMALL)
    assert report.documents == 2 and load_manifest(tmp_path / "out").rows == 2
    assert any("unknown ending (.json 1)" in note for note in report.notes)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none' holds no tars; allowed endings: \.tar"):
        import_data([tmp_path / "none"], tokenizer, tmp_path / "x", source="webdataset", **SMALL)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_is_an_error_that_names_it():
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name) / "in", a__txt="first")
        Path(name).chmod(0o755)
        (folder / "a.txt").chmod(0)
        try:
            os.seteuid(65534)
            with pytest.raises(DataError, match=r"a\.txt' cannot be read \(permission denied\); change its"):
                find_files([folder])
            os.seteuid(0)
            folder.chmod(0)
            os.seteuid(65534)
            with pytest.raises(DataError, match=r"in' cannot be read \(Permission denied\); change its"):
                find_files([folder])
        finally:
            os.seteuid(0)
