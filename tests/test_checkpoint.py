"""Checkpoints: bit for bit, whole or absent, never another run's."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint import format as checkpoint_format
from minilm.orchestrator.checkpoint.format import (
    Fingerprints,
    ResumeState,
    check_newest,
    parse_meta,
    sealed,
    sha256_file,
)
from minilm.orchestrator.checkpoint.local_store import LocalStore
from minilm.orchestrator.checkpoint.safetensors_file import write_tensors
from minilm.orchestrator.checkpoint.state import capture
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.train.step import StudentState
from tests.support import checkpoints_in

MINE = Fingerprints("recipe-a", "data-a")
FACTS = ResumeState({"digest": "0", "seed": 1, "batch": 8}, threads=3, parts=2, precision="float32")


def make(seed: int) -> tuple[dict[str, torch.nn.Module], list[StudentState]]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    trained = {k: p for k, p in model.named_parameters() if k.startswith("0.")}
    return {"s": model}, [StudentState("s", trained, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)]


def advance(states: list[StudentState], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for state in states:
        state.gradient.copy_(torch.randn(state.gradient.shape, generator=generator))
        state.update(torch.tensor(True), step=step, learning_rate=0.01, max_gradient_norm=None)


def save(folder, step, models, states, keep=2, fingerprints=MINE, **options):
    parts = capture(models, states)
    name = checkpoint.write(LocalStore(folder), step, parts, fingerprints, FACTS, keep=keep, **options)
    return folder / name


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    models, states = make(0)
    for step in range(3):
        advance(states, step)
    save(tmp_path, 3, models, states)
    other_models, other_states = make(1)
    assert checkpoint.restore_newest(LocalStore(tmp_path), other_models, other_states, MINE) == (3, FACTS)
    for step in range(3, 6):
        advance(states, step)
        advance(other_states, step)
    for name, value in models["s"].state_dict().items():
        assert torch.equal(value, other_models["s"].state_dict()[name])


def test_code_that_has_changed_is_said_and_goes_on(tmp_path, caplog):
    models, states = make(0)
    path = save(tmp_path, 3, models, states) / "checkpoint.json"
    assert checkpoint.restore_newest(LocalStore(tmp_path), *make(1), MINE) == (3, FACTS)
    assert not caplog.messages
    meta = json.loads(path.read_text())
    meta["code"] = {**meta["code"], "torch": "1.0", "commit": "abc"}
    write_json(path, sealed(meta))
    assert checkpoint.restore_newest(LocalStore(tmp_path), *make(1), MINE) == (3, FACTS)
    (said,) = caplog.messages
    assert said.startswith("goes on with other code than step-000000003 was made by: commit abc → ")
    assert said.endswith(f"torch 1.0 → {torch.__version__}")


def test_nothing_there_means_none(tmp_path):
    assert checkpoint.restore_newest(LocalStore(tmp_path / "absent"), *make(0), MINE) is None


def test_the_last_k_are_kept(tmp_path):
    models, states = make(0)
    for step in (1, 2, 3, 4):
        save(tmp_path, step, models, states, keep=2)
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-000000003", "step-000000004"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "lose", "metadata"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, damage):
    models, states = make(0)
    advance(states, 0)
    save(tmp_path, 1, models, states)
    first = {k: v.clone() for k, v in models["s"].state_dict().items()}
    advance(states, 1)
    newest = save(tmp_path, 2, models, states)
    file = newest / "s.model.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "lose":
        file.unlink()
    else:
        (newest / "checkpoint.json").write_text("{")
    other_models, other_states = make(5)
    assert checkpoint.restore_newest(LocalStore(tmp_path), other_models, other_states, MINE) == (1, FACTS)
    assert all(torch.equal(v, other_models["s"].state_dict()[k]) for k, v in first.items())
    assert "step-000000002 is damaged" in caplog.text


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
def test_storage_that_does_not_answer_is_no_damage(tmp_path, monkeypatch, number):
    models, states = make(0)
    for step in (1, 2):
        save(tmp_path, step, models, states)

    def fails(path):
        raise OSError(number, "not now", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="not now"):
        patch.setattr(checkpoint_format, "sha256_file", fails)
        checkpoint.restore_newest(LocalStore(tmp_path), *make(1), MINE)
    assert checkpoint.restore_newest(LocalStore(tmp_path), *make(1), MINE) == (2, FACTS)


def test_any_bit_flipped_in_the_metadata_is_damage(tmp_path):
    """A flip in a digest, a step or a seed is none of them: it is no other recipe, and no other position."""
    path = save(tmp_path, 1, *make(0)) / "checkpoint.json"
    whole = path.read_bytes()
    assert parse_meta(whole)["step"] == 1
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError):
            parse_meta(bytes(flipped))


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path, caplog):
    models, states = make(0)
    save(tmp_path, 1, models, states)
    save(tmp_path, 2, models, states).rename(tmp_path / "step-000000005")
    assert checkpoint.restore_newest(LocalStore(tmp_path), *make(1), MINE) == (1, FACTS)
    assert "step-000000005 is damaged (it is of step 2)" in caplog.text
    assert save(tmp_path, 5, models, states).is_dir()


def test_a_flip_in_what_the_newest_belongs_to_falls_back_to_the_one_before(tmp_path, caplog):
    models, states = make(0)
    save(tmp_path, 1, models, states)
    path = save(tmp_path, 2, models, states) / "checkpoint.json"
    path.write_text(path.read_text().replace(f'"data": "{MINE.data}', f'"data": "{MINE.data}x'))
    check_newest(LocalStore(tmp_path), MINE)
    assert checkpoint.restore_newest(LocalStore(tmp_path), *make(1), MINE) == (1, FACTS)
    assert "step-000000002 is damaged (checkpoint.json does not have the SHA-256" in caplog.text


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    path = save(tmp_path, 1, *make(0))
    (path / "checkpoint.json").unlink()
    with pytest.raises(
        UserError, match="none of the 1 checkpoints in .* is sound .step-000000001: .*No such file"
    ):
        checkpoint.restore_newest(LocalStore(tmp_path), *make(0), MINE)


def test_what_another_version_wrote_is_said_to_be_so(tmp_path):
    path = save(tmp_path, 1, *make(0)) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(
        UserError, match="format 2, this version reads 4.; .* go on with the version that wrote"
    ):
        checkpoint.restore_newest(LocalStore(tmp_path), *make(0), MINE)


@pytest.mark.parametrize(
    ("fingerprints", "what"),
    [(Fingerprints("recipe-b", "data-a"), "recipe"), (Fingerprints("recipe-a", "data-b"), "data set")],
)
def test_another_recipes_or_data_sets_checkpoint_is_refused(tmp_path, fingerprints, what):
    save(tmp_path, 1, *make(0))
    with pytest.raises(
        UserError, match=f"belongs to another {what} .* use another --workdir or compute.checkpoints"
    ):
        checkpoint.restore_newest(LocalStore(tmp_path), *make(0), fingerprints)


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    """What a SIGKILL in the middle of a save leaves: the temporary folder."""
    path = save(tmp_path, 1, *make(0))
    shutil.copytree(path, tmp_path / ".step-000000002.999.tmp")
    assert checkpoint.restore_newest(LocalStore(tmp_path), *make(0), MINE) == (1, FACTS)


@pytest.mark.parametrize("limit", [0, 5, 100, 250])
def test_a_disk_that_fills_up_anywhere_is_an_oserror_and_leaves_nothing(tmp_path, limit):
    """A real write that fails after `limit` bytes of a file (RLIMIT_FSIZE: EFBIG instead of ENOSPC)."""
    models, states = make(0)
    advance(states, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, 1, models, states)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_written_tensors_are_read_by_the_library_and_hash_to_what_is_recorded(tmp_path):
    path = tmp_path / "t.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(3, 5, generator=generator),
        "turned": torch.randn(4, 6, generator=generator).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "long": torch.tensor([-1, 2**62]),
        "flag": torch.tensor([True, False, True]),
    }
    assert write_tensors(path, tensors) == sha256_file(path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_a_file_has_the_bytes_that_earlier_versions_wrote(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2), "refused": torch.zeros(1, dtype=torch.int64)}
    header, content = {}, b""
    for name in ("refused", "a", "b"):  # widest first, so that every tensor is aligned; then by name
        raw = tensors[name].numpy().tobytes()
        header[name] = {
            "dtype": "I64" if name == "refused" else "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(content), len(content) + len(raw)],
        }
        content += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_tensors(tmp_path / "t.safetensors", tensors)
    assert (tmp_path / "t.safetensors").read_bytes() == len(text).to_bytes(8, "little") + text + content


def test_only_the_students_are_in_it_and_no_pickle(tmp_path):
    models, states = make(0)
    advance(states, 0)
    path = save(tmp_path, 1, models, states)
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoint.json",
        "s.model.safetensors",
        "s.optimizer.safetensors",
    ]
    meta = json.loads((path / "checkpoint.json").read_text())
    assert meta["step"] == 1
    assert set(meta["sha256"]) == {"s.model.safetensors", "s.optimizer.safetensors"}
