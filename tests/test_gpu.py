"""What only a GPU shows: no host sync in a step, the CPU's gradients, the same bits twice, bounded memory.

`pytest -m gpu` runs these and the compiled twins of tests/test_model_kernels.py; docs/benchmarks.md lists what to
measure.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minilm.model.encoder.families import FAMILIES
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.export import weights_digest
from minilm.model.loss.relations import relation_kl
from minilm.orchestrator.bench.loss import bench_loss
from minilm.orchestrator.bench.step import Size, bench_step
from minilm.orchestrator.checkpoint import checkpoint
from minilm.orchestrator.checkpoint.async_saver import AsyncSaver
from minilm.orchestrator.checkpoint.format import Fingerprints, ResumeState, read
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.system.lease import Fence
from minilm.orchestrator.train.build import build_distiller, compute_deterministically, make_states
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.support import finished_as, make_spec
from tests.test_model_encoder import batch, tiny_model
from tests.test_train_step import one_step

pytestmark = pytest.mark.gpu
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on the device
CUDA = torch.device("cuda", 0)
GPU = World(rank=0, size=1, device=CUDA, control=None)


@pytest.fixture
def no_sync():
    """Inside, an operation that makes the host wait for the device is an error."""

    class Watch:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return Watch()


@pytest.fixture
def deterministic():
    compute_deterministically()
    yield
    torch.use_deterministic_algorithms(False)


def gpu_job(data: Path, teacher: Path, folder: Path, **changes) -> StageSpec:
    return make_spec(data, teacher, folder, device="cuda", **changes)


def test_the_watch_sees_a_sync(no_sync):
    value = torch.ones(1, device=CUDA)
    with pytest.raises(RuntimeError), no_sync:
        value.item()


@pytest.mark.parametrize("objective", ["minilm", "value-mse", "layer-to-layer", "hidden-relation"])
@pytest.mark.parametrize("data", ["shards", "masked"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gradient_sum", ["exact", "fast"])
def test_a_step_never_waits_for_the_device(
    request, teacher, tmp_path, no_sync, objective, data, autocast, gradient_sum
):
    rows = request.getfixturevalue(data)
    spec = gpu_job(rows, teacher, tmp_path, gradient_sum=gradient_sum, objective={"name": objective})
    options = {"world": GPU, "autocast": autocast, "max_gradient_norm": 1.0, "by_head": True}
    distiller, states, _ = one_step(spec, **options)  # compiles kernels, allocates
    with no_sync:
        _, _, outcome = one_step(spec, distiller=distiller, states=states, step=1, **options)
    assert outcome.terms.isfinite().all()
    assert states[0].skipped.tolist() == [0, -1, 0]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_taps_are_the_cpus_and_never_wait(architecture, no_sync):
    ids, mask = batch()
    expected = TappedEncoder(tiny_model(architecture), 4)(ids, mask)
    encoder = TappedEncoder(tiny_model(architecture).to(CUDA), 4)
    ids, mask = ids.to(CUDA), mask.to(CUDA)
    encoder(ids, mask), encoder(ids, None)
    with no_sync:
        taps = encoder(ids, mask)
        encoder(ids, None)
    for got, right in zip(taps[:3], expected[:3], strict=True):
        valid = mask[:, None, :, None].cpu()
        torch.testing.assert_close(got.cpu() * valid, right * valid, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("data", ["shards", "masked"])
def test_the_gradient_is_the_cpus(request, teacher, tmp_path, data):
    rows = request.getfixturevalue(data)
    _, (cpu,), expected = one_step(make_spec(rows, teacher, tmp_path, dropout=0.0))
    _, (gpu,), outcome = one_step(gpu_job(rows, teacher, tmp_path, dropout=0.0), world=GPU)
    torch.testing.assert_close(gpu.gradient.cpu(), cpu.gradient, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(outcome.terms.cpu(), expected.terms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("data", ["shards", "masked"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_exact_step_gives_the_same_bits_twice(request, teacher, tmp_path, deterministic, data, autocast):
    spec = gpu_job(request.getfixturevalue(data), teacher, tmp_path)
    twice = [one_step(spec, world=GPU, autocast=autocast)[1][0].gradient for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stage_learns_and_a_stopped_one_ends_with_the_same_weights(documents, teacher, tmp_path, precision):
    whole = gpu_job(
        documents, teacher, tmp_path / "whole", steps=60, peak_lr=1e-2, precision=precision, dropout=0.0
    )
    parts = replace(whole, folder=str(tmp_path / "parts"))
    assert run_stage(whole)
    folders = [StageFolder(Path(spec.folder)) for spec in (whole, parts)]
    first, *_, last = read_all_metrics(folders[0].heldout_metrics)
    assert sum(last.metrics.values()) < 0.7 * sum(first.metrics.values())

    class Killed(BaseException):
        pass

    def die(step: int) -> None:
        if step == 31:
            raise Killed

    with pytest.raises(Killed):
        run_stage(parts, on_step=die)
    assert run_stage(parts)
    assert len({weights_digest(folder.student("small")) for folder in folders}) == 1


def test_a_save_holds_the_moment_it_was_asked_for(shards, teacher, tmp_path):
    """The loop goes on while the copy is still queued on the device."""
    spec = gpu_job(shards, teacher, tmp_path)
    distiller = build_distiller(spec, CUDA)
    states = make_states(spec, distiller)
    models = {"small": distiller.state_module("small")}
    saver = AsyncSaver(
        tmp_path, models, states, Fingerprints("", ""), keep=9, keep_every=None, fence=Fence("")
    )
    truths = []
    for step in range(4):
        one_step(spec, distiller=distiller, states=states, step=step, world=GPU)
        truths.append({name: weight.clone() for name, weight in models["small"].state_dict().items()})
        saver.save(step + 1, ResumeState({}, 1, 1, "float32"), lambda copy: None)
        torch.cuda._sleep(20_000_000)
    saver.wait()
    assert not torch.equal(*(truth["embeddings.word_embeddings.weight"] for truth in truths[:2]))
    for folder, truth in zip(checkpoint.list_checkpoints(tmp_path), truths, strict=True):
        saved = next(v for k, v in read(folder)[1].items() if "optimizer" not in k)
        assert all(torch.equal(saved[name], weight.cpu()) for name, weight in truth.items())


def test_out_of_memory_is_survived_with_halves(text, tmp_path, caplog):
    from minilm.data.builder.build import build
    from tests.conftest import make_teacher

    teacher = make_teacher(tmp_path / "bert", hidden=256)
    shards = tmp_path / "rows"
    build([text], str(teacher), shards, seq_len=64, held_out=0.1, seed=0, processes=1)
    spec = gpu_job(shards, teacher, tmp_path / "s", batch=512, micro_batch=512, dropout=0.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    distiller, states, _ = one_step(spec, world=GPU)
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    del distiller, states
    torch.cuda.empty_cache()
    limit = held + 0.75 * (peak - held)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        *_, outcome = one_step(spec, world=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome.num_chunks == 2 and outcome.terms.isfinite().all()
    assert "out of memory with 512 rows at once" in caplog.text


# ---- The fused loss. ----


def peak_beyond(call, *held) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def sides(rows, dtype=torch.bfloat16, heads=12, tokens=512, sizes=(64, 64, 32, 32)):
    made = [torch.randn(rows, heads, tokens, size, device=CUDA, dtype=dtype) for size in sizes]
    return [*made[:2], *(side.requires_grad_() for side in made[2:])]


def test_auto_takes_the_fused_kernels_and_keeps_to_a_twentieth_of_the_whole_maps_memory(caplog):
    tensors = sides(32)
    peaks = {}
    for which in ("reference", "triton", "auto"):

        def call(which=which):
            torch.autograd.grad(relation_kl(*tensors, None, implementation=which), tensors[2:])

        peaks[which] = peak_beyond(call)
    assert peaks["triton"] <= 0.05 * peaks["reference"]
    assert peaks["auto"] == peaks["triton"] and not caplog.messages


def test_the_fused_gradient_is_the_same_bits_twice_and_never_waits(no_sync):
    tensors = sides(4)
    mask = (torch.rand(4, 512) > 0.2).to(CUDA)

    def gradients():
        return torch.autograd.grad(relation_kl(*tensors, mask, implementation="triton"), tensors[2:])

    first = gradients()
    with no_sync:
        second = gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_31_bits():
    rows = 2**31 // (12 * 512 * 64) + 3
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of free memory")
    tensors = sides(rows, sizes=(64, 64, 64, 64))
    assert tensors[2].numel() > 2**31
    last = [side[-2:].detach().clone() for side in tensors]
    last = [*last[:2], *(side.requires_grad_() for side in last[2:])]
    options = {"reduction": "sequence_sum", "implementation": "triton"}
    for whole, small in zip(
        torch.autograd.grad(relation_kl(*tensors, None, **options), tensors[2:]),
        torch.autograd.grad(relation_kl(*last, None, **options), last[2:]),
        strict=True,
    ):
        assert torch.equal(whole[-2:], small)


def test_compiled_blocks_give_the_same_taps():
    encoder = TappedEncoder(tiny_model().to(CUDA), 3)
    ids, mask = (part.to(CUDA) for part in batch())
    plain = encoder(ids, mask)
    encoder.compile_blocks()
    for got, expected in zip(encoder(ids, mask)[:3], plain[:3], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_the_benches_run():
    rows = bench_loss(batch=2, tokens=64, repeats=2, device="cuda", dtype=torch.bfloat16)
    assert [row.way for row in rows] == ["reference", "tiled", "triton"]
    small = {"teacher": Size(2, 96), "students": [Size(2, 48)], "batch": 2, "tokens": 64, "repeats": 2}
    rows = bench_step(**small, device="cuda", dtype=torch.bfloat16, ways=("by-hand", "ours", "ours-compiled"))
    assert len(rows) == 3 and all(row.peak_memory_bytes > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_bits_of_one(shards, teacher, tmp_path):
    one = gpu_job(shards, teacher, tmp_path / "one", steps=3, warmup_steps=1)
    two = replace(one, folder=str(tmp_path / "two"))
    assert worker_pool.join(worker_pool.start(one, 1)) == [0], worker_pool.log(one)
    assert worker_pool.join(worker_pool.start(two, 2)) == [0, 0], worker_pool.log(two)
    assert finished_as(one) == finished_as(two)
