"""Files and folders that are whole or absent, whoever dies, and what a killed writer leaves."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minilm.data.format import files
from minilm.data.format.files import copy_tree, is_temporary, replacing, replacing_folder, sweep, write_whole

WRITER = """
import sys
from pathlib import Path
from minilm.data.format.files import replacing, replacing_folder
kind, path = sys.argv[1], Path(sys.argv[2])
with replacing(path) if kind == "file" else replacing_folder(path) as made:
    (made if kind == "file" else (made / "a").open("wb")).write(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def start_writer(kind: str, path: Path) -> subprocess.Popen:
    """A process in the middle of writing `path`; it ends well when its input does."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_leaves_is_removed_by_the_next_and_what_lives_is_not(tmp_path, kind):
    living, killed = (start_writer(kind, tmp_path / name) for name in ("living", "killed"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(names(tmp_path)) == 2 and all(is_temporary(path) for path in tmp_path.iterdir())
    write_whole(tmp_path / "other", b"x")
    left, other = names(tmp_path)
    assert left.startswith(".living.") and other == "other"
    living.communicate()
    assert living.returncode == 0 and names(tmp_path) == ["living", "other"]


@pytest.mark.parametrize("replace", [replacing, replacing_folder])
def test_after_an_error_everything_is_as_it_was(tmp_path, replace):
    path = tmp_path / "it"
    path.mkdir() if replace is replacing_folder else path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replace(path) as new:
        (new / "a").touch() if replace is replacing_folder else new.write(b"new")
        raise ZeroDivisionError
    assert names(tmp_path) == ["it"]
    assert list(path.iterdir()) == [] if replace is replacing_folder else path.read_bytes() == b"old"


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").touch()
    with replacing_folder(tmp_path / "it") as new:
        (new / "deep").mkdir()
        (new / "deep" / "new").touch()
        assert names(tmp_path / "it") == ["old"]
    assert names(tmp_path) == ["it"] and names(tmp_path / "it") == ["deep"]


def test_a_durable_file_is_flushed_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, Path.replace

    def note_fsync(descriptor):
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append("folder" if target == tmp_path else f"file of {target.stat().st_size} bytes")
        fsync(descriptor)

    def note_replace(self, target):
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_whole(tmp_path / "a", b"four")
    assert done == ["file of 4 bytes", "rename", "folder"]
    write_whole(tmp_path / "a", b"five!", durable=False)
    assert done[3:] == ["rename"] and (tmp_path / "a").read_bytes() == b"five!"


@pytest.mark.parametrize("durable", [True, False])
def test_bytes_that_storage_refuses_when_the_file_is_closed_change_nothing(tmp_path, monkeypatch, durable):
    """As NFS does."""
    (tmp_path / "a").write_bytes(b"old")
    fdopen = os.fdopen

    class Refusing:
        def __init__(self, *arguments):
            self.file = fdopen(*arguments)

        def __enter__(self):
            return self.file

        def __exit__(self, *_):
            self.file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", Refusing)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", b"new", durable=durable)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_one_that_is_swept_before_it_is_locked_is_begun_again(tmp_path, monkeypatch):
    flock, swept = files.fcntl.flock, []

    def sweep_first(descriptor, how):
        if not swept:
            swept.append(True)
            sweep(tmp_path)
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", sweep_first)
    write_whole(tmp_path / "a", b"x")
    assert swept and names(tmp_path) == ["a"]


def test_many_writers_of_one_file_disturb_nobody(tmp_path):
    contents = [bytes([65 + number]) * 5000 for number in range(6)]

    def write(content: bytes) -> None:
        for _ in range(30):
            write_whole(tmp_path / "a", content)
            assert (tmp_path / "a").read_bytes() in contents

    errors: list[BaseException] = []

    def noted(content: bytes) -> None:
        try:
            write(content)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=noted, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == ["a"]


def test_a_folder_is_copied_whole_or_the_error_keeps_its_number(tmp_path, monkeypatch):
    (tmp_path / "from" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tmp_path / "from" / name).write_text(name)
    copy_tree(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "inner" / "b").read_text() == "inner/b" and (tmp_path / "to" / "a").exists()

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(files.shutil, "copyfile", full)
    with pytest.raises(OSError) as caught, replacing_folder(tmp_path / "again") as part:
        copy_tree(tmp_path / "from", part)
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "again").exists()
