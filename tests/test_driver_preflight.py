"""What a run needs besides its files: `check` tells it, --strict fails on it, and `run` ends before text is built."""

from __future__ import annotations

import pytest
import torch

from minilm.orchestrator import cli
from minilm.orchestrator.launch.base import LaunchOptions, load_launcher
from minilm.orchestrator.stage.folder import RunFolder
from tests.s3_server import S3Server
from tests.test_driver_curriculum import write_recipe


@pytest.fixture
def server(monkeypatch):
    server = S3Server()
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    yield server
    server.close()


def check(recipe, capsys, *options: str) -> tuple[int, list[str]]:
    """The exit code, and what is not here."""
    code = cli.main(["check", str(recipe), *options])
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    return code, [line.partition("not here: ")[2] for line in lines if "not here: " in line]


def run(recipe, tmp_path, *options: str) -> int:
    code = cli.main(
        ["run", str(recipe), "--launcher", "inline", "--workdir", str(tmp_path / "work"), *options]
    )
    assert not (tmp_path / "work" / "data").exists(), "no text is built before"
    return code


def test_strict_fails_on_what_can_not_be_looked_at(tmp_path, text, teacher, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    assert check(recipe, capsys, "--strict") == (0, [])
    for value, words in (
        (
            "owner/teacher",
            "owner/teacher is fetched by a run; to have it looked at, give a folder: --set stages.",
        ),
        (
            "models:/teacher@newest",
            "models:/teacher@newest is fetched by a run; to have it looked at, give a folder",
        ),
        (
            f"{tmp_path}/none",
            "but there is no such folder; give yours: --set stages.assistant.teacher=FOLDER",
        ),
    ):
        change = ("--set", f"stages.assistant.teacher={value}")
        for options, code in (((), 0), (("--strict",), 2)):
            found = check(recipe, capsys, *change, *options)
            assert found[0] == code and len(found[1]) == 1
            assert found[1][0].startswith("stages.assistant.teacher: ") and words in found[1][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_a_device_that_is_not_here(tmp_path, text, teacher, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    change = ("--set", "compute.device=cuda")
    words = "compute.device is cuda, but this machine has no usable CUDA device; use --set compute.device=cpu (or auto)"
    assert check(recipe, capsys, *change)[0] == 0
    code, (note,) = check(recipe, capsys, *change, "--strict")
    assert code == 2 and note.startswith(words)
    assert run(recipe, tmp_path, *change) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("address", "here"), [(None, True), ("10.0.0.1:6379", False)])
def test_only_a_cluster_may_have_the_device_that_this_machine_lacks(tmp_path, monkeypatch, address, here):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = LaunchOptions(RunFolder(tmp_path), "cuda", (1, 1), 0.0, address=address)
    assert load_launcher("ray")(options, None).is_here is here


def test_a_bucket_that_refuses(tmp_path, text, teacher, server, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    change = ("--set", "compute.checkpoints=s3://bucket/kept")
    assert check(recipe, capsys, *change, "--strict") == (0, [])
    server.fault = lambda method, path: "403"
    words = "s3://bucket/kept: the store refuses (Forbidden); check compute.checkpoints and the credentials in the"
    for options, code in (((), 0), (("--strict",), 2)):
        found = check(recipe, capsys, *change, *options)
        assert found[0] == code and words in found[1][0]
    assert run(recipe, tmp_path, *change) == 10
    assert words in capsys.readouterr().err
    server.fault = lambda method, path: None
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    assert "the store refuses (Unable to locate credentials)" in check(recipe, capsys, *change)[1][0]
    assert run(recipe, tmp_path, *change) == 10


def test_a_bucket_that_does_not_answer_is_no_fault_of_the_recipe(tmp_path, text, teacher, server, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    server.fault = lambda method, path: "500"
    assert check(recipe, capsys, "--set", "compute.checkpoints=s3://bucket/kept", "--strict") == (0, [])


def test_a_data_set_behind_a_url(tmp_path, text, teacher, server, capsys):
    recipe = write_recipe(tmp_path, text, teacher, data={"shards": "s3://bucket/words"})
    (note,) = check(recipe, capsys)[1]
    assert note == "s3://bucket/words holds no data set (no manifest.json); give the URL of one"
    server.fault = lambda method, path: "403"
    code, (note,) = check(recipe, capsys, "--strict")
    assert code == 2
    assert note.startswith(
        "s3://bucket/words: the server refuses (Forbidden); check the URL and the credentials in the"
    )


def test_checkpoints_below_a_file_are_refused_before_anything_is_built(tmp_path, text, teacher, capsys):
    (tmp_path / "file").write_text("")
    recipe = write_recipe(tmp_path, text, teacher)
    for place in ("file", "file/below/it"):
        change = ("--set", f"compute.checkpoints={tmp_path / place}")
        given = f"compute.checkpoints: given '{tmp_path / place}'"
        said = f"{given}, but '{tmp_path / 'file'}' is no folder; give another one"
        assert check(recipe, capsys, *change) == (0, [said])
        assert check(recipe, capsys, *change, "--strict")[0] == 2
        assert run(recipe, tmp_path, *change) == 2
        assert capsys.readouterr().err.endswith(f"minilm: error: {said}\n")
    assert check(recipe, capsys, "--set", f"compute.checkpoints={tmp_path / 'none' / 'yet'}") == (0, [])
