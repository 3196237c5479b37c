"""The registry on a real store: one version a run and folder, checked bytes both ways, no pickles."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minilm.orchestrator.errors import InfrastructureError, UserError
from minilm.orchestrator.tracking import registry
from minilm.orchestrator.tracking.calls import patiently
from minilm.orchestrator.tracking.client import MlflowClient, connect
from minilm.orchestrator.tracking.model_files import folder_digest
from minilm.orchestrator.tracking.pull import pull, pull_once
from minilm.orchestrator.tracking.registry import card_head, make_run, promote, register, resolve
from tests.mlflow_server import server
from tests.ports import free_port


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, as transformers saves it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("exported") / "small"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "attention", "is", "all", "##s"]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False).save_pretrained(folder)
    (folder / "README.md").write_text("# small\n")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store with artifacts beside it; each test uses model names of its own."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    connect(uri).create_experiment("experiment", artifact_location=(folder / "artifacts").as_uri())
    return uri


def new_run(store: str) -> str:
    client = connect(store)
    experiment = client.get_experiment_by_name("experiment")
    assert experiment is not None
    return str(client.create_run(experiment.experiment_id).info.run_id)


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in {"config_json": "{}", "model_safetensors": "weights", **files}.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_student_comes_down_again_and_loads_without_our_code(
    store: str, student: Path, tmp_path: Path
) -> None:
    registered = register(
        store, "tiny-small", student, run_id=new_run(store), alias="newest", tags={"stage": "a"}
    )
    assert (registered.name, registered.version, registered.alias) == ("tiny-small", 1, "newest")
    assert registered.uri == "models:/tiny-small/1"
    out = tmp_path / "deep" / "out"
    assert pull(store, "models:/tiny-small@newest", out) == registered
    assert contents(out) == contents(student)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    code = (
        "import sys, torch\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "batch = tokenizer('attention is all', return_tensors='pt')\n"
        "assert batch['input_ids'].tolist() == [[5, 6, 7]], batch\n"
        "assert model(**batch).last_hidden_state.shape == (1, 3, 8)\n"
        "assert not {'minilm', 'mlflow'} & sys.modules.keys()\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", code, str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_digest_is_what_sha256sum_says(student: Path) -> None:
    command = "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"
    said = subprocess.run(["bash", "-c", command], cwd=student, capture_output=True, text=True, check=True)
    assert folder_digest(student) == said.stdout.split()[0]


def test_registering_again_gives_the_version_that_exists(store: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    run_id = new_run(store)
    first = register(store, "again", folder, run_id=run_id, alias="newest")
    assert register(store, "again", folder, run_id=run_id, alias="newest") == first
    assert register(store, "again", folder, run_id=new_run(store), alias="newest").version == 2  # another run
    (folder / "model.safetensors").write_text("other weights")
    third = register(store, "again", folder, run_id=run_id, alias="newest")
    assert (third.version, third.digest == first.digest) == (3, False)
    promote(store, "again", 1, "newest")  # somebody goes back
    assert register(store, "again", folder, run_id=run_id, alias="newest").version == 3
    assert resolve(store, "models:/again@newest").version == 1


def test_a_folder_that_is_registered_by_hand_has_one_run_and_one_version(
    tmp_path: Path, empty_store: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    store, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", folder_of(tmp_path / "m")
    run_id = make_run(store, "bert", folder, experiment="in house")
    assert make_run(store, "bert", folder, experiment="in house") == run_id
    first = register(store, "bert", folder, run_id=run_id, alias="newest")
    assert register(store, "bert", folder, run_id=run_id, alias="newest") == first
    assert pull(store, first.uri, tmp_path / "out") == replace(first, alias=None)
    client = connect(store)
    experiment = client.get_experiment_by_name("in house")
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["minilm.registered"] == "bert"
    assert len(client.search_model_versions("name = 'bert'")) == 1
    assert client.get_model_version("bert", "1").description == ""
    assert make_run(store, "other", folder, experiment="in house") != run_id


def test_the_page_of_a_version_shows_the_head_of_its_card(store: str, tmp_path: Path) -> None:
    card = "---\ntags: [minilm]\n---\n# small\n\nAn encoder.\n\n| Steps | 9 |\n\n## Load it\n\n    code\n"
    folder = folder_of(tmp_path / "m", README_md=card)
    register(store, "paged", folder, run_id=new_run(store), alias="newest", tags={"minilm.steps": "9"})
    page = connect(store).get_model_version("paged", "1")
    assert page.description == "# small\n\nAn encoder.\n\n| Steps | 9 |"
    assert page.tags["minilm.steps"] == "9" and len(page.tags["minilm.digest"]) == 64
    (folder / "README.md").write_text("word " * 5000)
    assert 1990 <= len(card_head(folder / "README.md")) <= 2000
    assert card_head(folder / "none.md") == ""


@pytest.mark.parametrize(
    "dies_in", ["log_model_artifacts", "create_model_version", "set_registered_model_alias"]
)
def test_a_driver_that_dies_while_registering_can_do_it_again(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    folder = folder_of(tmp_path / "m")
    name, run_id = f"died-{dies_in}", new_run(store)

    def die(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, dies_in, die)
    with pytest.raises(KeyboardInterrupt):
        register(store, name, folder, run_id=run_id, alias="newest")
    monkeypatch.undo()
    assert register(store, name, folder, run_id=run_id, alias="newest").version == 1
    assert pull(store, f"models:/{name}@newest", tmp_path / "out").version == 1
    client = connect(store)
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    experiment_id = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment_id], f"tags.`minilm.run_id` = '{run_id}'")
    assert [str(model.status) for model in models] == ["READY"]
    assert json.loads(models[0].tags["mlflow.modelVersions"]) == [{"name": name, "version": 1}]


def test_an_alias_moves_and_what_was_resolved_does_not(store: str, tmp_path: Path) -> None:
    run_id = new_run(store)
    first = register(store, "moves", folder_of(tmp_path / "1", README_md="1"), run_id=run_id, alias="newest")
    resolved = resolve(store, "models:/moves@newest")
    assert resolved == first
    second = register(store, "moves", folder_of(tmp_path / "2", README_md="2"), run_id=run_id, alias="newest")
    assert resolve(store, "models:/moves@newest") == second
    assert resolve(store, resolved.uri).digest == first.digest
    assert promote(store, "moves", 1, "best").alias == "best"
    assert resolve(store, "models:/moves@best").version == 1


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (
            "models:/knwon@newest",
            r"no model 'knwon' is registered; did you mean 'known'\? \(registered: .*known",
        ),
        ("models:/zzz/1", "no model 'zzz' is registered; registered: "),
        (
            "models:/known@newst",
            r"'known' has no alias 'newst'; did you mean 'newest'\? \(aliases: best, newest\)",
        ),
        ("models:/known/7", "'known' has no version 7; its versions: 1"),
        ("known", "'known' names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/m-0123abcd", "names no registered model"),
    ],
)
def test_a_wrong_name_is_told_what_there_is(store: str, tmp_path: Path, uri: str, text: str) -> None:
    folder = folder_of(tmp_path / "m")
    if not connect(store).search_registered_models("name = 'known'"):
        register(store, "known", folder, run_id=new_run(store), alias="newest")
        promote(store, "known", 1, "best")
    for call in (lambda: resolve(store, uri), lambda: pull(store, uri, tmp_path / "out")):
        with pytest.raises(UserError, match=text) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_name_or_alias_is_refused_in_one_line(store: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    with pytest.raises(UserError, match="refused: .*Invalid model name 'a/b'"):
        register(store, "a/b", folder, run_id=new_run(store), alias="newest")
    with pytest.raises(UserError, match="refused: .*alias") as error:
        register(store, "bad-alias", folder, run_id=new_run(store), alias="v1")
    assert "\n" not in str(error.value)


def test_pull_leaves_a_folder_with_something_in_it_alone(store: str, tmp_path: Path) -> None:
    register(store, "careful", folder_of(tmp_path / "m"), run_id=new_run(store), alias="newest")
    out = tmp_path / "out"
    out.mkdir()
    pull(store, "models:/careful@newest", out)  # empty: taken
    before = contents(out)
    with pytest.raises(UserError, match="out is not empty: choose another folder, or remove it first"):
        pull(store, "models:/careful@newest", out)
    assert contents(out) == before
    with pytest.raises(UserError, match="can't be made .*: choose another folder"):
        pull(store, "models:/careful@newest", out / "config.json" / "x")


def test_pull_takes_the_folder_one_is_in(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "m")
    register(store, "here", folder, run_id=new_run(store), alias="newest")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    pull(store, "models:/here@newest", Path())
    assert contents(Path()) == contents(folder)  # also as the shell sees it that stands there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "x.pkl", "model.pt", "code.py", "a/MLmodel", "a/b.pickle"]
)
def test_what_could_be_a_pickle_goes_neither_up_nor_down(store: str, tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "m")
    registered = register(store, "clean", folder, run_id=new_run(store), alias="newest")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=f"holds {name}: only .json, .*never a pickle"):
        register(store, "clean", folder, run_id=new_run(store), alias="newest")
    stored = Path(
        connect(store).get_model_version("clean", str(registered.version)).source.removeprefix("file://")
    )
    (stored / name).parent.mkdir(exist_ok=True)
    (stored / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=f"models:/clean/.* holds {name}"):
        pull(store, registered.uri, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_changed_bytes_are_found(store: str, tmp_path: Path) -> None:
    registered = register(store, "flip", folder_of(tmp_path / "m"), run_id=new_run(store), alias="newest")
    stored = Path(connect(store).get_model_version("flip", "1").source.removeprefix("file://"))
    weights = stored / "model.safetensors"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    with pytest.raises(
        UserError, match="is not what was registered: digest .*, registered " + str(registered.digest)
    ):
        pull(store, registered.uri, tmp_path / "out")
    weights.unlink()
    with pytest.raises(UserError, match="is not what was registered"):
        pull(store, registered.uri, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_is_refused(store: str, tmp_path: Path) -> None:
    for folder, text in [(tmp_path / "none", "is no folder"), (tmp_path, "is no model")]:
        with pytest.raises(UserError, match=text):
            register(store, "none", folder, run_id="r", alias="newest")
    folder = folder_of(tmp_path / "m")
    (folder / "link.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="is a link or a device"):
        register(store, "none", folder, run_id="r", alias="newest")


def test_pull_once_downloads_once_and_mends(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "m")
    run_id = new_run(store)
    register(store, "once", folder, run_id=run_id, alias="newest")
    out = pull_once(store, "models:/once@newest", tmp_path / "teachers")
    assert out == tmp_path / "teachers" / "once-v1"
    register(store, "once", folder_of(tmp_path / "n", README_md="2"), run_id=run_id, alias="newest")
    with monkeypatch.context() as patch:  # a resumed run: the same teacher, and no server needed
        patch.setattr(registry, "connect", lambda uri: pytest.fail("asked the store again"))
        assert pull_once(store, "models:/once@newest", tmp_path / "teachers") == out
    (out / "model.safetensors").write_text("damaged")
    assert pull_once(store, "models:/once@newest", tmp_path / "teachers") == out
    assert contents(out) == contents(folder)
    assert pull_once(store, "models:/once@newest", tmp_path / "other").name == "once-v2"
    assert pull_once(store, "models:/once/2", tmp_path / "teachers").name == "once-v2"


def test_a_store_that_stays_away_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    """At a stage's end: exit code 10, and the same command goes on."""
    folder = folder_of(tmp_path / "m")
    away = f"http://user:s3cret@127.0.0.1:{free_port()}"
    with pytest.raises(InfrastructureError, match="run the same command again") as error:
        register(away, "late", folder, run_id="r", alias="newest", patience_seconds=0.6)
    assert "\n" not in str(error.value) and "s3cret" not in str(error.value)


def test_a_store_that_another_process_has_locked_is_away(tmp_path: Path) -> None:
    """For example one that was stopped while it wrote."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}?timeout=0.1"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InfrastructureError, match="database is locked.* run the same command again"):
            patiently(store, lambda: connect(store), 0.1)


def test_a_store_that_is_not_there_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no .*mlflow.db: name the work directory of a run"):
        resolve(f"sqlite:///{tmp_path / 'mlflow.db'}", "models:/a@newest")
    assert not (tmp_path / "mlflow.db").exists()
    away = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        UserError, match="does not answer .*: start it and run the same command again"
    ) as error:
        pull(away, "models:/a@newest", tmp_path / "out", patience_seconds=0.6)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_everything_works_through_a_real_server(student: Path, tmp_path: Path) -> None:
    with server(tmp_path, free_port()) as url:
        connect(url).create_experiment("experiment")
        run_id = new_run(url)
        registered = register(url, "served", student, run_id=run_id, alias="newest", tags={"stage": "a"})
        assert register(url, "served", student, run_id=run_id, alias="newest") == registered
        assert pull(url, "models:/served@newest", tmp_path / "out") == registered
        assert contents(tmp_path / "out") == contents(student)
        with pytest.raises(UserError, match="did you mean 'served'"):
            resolve(url, "models:/servd@newest")
        with pytest.raises(UserError, match="has no alias 'best'; .*aliases: newest"):
            resolve(url, "models:/served@best")
        with pytest.raises(UserError, match="has no version 9; its versions: 1"):
            promote(url, "served", 9, "best")
        assert promote(url, "served", 1, "best").version == 1
        assert connect(url).get_run(run_id).outputs.model_outputs
