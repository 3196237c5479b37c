"""An export is a plain transformers folder, whole or absent, that loads without our code."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from minilm.model.encoder.build import build_student, load_encoder
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.export import export_student, model_card, weights_digest


@pytest.fixture
def tokenizer_folder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return folder


def student(seed=0):
    config = AutoConfig.for_model("bert", vocab_size=8, num_attention_heads=2, max_position_embeddings=12)
    return build_student(config, layers=2, hidden=8, seed=seed)


def test_it_loads_with_plain_transformers_in_a_process_without_our_code(tmp_path, tokenizer_folder):
    out = tmp_path / "out"
    encoder = TappedEncoder(student(), 2)
    export_student(encoder.model, tokenizer_folder, out, "# card\n")
    code = """
import sys, json, torch
from transformers import AutoModel, AutoTokenizer, logging
logging.set_verbosity_error(); logging.disable_progress_bar()
model, report = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("a b c", return_tensors="pt")["input_ids"]
print(json.dumps({
    "ids": ids.tolist(), "sum": model.eval()(ids).last_hidden_state.double().abs().sum().item(),
    "missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"]),
    "ours": sorted(name for name in sys.modules if name.split(".")[0] == "minilm"),
}))
"""
    environment = os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    got = json.loads(run.stdout)
    expected = encoder.model.eval()(torch.tensor(got["ids"])).last_hidden_state.double().abs().sum().item()
    assert got["ids"] == [[5, 6, 7]] and got["missing"] == got["unexpected"] == got["ours"] == []
    assert got["sum"] == pytest.approx(expected, rel=1e-6)
    assert "minilm" not in (out / "config.json").read_text()


def test_the_folder_is_a_teacher_with_the_same_weights(tmp_path, tokenizer_folder):
    model = student()
    export_student(model, tokenizer_folder, tmp_path / "out", "# card\n")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= files
    digest = weights_digest(tmp_path / "out")
    assert (
        digest
        == weights_digest(model.state_dict())
        == weights_digest(load_encoder(tmp_path / "out").model.state_dict())
    )
    assert digest != weights_digest(student(seed=1).state_dict())
    with torch.no_grad():
        model.pooler.dense.bias[3] += 1e-7
    assert digest != weights_digest(model.state_dict())


def test_a_failure_leaves_the_earlier_folder_whole_and_nothing_beside_it(
    tmp_path, tokenizer_folder, monkeypatch
):
    parent = tmp_path / "exports"
    export_student(student(), tokenizer_folder, parent / "out", "# first\n")
    before = weights_digest(parent / "out")

    def full_disk(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        for name in ("out", "other"):
            with pytest.raises(OSError, match="No space left"):
                export_student(student(seed=1), tokenizer_folder, parent / name, "# second\n")
    assert [path.name for path in parent.iterdir()] == ["out"]
    assert weights_digest(parent / "out") == before

    export_student(student(seed=1), tokenizer_folder, parent / "out", "# second\n")
    assert [path.name for path in parent.iterdir()] == ["out"]
    assert (parent / "out" / "README.md").read_text() == "# second\n"
    assert weights_digest(parent / "out") != before
    assert (parent / "out").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (parent / "out").iterdir()} == {0o644}


def test_what_a_killed_export_left_is_removed_and_what_another_writes_is_not(tmp_path, tokenizer_folder):
    parent = tmp_path / "exports"
    for name in (".out.killed.tmp", ".out.living.tmp", ".other.killed.tmp"):
        (parent / name).mkdir(parents=True)
        (parent / name / "model.safetensors").write_bytes(b"half")
    living = os.open(parent / ".out.living.tmp", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_SH)
    export_student(student(), tokenizer_folder, parent / "out", "# card\n")
    os.close(living)
    assert sorted(path.name for path in parent.iterdir()) == [".other.killed.tmp", ".out.living.tmp", "out"]


@pytest.mark.parametrize(
    ("teachers", "license"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# t\n", "apache-2.0"),
        ("# t\n", None),
        ("---\na: [\n---\n", None),
    ],
)
def test_the_card_says_its_use_first_and_takes_the_licence_from_the_teachers(tmp_path, teachers, license):
    (tmp_path / "README.md").write_text(teachers)
    encoder = TappedEncoder(student(), 2)
    given = {"trained": encoder.trained_parameters(), "teacher": "t", "facts": {}}
    card = ModelCard(model_card("s", encoder.model, **given, teacher_card=tmp_path / "README.md"))
    assert (card.data.license, card.data.library_name) == (license, "transformers")
    assert card.text.strip().splitlines()[2].startswith("**Fine-tune it before use.**")


def test_the_card_says_what_was_not_trained():
    encoder = TappedEncoder(student(), 2)
    card = model_card(
        "tiny",
        encoder.model,
        trained=encoder.trained_parameters(),
        teacher="some/teacher",
        facts={"Steps": "240"},
    )
    assert "The weights after these projections\nkeep their initial values" in card
    assert "- `encoder.layer.1.output.dense.weight`" in card and "- `pooler.dense.weight`" in card
    assert "`encoder.layer.1.attention.self.query.weight`" not in card
    assert "| Teacher | some/teacher |" in card and "| Steps | 240 |" in card


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no tokenizer; give the tokenizer/ folder of the data set$"):
        export_student(student(), tmp_path / "empty", tmp_path / "out", "# card\n")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=r"holds no safetensors weights"):
        weights_digest(tmp_path / "empty")
