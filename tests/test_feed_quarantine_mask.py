"""A damaged shard: the run ends and says how to repair it, or masks the same rows on any number of workers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minilm.data.builder.build import build
from minilm.data.errors import DataError
from minilm.data.format.manifest import load_manifest
from minilm.data.read.quarantine import Quarantine, QuarantineGrew
from minilm.model.export import weights_digest
from minilm.orchestrator.checkpoint.format import read_meta
from minilm.orchestrator.driver.prepare_data import prepare_data
from minilm.orchestrator.driver.verify_run import verify_run
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.feed.corpora import open_stream
from minilm.orchestrator.feed.quarantine_mask import QuarantineMask
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.resolve.folders import folder_here
from minilm.orchestrator.stage.data import QuarantineSpec
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.stage.metrics_file import read_all_metrics
from minilm.orchestrator.stage.spec import StageSpec
from minilm.orchestrator.worker.error_file import run_alone, run_reporting
from minilm.orchestrator.worker.loop import run_stage
from tests import worker_pool
from tests.conftest import write_text
from tests.support import checkpoints_in, describe_folder, make_spec

STEPS, DAMAGED_AT = 12, 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    text = write_text(folder / "words.txt", documents=120)
    options = {"seq_len": 32, "held_out": 0.1, "rows_per_block": 4, "shard_bytes": 40_000, "processes": 1}
    build([text], str(teacher), folder / "data", **options)
    return folder / "data"


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> tuple[Path, str, list[int]]:
    """A copy with a flipped bit in the first block that only step `DAMAGED_AT` and later read, its shard's name, and
    at each step how many of its rows are read."""
    folder = shutil.copytree(whole, tmp_path / "data")
    manifest = load_manifest(folder)
    stream = open_stream(describe_folder(whole), seed=3, batch=8, micro_batch=8)
    blocks = [[manifest.locate(row).block for row in stream.row_ids(step, 0)] for step in range(STEPS)]
    early = {block for step in blocks[:DAMAGED_AT] for block in step}
    block = next(block for block in blocks[DAMAGED_AT] if block not in early)
    place = manifest.locate(block * manifest.rows_per_block)
    shard = folder / manifest.shard(place.shard).name
    raw = bytearray(shard.read_bytes())
    raw[place.offset] ^= 1
    shard.write_bytes(raw)
    return folder, shard.name, [step.count(block) for step in blocks]


def masked_job(data: Path, teacher: Path, folder: Path, *, share: float = 0.1) -> StageSpec:
    spec = make_spec(data, teacher, folder, steps=STEPS, log_every=1)
    return replace(spec, data=replace(spec.data, quarantine=QuarantineSpec(str(folder / "list.json"), share)))


def quarantined(spec: StageSpec) -> list[float]:
    return [
        p.metrics["data/quarantined_rows"]
        for p in read_all_metrics(StageFolder(Path(spec.folder)).step_metrics)
    ]


def digest(spec: StageSpec) -> str:
    return weights_digest(StageFolder(Path(spec.folder)).student("small"))


def test_stop_names_the_block_and_the_command_that_repairs_it(damaged, teacher, tmp_path):
    folder, shard, _ = damaged
    with pytest.raises(DataError, match=rf"{shard}.*block \d+.*`minilm data repair {folder}`"):
        run_stage(make_spec(folder, teacher, tmp_path / "stage", steps=STEPS))


def test_one_and_two_workers_leave_the_same_rows_out(damaged, whole, teacher, tmp_path):
    folder, shard, counts = damaged
    sound = masked_job(whole, teacher, tmp_path / "sound")
    assert run_alone(sound)
    alone = masked_job(folder, teacher, tmp_path / "alone")
    assert run_alone(alone)
    both = masked_job(folder, teacher, tmp_path / "both")
    rounds = 1
    while (codes := worker_pool.join(worker_pool.start(both, 2))) != [0, 0]:
        assert rounds < 4, f"{codes}\n{worker_pool.log(both)}"
        rounds += 1
    assert rounds > 1
    assert digest(alone) == digest(both) != digest(sound)
    expected = [sum(counts[: step + 1]) for step in range(STEPS)]
    assert expected[DAMAGED_AT - 1] == 0 < expected[-1]
    assert quarantined(alone) == quarantined(both) == expected
    assert quarantined(sound) == [0] * STEPS
    for spec in (alone, both):
        path = checkpoints_in(StageFolder(Path(spec.folder)).checkpoints)[-1]
        ((step, _),) = read_meta(str(path))["ledger"]["quarantine"]
        assert 3 <= step <= DAMAGED_AT  # of the newest checkpoint before; a slow save puts the next one off
        assert verify_run(path).sound
        assert json.loads((Path(spec.folder) / "attempts.json").read_text())["failures"] == 0


def test_more_damage_than_the_recipe_allows_ends_the_run(damaged, teacher, tmp_path):
    folder, shard, _ = damaged
    spec = masked_job(folder, teacher, tmp_path / "stage", share=0.001)
    assert not run_reporting(spec)
    failure = json.loads(StageFolder(Path(spec.folder)).failure.read_text())
    assert failure["exit_code"] == 2
    assert "are damaged, more than max_quarantined_share allows (0.10%)" in failure["message"]
    assert (
        f"{shard} (1 blocks)" in failure["message"] and f"`minilm data repair {folder}`" in failure["message"]
    )


def test_a_list_that_grew_while_the_workers_started(whole, tmp_path):
    data = replace(describe_folder(whole), quarantine=QuarantineSpec(str(tmp_path / "list.json"), 0.5))
    early = QuarantineMask(data)
    with pytest.raises(QuarantineGrew):
        Quarantine(tmp_path / "list.json", max_quarantined_share=0.5).add(
            load_manifest(whole), str(whole), [2], "damage"
        )
    late = QuarantineMask(data)
    assert early.grew() and not late.grew()
    late.check_rank_zero(late.digest)
    with pytest.raises(QuarantineGrew, match="grew while the workers started: they start again"):
        late.check_rank_zero(early.digest)


def test_the_history_of_lists_goes_on_from_a_checkpoint(whole, tmp_path):
    stop = QuarantineMask(describe_folder(whole))
    stop.restore(0, {})
    assert (stop.resume_state(), stop.digest, stop.grew()) == ({"masked_rows": 0, "quarantine": []}, 0, False)
    stop.restore(
        9, {"masked_rows": 3, "quarantine": [[4, {"f": [1]}]]}
    )  # mended, and on_corrupt: stop from here on
    assert stop.resume_state() == {"masked_rows": 3, "quarantine": [(4, {"f": [1]}), (9, {})]}


def test_the_recipe_says_what_happens(whole, teacher, tmp_path):
    stage = {
        "name": "s",
        "teacher": str(teacher),
        "student": {"layers": 1, "hidden": 24},
        "batch": 32,
        "steps": 9,
    }
    data = {"shards": str(whole), "on_corrupt": "quarantine", "max_quarantined_share": 0.02}
    recipe = {"name": "r", "data": data, "stages": [stage | {"peak_lr": 1e-3, "warmup_steps": 1}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    loaded, work = load_recipe(tmp_path / "r.yaml"), Workdir(tmp_path / "work")
    spec = prepare_data(loaded, work, folder_here, None)
    assert spec.quarantine == QuarantineSpec(str(tmp_path / "work" / "quarantine.json"), 0.02)
    stopping = load_recipe(tmp_path / "r.yaml", ["data.on_corrupt=stop"])
    assert prepare_data(stopping, work, folder_here, None).quarantine is None
    assert stopping.result_fields() == loaded.result_fields()


@pytest.mark.slow
def test_on_ray_all_workers_start_again_and_the_run_ends(damaged, teacher, tmp_path):
    """The whole command with two workers: Ray replaces them when the list has grown, and the step is made again."""
    folder, _, counts = damaged
    stage = {"name": "small", "teacher": str(teacher), "student": {"layers": 2, "hidden": 24}, "batch": 8}
    stage |= {"steps": STEPS, "peak_lr": 1e-3, "warmup_steps": 3, "held_out_rows": 8}
    recipe = {
        "name": "r",
        "seed": 3,
        "data": {"shards": str(folder), "on_corrupt": "quarantine", "max_quarantined_share": 0.1},
        "stages": [stage],
        "compute": {"micro_batch": 4, "workers": 2, "threads": 1, "checkpoint_every_steps": 3},
        "tracking": {"log_every": 1},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run = [
        sys.executable,
        "-m",
        "minilm",
        "run",
        str(tmp_path / "r.yaml"),
        "--workdir",
        str(tmp_path / "w"),
    ]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    stage_folder = StageFolder(tmp_path / "w" / "stages" / "small")
    points = read_all_metrics(stage_folder.step_metrics)
    expected = [sum(counts[: step + 1]) for step in range(STEPS)]
    assert [point.metrics["data/quarantined_rows"] for point in points] == expected
    assert "are damaged and now in quarantine" in "".join(
        p.read_text() for p in stage_folder.root.glob("worker-*.log")
    )
