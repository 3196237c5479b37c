"""The plan against what is counted and measured: operations, parameters, memory, the model of scaling."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig

from minilm.data.builder.build import build
from minilm.data.format.manifest import load_manifest
from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student, count_parameters, load_encoder
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.loss.objective import Objective
from minilm.orchestrator.bench.loss import peak_bytes
from minilm.orchestrator.cli import main
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.plan import estimate as plan_verb
from minilm.orchestrator.plan.cost import (
    Body,
    Machine,
    Work,
    all_reduce_seconds,
    flops_a_token,
    flops_per_second,
    memory,
    plan,
)
from minilm.orchestrator.plan.reading import reading
from minilm.orchestrator.plan.report import table
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.stage.data import DataSpec
from minilm.orchestrator.train.distributed import World
from minilm.orchestrator.train.step import StudentState, num_values, train_step
from tests.conftest import make_teacher
from tests.plan_figures import TEN, data_of, peak_of_worker, planned_peak, stand_in
from tests.test_driver_curriculum import write_recipe


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose matrices and activations outweigh what no formula covers."""
    return make_teacher(tmp_path_factory.mktemp("larger") / "bert", layers=4, hidden=96)


def works(folder: Path, teacher: Path, **changes) -> list[Work]:
    recipe = write_recipe(folder, folder / "none.txt", teacher, **changes)
    return plan_verb.works(load_recipe(recipe), None)


def distiller_of(teacher: Path, objective: str, *shapes: tuple[int, int]) -> Distiller:
    config = AutoConfig.from_pretrained(teacher)
    students = {
        f"s{i}": TappedEncoder(build_student(config, layers=n, hidden=h, seed=i, max_tokens=32), n)
        for i, (n, h) in enumerate(shapes)
    }
    return Distiller(load_encoder(teacher), students, Objective.named(objective)).train()


@pytest.mark.parametrize("objective", ["minilm", "minilmv2"])
def test_operations_and_parameters_are_those_that_are_counted(larger, tmp_path, objective):
    """PyTorch's own counter over a real step. It knows no attention of a CPU's, so the teacher's is spelt out."""
    stage = {"name": "s", "teacher": str(larger), "objective": objective, "batch": 8, "steps": 4}
    stage |= {"peak_lr": 1e-3, "warmup_steps": 1}
    shapes = [{"name": "s0", "layers": 3, "hidden": 48}, {"name": "s1", "layers": 1, "hidden": 24}]
    (work,) = works(tmp_path, larger, stages=[stage | {"students": shapes}])
    distiller = distiller_of(larger, objective, (3, 48), (1, 24))
    rows = 2
    ids = torch.randint(5, 50, (rows, work.seq_len))
    counted = {}
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            taught = distiller.teacher_forward(ids, None)
        counted["teacher"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            for name in ("s0", "s1"):
                distiller.term_sums(name, taught, ids, None, dropout_seed=0).sum().backward()
        counted["students"] = counter.get_total_flops()
    flops = flops_a_token(work)
    tokens = rows * work.seq_len
    assert tokens * flops.teacher == counted["teacher"]
    assert tokens * (flops.students + flops.relations) == counted["students"]
    assert work.teacher.parameters == count_parameters(distiller.teacher.model)
    for body, (name, student) in zip(work.students, distiller.students.items(), strict=True):
        assert body.parameters == count_parameters(student.model)
        assert body.trained == sum(p.numel() for p in distiller.trained_parameters(name).values())


@pytest.mark.parametrize("name", TEN)
def test_operations_of_ten_recipes_are_those_that_are_counted(name, tmp_path):
    recipe = stand_in(name, tmp_path, seq_len=16, hidden=192, vocabulary=50)
    configs: dict[str, PreTrainedConfig] = {}
    stages = zip(plan_verb.works(recipe, None), plan_verb.planned_stages(recipe, 16), strict=True)
    for work, resolved in stages:
        distiller = plan_verb.build_stage(resolved, configs, "cpu").train()
        if distiller.objective.needs_head:
            distiller.objective = replace(distiller.objective, mask_token_id=4, special_ids=(0, 1, 2, 3))
        ids = torch.randint(5, 50, (2, work.seq_len))
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as of_teacher:
                taught = distiller.teacher_forward(ids, None)
            with FlopCounterMode(display=False) as of_students:
                for student in distiller.students:
                    distiller.term_sums(student, taught, ids, None, dropout_seed=0).sum().backward()
        flops, tokens = flops_a_token(work), ids.numel()
        assert round(tokens * flops.teacher) == of_teacher.get_total_flops(), work.stage
        assert round(tokens * (flops.students + flops.relations)) == of_students.get_total_flops(), work.stage


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rows", [4, 32])
def test_memory_is_within_a_tenth_of_the_peak_of_a_real_step(larger, tmp_path, exact, rows):
    stage = {"name": "s", "teacher": str(larger), "student": {"layers": 3, "hidden": 48}, "batch": 64}
    stage |= {"steps": 4, "peak_lr": 1e-3, "warmup_steps": 1}
    compute = {"micro_batch": rows, "gradient_sum": "exact" if exact else "fast"}
    (work,) = works(tmp_path, larger, stages=[stage], compute=compute)
    distiller = distiller_of(larger, "minilm", (3, 48))
    student = StudentState(
        "s0",
        distiller.trained_parameters("s0"),
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        gradient_sum=compute["gradient_sum"],
        num_micro_batches=2,
        num_terms=num_values(distiller),
    )
    ids = torch.randint(5, 50, (rows, work.seq_len))
    steps = itertools.count()

    def step() -> None:
        train_step(
            distiller,
            [student],
            [(0, ids, None)],
            step=next(steps),
            seed=1,
            learning_rate=1e-4,
            max_gradient_norm=None,
            autocast=None,
            world=World(rank=0, size=1, device=torch.device("cpu"), control=None),
            seq_len=work.seq_len,
        )

    step()
    sums = [value for value in vars(student.sums).values() if isinstance(value, torch.Tensor)]
    held = [distiller.teacher.model, distiller.students["s0"].model, student.optimizer, ids, *sums]
    measured = peak_bytes(step, held, "cpu")
    assert memory(work).device == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataSpec]:
    folder = tmp_path_factory.mktemp("middling")
    return folder, data_of(folder, seq_len=128, vocabulary=20000)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN)
def test_memory_of_ten_recipes_is_within_a_tenth_of_what_a_workers_process_held(name, middling, tmp_path):
    """Teachers as wide as BERT-base, on rows of 128 tokens."""
    folder, data = middling
    few = {"steps": 3, "warmup_steps": 1, "batch": 16, "held_out_rows": 8}
    recipe = stand_in(
        name, folder, seq_len=128, hidden=768, vocabulary=20000, weights=True, changes=few.items()
    )
    for work, resolved in zip(
        plan_verb.works(recipe, 128), plan_verb.planned_stages(recipe, 128), strict=True
    ):
        measured = peak_of_worker(recipe, resolved, data, tmp_path)
        print(
            f"{name} {work.stage}: {measured / 1e6:,.0f} MB, planned {planned_peak(work) / measured:.2f} of it"
        )
        assert planned_peak(work) == pytest.approx(measured, rel=0.1)


BODY = Body(parameters=1000, trained=900, matrices=800, layers=2, attentions=1, hidden=8, ffn=32)
WORK = Work("s", BODY, (BODY,), 2, 16, 64, 8, 100, True, keep=2, keep_every=30)


def test_scaling_is_what_the_model_says():
    machine = Machine(flops_per_second(WORK, 128.0), bandwidth=7200.0, latency=0.5, overhead=0.25)
    found = plan(WORK, machine, [1, 2, 3, 8, 9])
    rows = {row.workers: row for row in found.scaling}
    assert set(rows) == {1, 2, 3, 8}, "a worker without a micro-batch is of no use"
    assert all_reduce_seconds(7200, 2, machine) == 1.0 + 1.0
    assert [rows[w].micro_batches for w in (1, 2, 3, 8)] == [8, 4, 3, 1]
    assert rows[1].seconds == 8 * 1.0 + 0.25
    assert rows[2].seconds == 4 * 1.0 + 2.0 + 0.25
    assert rows[2].efficiency == pytest.approx(8.25 / (2 * 6.25))
    assert found.seconds(1) == 825.0
    fast = plan(replace(WORK, exact=False), machine, [2])
    assert fast.scaling[0].seconds == rows[2].seconds - 0.5, "half the bytes"


def test_without_a_speed_there_is_no_time_and_no_efficiency():
    found = plan(WORK, Machine(), [1, 3])
    assert found.seconds(3) is None and [row.efficiency for row in found.scaling] == [None, None]
    assert plan(WORK, Machine(flops_a_token(WORK).total * 128, overhead=0.0), [1]).seconds(
        1
    ) == pytest.approx(800.0)
    assert found.seconds(99) is None, "more workers than are of use"


def test_checkpoints_grow_by_those_that_are_kept():
    found = plan(WORK, Machine(), [1])
    assert found.checkpoint == 4 * (1000 + 2 * 900)
    assert found.stored == (2 + 3) * found.checkpoint


def test_a_start_that_is_kept_lies_in_memory(tmp_path, text, teacher, capsys):
    kept = replace(WORK, students=(replace(BODY, keeps_start=True),))
    assert memory(kept).students - memory(WORK).students == 4 * 2 * 900
    assert memory(kept).save_copy - memory(WORK).save_copy == 4 * 900
    recipe, student = write_recipe(tmp_path, text, teacher), "stages.assistant.student"
    sets = ["--set", f"{student}.init=teacher-layers", "--set", f"{student}.start_share=0.5"]
    assert main(["plan", str(recipe), "--json", *sets]) == 0
    stages = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:2]
    assert [stage["work"]["students"][0]["keeps_start"] for stage in stages] == [True, False]


def test_the_verb_prints_a_table_and_json(tmp_path, text, teacher, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    assert main(["plan", str(recipe), "--tokens-per-second", "1000"]) == 0
    out = capsys.readouterr().out
    assert "stage assistant: 40 steps of 8 x 32 tokens = 10,240 tokens" in out
    assert "stage small:" in out
    assert "seconds a step  stage takes  efficiency" in out
    assert "more than 2 workers are refused: a step has 2 micro-batches of 4 rows" in out
    assert main(["plan", str(recipe), "--json"]) == 0
    assistant, small, whole = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert assistant["work"]["students"][0]["parameters"] == small["work"]["teacher"]["parameters"]
    assert [row["workers"] for row in small["scaling"]] == [1, 2]
    assert whole["flops"] == assistant["flops"] + small["flops"] and whole["seconds"] is None


def last(capsys) -> dict[str, str]:
    """What a plan says of the whole recipe, by the words in front."""
    lines = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
    return {line[2:16].strip(): line[16:] for line in lines[1:]} | {"": lines[0]}


def test_the_rate_of_one_stage_gives_the_time_of_each(tmp_path, text, teacher, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    options = ["plan", str(recipe), "--json", "--tokens-per-second", "1000"]
    times = []
    for stage in ("assistant", "small"):
        assert main([*options, "--stage", stage]) == 0
        *stages, whole = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        step = [one["scaling"][0]["seconds"] - 0.005 for one in stages]
        assert step[0] / step[1] == pytest.approx(stages[0]["flops"] / stages[1]["flops"])
        assert whole["seconds"] == pytest.approx(40 * (sum(step) + 0.01))
        times.append(step)
    assert times[0][0] == times[1][1] == pytest.approx(256 / 1000), "8 rows of 32 tokens"
    assert main([*options, "--stage", "large"]) == 2
    assert "--stage: given 'large'; allowed: assistant, small" in capsys.readouterr().err
    assert main([*options[:2], *options[3:]]) == 0
    said = last(capsys)
    assert said["time"].startswith("13s with 1 worker, without measuring and saving: assistant 10s, small 2s")
    assert said["rate"].startswith("1000 tokens/s in stage assistant, as given: ")


def test_a_measured_stage_gives_a_time_and_says_what_it_is_of(tmp_path, text, teacher, monkeypatch, capsys):
    monkeypatch.setattr("minilm.orchestrator.bench.stage_rate.SECONDS", 0.1)
    recipe = write_recipe(tmp_path, text, teacher)
    options = ["--set", "compute.device=cpu", "--set", "compute.precision=float32"]
    assert main(["plan", str(recipe), "--measure", "--stage", "small", *options]) == 0
    said = last(capsys)
    assert "tokens/s in stage small, measured here on one worker: " in said["rate"]
    assert said["assumed"] == "cpu in float32, 1 GB/s between workers"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_a_recipe_for_cuda_gets_no_hours_from_a_cpu(tmp_path, text, teacher, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    assert main(["plan", str(recipe), "--measure", "--set", "compute.device=cuda"]) == 0
    out = capsys.readouterr().out
    assert "efficiency" not in out and "stage takes" not in out
    assert (
        "time          unknown: the recipe asks for cuda, and this machine has no CUDA device to measure; a"
        in out
    )
    assert "assumed       cuda in bfloat16" in out


def test_a_data_sheet_gives_hours_and_every_assumption_is_printed(tmp_path, text, teacher, capsys):
    recipe = write_recipe(tmp_path, text, teacher)
    assert main(["plan", str(recipe), "--hardware", "h100x2", "--set", "stages.assistant.steps=1e9"]) == 0
    said = last(capsys)
    assert " days with 2 workers, without measuring" in said["time"]
    assert said["rate"].startswith(
        "25% of 989 TFLOP/s, h100's peak of dense bfloat16 products (NVIDIA H100 data sheet (SXM, NVLink)); that a "
        "step reaches so much is an assumption (--share-of-peak): 247,250 GFLOP/s"
    )
    assert said["workers"] == "the recipe asks for 1; --set compute.workers=2"
    assert said["assumed"] == "cuda in bfloat16, 450 GB/s between workers"
    for options, words in (
        (["--hardware", "h100x8"], "workers       2 of 8: a step of stage assistant has no work for more"),
        (
            ["--hardware", "A100", "--set", "compute.precision=float32"],
            "25% of 19.5 TFLOP/s, a100's peak of dense float32",
        ),
        (["--hardware", "l4", "--share-of-peak", "0.5"], "50% of 121 TFLOP/s"),
    ):
        assert main(["plan", str(recipe), *options]) == 0
        assert words in capsys.readouterr().out
    for options, words in (
        (
            ["--hardware", "tpu"],
            "--hardware: given 'tpu'; allowed: h200, h100, h100-pcie, a100, l40s, l4, each also with",
        ),
        (["--hardware", "h100x0"], "--hardware: given 'h100x0'; allowed: h200,"),
        (
            ["--hardware", "h100", "--set", "compute.device=cpu"],
            "--hardware is of CUDA devices, and compute.device is",
        ),
        (["--share-of-peak", "0.5"], "--share-of-peak: allowed: a number up to 1, with --hardware"),
    ):
        assert main(["plan", str(recipe), *options]) == 2
        assert words in capsys.readouterr().err


def test_a_device_with_too_little_memory_is_told(tmp_path, text, teacher):
    (work, _) = works(tmp_path, teacher)
    machine = Machine(memory=1e6)
    assert "too much      the device has 1 MB; a smaller micro_batch than 4" in table(
        plan(work, machine, [1]), machine
    )


def test_epochs_and_tokenizing_where_the_data_are_here(tmp_path, text, teacher, shards, capsys):
    rows = load_manifest(shards).rows
    recipe = write_recipe(tmp_path, text, teacher, data={"shards": str(shards)})
    assert main(["plan", str(recipe)]) == 0
    said = last(capsys)
    assert (
        said["epochs"]
        == f"over {rows:,} rows of corpus-1: assistant {320 / rows:.2g}, small {320 / rows:.2g}"
    )
    assert "tokenizing" not in said
    found = reading(load_recipe(write_recipe(tmp_path, text, teacher)))
    assert found.corpora[0].rows == pytest.approx(rows, rel=0.15) and not found.corpora[0].estimated
    assert found.num_bytes == text.stat().st_size and found.seconds > 0
    short = tmp_path / "short.txt"  # documents of which a row holds several
    short.write_text("\n".join(text.read_text().replace("\n", " ")[i * 40 : (i + 1) * 40] for i in range(90)))
    data = {
        "text": str(short),
        "tokenizer": str(teacher),
        "seq_len": 32,
        "packing": "masked",
        "held_out": 0.1,
    }
    data |= {"line_documents": True}
    several = reading(load_recipe(write_recipe(tmp_path, text, teacher, data=data)))
    build(
        [short],
        str(teacher),
        tmp_path / "masked",
        seq_len=32,
        packing="masked",
        held_out=0.1,
        processes=1,
        options={"line_documents": True},
    )
    assert several.corpora[0].rows == pytest.approx(load_manifest(tmp_path / "masked").rows, rel=0.15)
    long_text = tmp_path / "long.txt"
    long_text.write_text(text.read_text() * 300)
    (corpus,) = reading(load_recipe(write_recipe(tmp_path, long_text, teacher))).corpora
    assert corpus.rows == pytest.approx(300 * rows, rel=0.2)
    assert reading(load_recipe(write_recipe(tmp_path, tmp_path / "none.txt", teacher))).corpora == ()
    odd = tmp_path / "odd.jsonl"  # half a surrogate pair, which a build puts right
    odd.write_text('{"text": "a word \\ud83d or two"}\n')
    assert reading(load_recipe(write_recipe(tmp_path, odd, teacher))).corpora[0].rows > 0


def test_what_is_not_here_is_named_with_what_to_do(tmp_path, text, teacher, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = write_recipe(tmp_path, text, teacher)
    for override, words in (
        (
            "stages.assistant.teacher=models:/name@newest",
            "is in a registry; `minilm pull` it; give the model's folder: --set stages.NAME.teacher=FOLDER",
        ),
        (
            f"stages.assistant.teacher={tmp_path / 'none'}",
            "stage assistant: .*none is not here, or has no config.json; give the model's folder: --set stages",
        ),
        (
            "stages.assistant.teacher=nobody/none",
            r"stage assistant: cannot read the config of nobody/none \([^\n]+\); give a folder with a config.json",
        ),
        ("data.seq_len=65", "stage assistant: rows are 65 tokens long, the teacher takes at most 64; give a"),
    ):
        with pytest.raises(UserError, match=words):
            plan_verb.works(load_recipe(recipe, [override]), None)
    values = yaml.safe_load(recipe.read_text()) | {"data": {"shards": "s3://bucket/set"}}
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="is not here to say how long its rows are; add --seq-len TOKENS"):
        plan_verb.works(load_recipe(recipe), None)
    assert plan_verb.works(load_recipe(recipe), 64)[0].seq_len == 64
    for option, value, allowed in (
        ("--tokens-per-second", "0", "a number above 0"),
        ("--interconnect", "fast", "a number above 0"),
        ("--seq-len", "-4", "a whole number above 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", str(recipe), option, value])
        assert f"{option}: given '{value}'; allowed: {allowed}" in capsys.readouterr().err


def test_a_built_data_set_says_how_long_its_rows_are(tmp_path, text, teacher, shards):
    recipe = write_recipe(tmp_path, text, teacher, data={"shards": str(shards)})
    assert plan_verb.works(load_recipe(recipe), None)[0].seq_len == 32
