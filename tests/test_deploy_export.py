"""An exported model computes what PyTorch does, its cost is measured, and what does not hold is not written."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tomllib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from minilm.model.encoder.families import FAMILIES
from minilm.orchestrator.cli import main
from minilm.orchestrator.deploy import export as deploy
from minilm.orchestrator.deploy import latency, onnx_graph, packages
from minilm.orchestrator.deploy.served import ServedEncoder, largest_difference
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.sources import Source
from minilm.orchestrator.tracking.client import connect
from minilm.orchestrator.tracking.exports import record_export
from minilm.orchestrator.tracking.promotion import Metric
from minilm.orchestrator.tracking.registry import find_logged_model, resolve
from minilm.orchestrator.verbs import convert
from tests.conftest import make_embedder
from tests.eval_data import write_stsb
from tests.odd_teachers import plain

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "LEAST", 2)


def of(folder):
    return Source(folder.name, "folder", str(folder))


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    """(folder, JSON on standard output, data): the teacher as ONNX and in 8 bits, with whatever drop it has."""
    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("exported")
    data = write_stsb(root / "data", glue=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "SECONDS", 0.0)
        patch.setattr(latency, "LEAST", 2)
        report = deploy.export(
            of(teacher),
            root / "out",
            "onnx",
            deploy.Gate(deploy.TASKS["stsb-embed"], data, 1.0),
            lambda _: None,
        )
    return root / "out", report, data


def in_8_bits(model, out, data):
    return ["export", str(model), str(out), "--format", "onnx", "--int8", "--data", str(data)]


def onnx_states(file, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {node.name: inputs[node.name] for node in session.get_inputs()})[0]


def test_the_graphs_of_float32_and_8_bits_give_the_models_vectors(exported, teacher):
    out, report, _ = exported
    texts = ["time", "people way day man thing woman.", "life child world " * 12]
    inputs = dict(AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="np"))
    with torch.inference_mode():
        torch_inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
        expected = AutoModel.from_pretrained(teacher).eval()(**torch_inputs).last_hidden_state.numpy()
    valid = inputs["attention_mask"].astype(bool)
    got = onnx_states(out / "model.onnx", inputs)
    assert np.abs(got - expected)[valid].max() < 1e-4 and report.difference < 1e-4
    eight = onnx_states(out / "model_int8.onnx", inputs)[valid]
    cosine = (
        (eight * expected[valid]).sum(-1)
        / np.linalg.norm(eight, axis=-1)
        / np.linalg.norm(expected[valid], axis=-1)
    )
    assert (
        0.9 < cosine.mean() < 0.99999999
        and report.files["model_int8.onnx"] < 0.7 * report.files["model.onnx"]
    )


def test_what_was_measured_lies_beside_the_model_and_in_its_card(exported):
    out, report, _ = exported
    written = json.loads((out / "export.json").read_text())
    assert written["difference"] == report.difference and written["int8"]["float32"] == report.int8.float32
    cells = {(cell["runtime"], cell["threads"], cell["batch"]) for cell in written["latency"]}
    assert {
        (runtime, 1, batch) for runtime in ("PyTorch", "ONNX", "ONNX, 8 bits") for batch in (1, 32)
    } <= cells
    assert all(0 < cell["p50"] <= cell["p99"] for cell in written["latency"])
    card = (out / "README.md").read_text()
    assert "## Exported as onnx" in card and str(report.int8) in card and "batch 32, p50 / p99 ms" in card
    assert not list(out.glob("*.safetensors")) and not list(out.parent.glob(".out.*"))


def test_8_bits_that_cost_too_much_are_refused_and_nothing_is_left(
    exported, teacher, tmp_path, monkeypatch, capsys
):
    out, report, data = exported
    monkeypatch.setattr(deploy, "write_onnx", lambda *given: shutil.copyfile(out / "model.onnx", given[-1]))
    monkeypatch.setattr(deploy, "quantise", lambda source, file, one_file: worse(source, file))
    command = in_8_bits(teacher, tmp_path / "new", data)
    assert main([*command, "--max-drop", "0.01"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"minilm: error: {teacher} in 8 bits loses 0.") and told.endswith(
        ", and --max-drop is 0.01, so nothing was written; export it without --int8, or allow more"
    )
    assert list(tmp_path.iterdir()) == []


def worse(source, out):
    """The same graph with other embeddings."""
    import onnx

    model = onnx.load(source)
    table = next(one for one in model.graph.initializer if "word_embeddings" in one.name)
    values = np.random.default_rng(0).normal(size=table.dims).astype(np.float32)
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, out)


def test_a_graph_that_computes_something_else_is_refused(exported, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deploy, "write_onnx", lambda *given: worse(exported[0] / "model.onnx", given[-1]))
    assert main(["export", str(teacher), str(tmp_path / "new"), "--format", "onnx", "-q"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"minilm: error: {teacher} as onnx differs from PyTorch by ")
    assert " on ragged batches, allowed 0.0001, so nothing was written; try other versions of torch " in told
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_found_in_short_and_long_rows_and_a_nan_counts(teacher):
    model = AutoModel.from_pretrained(teacher).eval()
    names = ["input_ids", "attention_mask"]

    def served(change):
        def compute(arrays):
            given = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return change(model(**given).last_hidden_state.numpy().copy(), arrays["attention_mask"])

        return ServedEncoder(model.config, names, compute)

    def wrong_where(rows):
        def change(states, mask):
            states[rows(mask.sum(1))] += 0.01
            return states

        return change

    assert largest_difference(model, served(lambda states, _: states), names) == 0
    assert largest_difference(model, served(wrong_where(lambda n: n == 1)), names) > 1e-3
    assert largest_difference(model, served(wrong_where(lambda n: n > 60)), names) > 1e-3
    assert np.isnan(largest_difference(model, served(lambda states, _: states * np.nan), names))
    padded = served(lambda states, mask: np.where(mask[..., None] > 0, states, 7.0))
    assert largest_difference(model, padded, names) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--format", "onnx", "--int8"],
            "--int8 needs --data DIR, which holds the published files of --task (DIR/STS-B/ for stsb-embed): what 8"
            " bits cost is measured there",
        ),
        (
            ["--format", "onnx", "--data", "."],
            "--data is of 8 bits and what they cost; give --int8 too, or leave --data out",
        ),
        (
            ["--format", "onnx", "--max-drop", "0"],
            "--max-drop is of 8 bits and what they cost; give --int8 too, or leave --max-drop out",
        ),
        (
            ["--format", "sentence-transformers", "--int8", "--data", "."],
            "--int8 is made for --format onnx, not sentence-transformers; leave it out, or give --format onnx",
        ),
        (
            ["--format", "onnx", "--int8", "--task", "cola", "--data", "."],
            "--task cola has to be trained first; 8 bits are measured on one of: stsb-embed",
        ),
        (
            ["--format", "onnx", "--int8", "--data", "nowhere"],
            "--data nowhere: no such folder; give the folder that holds STS-B/ and so on",
        ),
    ],
)
def test_options_that_do_not_fit(options, message, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert main(["export", str(teacher), str(tmp_path / "new"), *options]) == 2
    assert capsys.readouterr().err == f"minilm: error: {message}\n"


def test_folders_that_do_not_fit(teacher, tmp_path, capsys):
    assert (
        main(["export", f"random:{teacher}", str(tmp_path / "new"), "--format", "sentence-transformers"]) == 2
    )
    expected = f"random:{teacher} is a control of an evaluation; give the folder of a model"
    assert capsys.readouterr().err == f"minilm: error: {expected}\n"
    (tmp_path / "there").mkdir()
    command = ["export", str(teacher), str(tmp_path / "there"), "--format", "sentence-transformers"]
    assert main(command) == 2
    expected = f"{tmp_path / 'there'} exists; give a folder that does not exist yet, or remove it first"
    assert capsys.readouterr().err == f"minilm: error: {expected}\n"
    (tmp_path / "file").write_text("")
    for verb in (["export", "--format", "sentence-transformers"], ["shrink", "--text", "x", "--keep", "9"]):
        out = tmp_path / "file" / "new" / "folder"
        assert main([verb[0], str(teacher), str(out), *verb[1:]]) == 2
        expected = f"{out} can't be a folder: {tmp_path / 'file'} is a file; give another place"
        assert capsys.readouterr().err == f"minilm: error: {expected}\n"
    assert main([*command[:2], "/proc/new", *command[3:]]) == 2
    expected = (
        "/proc/new can't be written: /proc takes no folder (No such file or directory); give another place"
    )
    assert capsys.readouterr().err == f"minilm: error: {expected}\n"
    with pytest.raises(SystemExit):
        main([*command, "--int8", "--max-drop", "-1"])
    assert "argument --max-drop: given '-1'; allowed: 0 or a number above it" in capsys.readouterr().err
    plain(tmp_path / "classifier", teacher, model=AutoModelForSequenceClassification)
    capsys.readouterr()
    command[1:3] = [str(tmp_path / "classifier"), str(tmp_path / "new")]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"minilm: error: {tmp_path / 'classifier'} is a BertForSequenceClassification, and an export has the encoder "
        "without its head; give the folder of the encoder, or export this one with torch.onnx.export\n"
    )


def test_vectors_that_are_not_made_here_are_refused_before_8_bits_are(teacher, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    folder = shutil.copytree(teacher, tmp_path / "weighted")
    make_embedder(folder)
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    data = write_stsb(tmp_path / "data", glue=False)
    command = in_8_bits(folder, tmp_path / "new", data)
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"minilm: error: {folder}/1_Pooling/config.json pools by weightedmean; use a model that pools by one of mean, "
        "cls, max, mean_sqrt_len_tokens\n"
    )


def test_a_format_whose_packages_are_missing_names_the_command(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", str(teacher), str(tmp_path / "new"), "--format", "onnx"]) == 2
    assert capsys.readouterr().err == (
        "minilm: error: --format onnx needs onnxscript, not installed in this Python; install with: pip install "
        "'onnxscript>=0.7,<0.8'\n"
    )


def test_the_formats_packages_are_those_of_the_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: set(wanted) for name, wanted in packages.PACKAGES.items() if wanted} == {
        name: set(extras[name]) for name in ("onnx", "openvino")
    }
    assert convert.FORMATS == packages.FORMATS


def test_a_plain_encoder_becomes_a_sentence_transformer(teacher, tmp_path):
    report = deploy.export(of(teacher), tmp_path / "new", "sentence-transformers", say=lambda _: None)
    assert report.difference is None and report.latency == ()
    assert set(report.files) == {"model.safetensors"}
    kinds = [(one["path"], one["type"]) for one in json.loads((tmp_path / "new/modules.json").read_text())]
    prefix = "sentence_transformers.models."
    assert kinds == [
        ("", f"{prefix}Transformer"),
        ("1_Pooling", f"{prefix}Pooling"),
        ("2_Normalize", f"{prefix}Normalize"),
    ]
    pooling = json.loads((tmp_path / "new/1_Pooling/config.json").read_text())
    assert pooling["word_embedding_dimension"] == 48
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens"]
    assert json.loads((tmp_path / "new/sentence_bert_config.json").read_text())["max_seq_length"] == 64
    AutoModel.from_pretrained(tmp_path / "new")


def test_a_registered_model_is_exported_without_a_work_directory_and_its_version_says_so(
    teacher, empty_store, tmp_path, monkeypatch, capsys
):
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert main(["register", str(teacher), "bert"]) == 0
    assert main(["export", "models:/bert@newest", "new", "--format", "sentence-transformers"]) == 0
    written = json.loads((tmp_path / "new/export.json").read_text())
    assert written["model"] == "models:/bert/1"
    client = connect(store)
    version = client.get_model_version("bert", "1")
    assert json.loads(version.tags["minilm.export.sentence-transformers"]) == written
    model = resolve(store, "models:/bert/1")
    rows = [asdict(latency.Latency("ONNX", 1, 32, 128, 1.0, 2.0, number)) for number in range(60)]
    metrics = [Metric("stsb-embed/spearman/onnx-int8", 0.75, "stsb-embed", "d" * 64)]
    for _ in range(2):
        record_export(store, model, "onnx", written | {"format": "onnx", "latency": rows}, metrics)
    version = client.get_model_version("bert", "1")
    assert json.loads(version.tags["minilm.export.onnx"])["format"] == "onnx"
    assert "latency" not in json.loads(version.tags["minilm.export.onnx"])  # there is no room
    logged = find_logged_model(client, version.run_id, model.digest)
    assert [(m.key, m.value) for m in logged.metrics] == [("stsb-embed/spearman/onnx-int8", 0.75)]
    monkeypatch.setattr(
        "minilm.orchestrator.tracking.exports.record_scores", mock_refused("it may not be written")
    )
    capsys.readouterr()
    assert main(["export", "models:/bert/1", "other", "--format", "sentence-transformers"]) == 0
    warned = "minilm: warning: other is whole, but models:/bert/1 does not say so: it may not be written\n"
    assert warned in capsys.readouterr().err


def mock_refused(text):
    def refused(*arguments, **options):
        raise UserError(text)

    return refused


@pytest.mark.slow
def test_the_version_has_the_score_in_8_bits(exported, teacher, empty_store, tmp_path, monkeypatch):
    _, _, data = exported
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert main(["register", str(teacher), "bert"]) == 0
    assert main([*in_8_bits("models:/bert/1", "new", data), "--max-drop", "1"]) == 0
    written = json.loads((tmp_path / "new/export.json").read_text())
    client = connect(store)
    version = client.get_model_version("bert", "1")
    assert json.loads(version.tags["minilm.export.onnx"]) == written and written["latency"]
    metrics = client.get_run(version.run_id).data.metrics
    name = "stsb-embed/spearman/onnx-int8"
    assert metrics == {name: written["int8"]["int8"], f"{name}-drop": written["int8"]["drop"]}


def test_modules_that_are_there_stay(teacher, tmp_path):
    folder = tmp_path / "embedder"
    shutil.copytree(teacher, folder)
    (folder / "modules.json").write_text("[]")
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(1, 1)}, folder / "2_Dense" / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note.txt").write_text("private")
    deploy.export(of(folder), tmp_path / "new", "sentence-transformers", say=lambda _: None)
    assert (tmp_path / "new/modules.json").read_text() == "[]"
    dense = [(place / "2_Dense/model.safetensors").read_bytes() for place in (folder, tmp_path / "new")]
    assert dense[0] == dense[1]
    assert not (tmp_path / "new/pytorch_model.bin").exists() and not (tmp_path / "new/.cache").exists()


def test_sentence_transformers_gives_our_vectors(teacher, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from minilm.model.encoder.sentence_head import SentenceHead
    from minilm.model.encoder.sentence_layout import SentenceLayout
    from minilm.orchestrator.evaluation.embed import vectors_of

    deploy.export(of(teacher), tmp_path / "new", "sentence-transformers", say=lambda _: None)
    texts = ["time", "people way day man thing woman."]
    got = library.SentenceTransformer(str(tmp_path / "new"), device="cpu").encode(texts)
    model, tokenizer = AutoModel.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    head, device = SentenceHead(SentenceLayout()), torch.device("cpu")
    expected = vectors_of(model, head, tokenizer, texts, tokens=64, batch=2, device=device)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_becomes_onnx(kind, teacher, tmp_path):
    pytest.importorskip("onnxruntime")
    longer = {} if kind == "bert" else {"max_position_embeddings": 402}
    plain(tmp_path / kind, teacher, kind, **longer)
    report = deploy.export(of(tmp_path / kind), tmp_path / "new", "onnx", say=lambda _: None)
    assert report.difference <= 1e-4
    onnx_graph.quantise(tmp_path / "new/model.onnx", tmp_path / "new/model_int8.onnx")
    assert (tmp_path / "new/model_int8.onnx").stat().st_size < 0.8 * (
        tmp_path / "new/model.onnx"
    ).stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_openvino(kind, teacher, tmp_path):
    pytest.importorskip("openvino")
    plain(tmp_path / kind, teacher, kind)
    report = deploy.export(of(tmp_path / kind), tmp_path / "new", "openvino", say=lambda _: None)
    assert report.difference <= 1e-4
    assert set(report.files) == {"openvino_model.xml", "openvino_model.bin"}
    assert {cell.runtime for cell in report.latency} == {"PyTorch", "OpenVINO"}
