"""What a stage needs becomes folders, and what does not fit together is said before anything starts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from minilm.orchestrator.driver.prepare_data import prepare_data
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.references import FolderRef
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve import folders
from minilm.orchestrator.resolve.folders import folder_here, model_folder, tokenizer_name
from minilm.orchestrator.resolve.stages import check_data, known_data, resolve_stages
from tests.conftest import make_teacher


def recipe_with(
    tmp_path: Path, teacher: Path | str, shards: Path, student: dict[str, object], **stage: object
) -> Recipe:
    path = tmp_path / "r.yaml"
    values = {
        "name": "only",
        "teacher": str(teacher),
        "student": student,
        "batch": 32,
        "steps": 9,
        "peak_lr": 1e-3,
    }
    path.write_text(
        yaml.safe_dump(
            {"name": "r", "data": {"shards": str(shards)}, "stages": [values | {"warmup_steps": 1} | stage]}
        )
    )
    return load_recipe(path)


def complaints(recipe: Recipe) -> list[str]:
    stages, problems = resolve_stages(recipe, folder_here)
    return problems + check_data(stages, *known_data(recipe, folder_here))


def complaint(recipe: Recipe, teacher: Path, shards: Path) -> str:
    (line,) = complaints(recipe)
    assert line.startswith("stage only: ") and "\n" not in line
    return line


def test_heads_that_do_not_divide_hidden(tmp_path, teacher, shards):
    recipe = recipe_with(tmp_path, teacher, shards, {"layers": 1, "hidden": 30})
    assert "student 'only': 4 heads do not divide hidden size 30; give a multiple of 4" in complaint(
        recipe, teacher, shards
    )


def test_head_counts_that_differ_where_the_objective_needs_them_equal(tmp_path, teacher, shards):
    recipe = recipe_with(tmp_path, teacher, shards, {"layers": 1, "hidden": 24, "heads": 2})
    assert "the teacher has 4 heads and the student 2; give both the same number" in complaint(
        recipe, teacher, shards
    )
    split = recipe_with(
        tmp_path,
        teacher,
        shards,
        {"layers": 1, "hidden": 24, "heads": 2},
        objective="minilmv2",
        relation_heads=6,
    )
    assert not complaints(split)


def test_a_teacher_layer_that_does_not_exist(tmp_path, teacher, shards):
    recipe = recipe_with(tmp_path, teacher, shards, {"layers": 1, "hidden": 24}, teacher_layer=4)
    assert "layer 4 does not exist; bert has layers 1 to 3" in complaint(recipe, teacher, shards)


def test_a_registered_teacher_where_there_is_no_registry(tmp_path, teacher, shards, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = recipe_with(tmp_path, "models:/big@newest", shards, {"layers": 1, "hidden": 24})
    with pytest.raises(UserError) as caught:
        model_folder(recipe.teacher_ref(recipe.stages[0]), Workdir(tmp_path / "fresh"), recipe)
    message = str(caught.value)
    assert message.startswith(
        "models:/big@newest was to come from this work directory's own registry, and there is no "
    )
    assert f"{tmp_path / 'fresh' / 'mlflow.db'}; set MLFLOW_TRACKING_URI to where the model is" in message
    assert "`minilm pull models:/big@newest DIR --workdir OTHER`" in message and "\n" not in message


def test_a_tokenizer_of_the_same_size_that_is_not_the_teachers(tmp_path, teacher, shards):
    """The commonest silent error: every id is in range, and means another word."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["time"], vocabulary["year"] = vocabulary["year"], vocabulary["time"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = recipe_with(tmp_path, other, shards, {"layers": 1, "hidden": 24})
    message = complaint(recipe, other, shards)
    assert "the data's tokenizer is another one than the teacher's" in message
    assert f"make the data with `--tokenizer {other}`" in message


def test_a_larger_vocabulary_than_the_teachers(tmp_path, teacher, text):
    from minilm.data.builder.build import build

    big = make_teacher(tmp_path / "big", extra_words=("zebra", "yak"))
    out = tmp_path / "shards"
    build([text], str(big), out, seq_len=32, held_out=0.1, processes=1)
    recipe = recipe_with(tmp_path, teacher, out, {"layers": 1, "hidden": 24})
    assert "the data's vocabulary has" in complaint(recipe, teacher, out)


def test_shards_without_a_held_out_split(tmp_path, teacher, text):
    from minilm.data.builder.build import build

    out = tmp_path / "shards"
    build([text], str(teacher), out, seq_len=32, processes=1)
    recipe = recipe_with(tmp_path, teacher, out, {"layers": 1, "hidden": 24})
    with pytest.raises(
        UserError, match=r"has no held-out split.*build it again with `minilm data build --held-out"
    ):
        prepare_data(recipe, Workdir(tmp_path / "work"), folder_here, None)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(
        UserError, match=r"is not a model folder \(no config.json in it\); give a transformers folder"
    ):
        model_folder(FolderRef(tmp_path), Workdir(tmp_path / "work"))


def test_the_tokenizer_of_data_build_may_be_a_folder_or_hub_id(tmp_path, teacher, monkeypatch):
    assert tokenizer_name(str(teacher)) == str(teacher)
    monkeypatch.chdir(tmp_path)
    assert tokenizer_name("./none") == str(tmp_path / "none")  # never a hub id
    assert tokenizer_name("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    with pytest.raises(UserError, match="`minilm pull` brings a registered model down"):
        tokenizer_name("models:/a@newest")


@pytest.fixture
def hub(teacher: Path) -> Iterator[tuple[str, list[str]]]:
    """A server with the two calls of a model hub that a download makes; its address, and what was asked of it."""
    asked: list[str] = []
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {p.name: p.read_bytes() for p in teacher.iterdir()} | {"pytorch_model.bin": b"a pickle"}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if self.path.startswith("/api/models/someone/tiny/tree"):
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()
                ]
                self.answer(json.dumps(tree).encode(), {"Content-Type": "application/json"})
            elif self.path.startswith("/api/models/someone/tiny"):
                listing = {
                    "id": "someone/tiny",
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in files],
                }
                self.answer(json.dumps(listing).encode(), {"Content-Type": "application/json"})
            elif (name := self.path.rpartition("/")[2]) in files and "someone/tiny" in self.path:
                etag = hashlib.sha256(files[name]).hexdigest()
                self.answer(files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def download(hub_id: str, folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from pathlib import Path; from minilm.orchestrator.resolve.folders import download\n"
        "from minilm.orchestrator.errors import UserError\n"
        "try: print(download(sys.argv[1], Path(sys.argv[2])))\n"
        "except UserError as error: sys.exit(str(error))"
    )
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-c", program, hub_id, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hub_id_becomes_a_folder_without_pickles_and_is_asked_for_once(hub, teacher, tmp_path):
    endpoint, asked = hub
    done = download("someone/tiny", tmp_path, endpoint)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == (teacher / "model.safetensors").read_bytes()
    assert not (folder / "pytorch_model.bin").exists()
    asked.clear()
    assert download("someone/tiny", tmp_path, endpoint).stdout.strip() == str(folder)
    assert asked == []


def test_a_hub_id_that_does_not_exist_is_one_line(hub, tmp_path):
    done = download("someone/absent", tmp_path, hub[0])
    assert done.returncode == 1
    assert done.stderr.startswith("model someone/absent cannot be downloaded (")
    assert done.stderr.strip().endswith("or give a local folder instead")
    assert done.stderr.count("\n") == 1


def test_a_hub_model_that_has_only_pickles(tmp_path, monkeypatch):
    def fetch(hub_id: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert "*.bin" not in allow_patterns and "*.jinja" in allow_patterns
        local_dir.mkdir()
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(UserError) as caught:
        folders.download("owner/old", tmp_path)
    message = str(caught.value)
    assert message.startswith(
        "model owner/old has no config.json with a model.safetensors; where its weights are a pickle, "
        "pytorch_model.bin, bring it down and make a model.safetensors of it: hf download owner/old --local-dir DIR "
        "&& python -c "
    )
    assert message.endswith(" DIR; then give DIR")


def test_a_later_stage_that_cannot_fit_is_refused_before_the_first_one_runs(tmp_path, teacher, shards):
    """The second stage's teacher does not exist yet, but its heads follow from the first stage's."""
    stage = {"batch": 32, "steps": 9, "peak_lr": 1e-3, "warmup_steps": 1}
    first = {"name": "first", "teacher": str(teacher), "student": {"layers": 1, "hidden": 24}, **stage}
    second = {
        "name": "second",
        "teacher": "first",
        "student": {"layers": 1, "hidden": 24, "heads": 2},
        **stage,
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "data": {"shards": str(shards)}, "stages": [first, second]}))
    (line,) = complaints(load_recipe(path))
    assert line.startswith("stage second: student 'second': the teacher has 4 heads and the student 2")
