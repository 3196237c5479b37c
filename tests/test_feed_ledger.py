"""The ledger: every row with its contents counts, order inside a step does not, and a wrong row stops the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minilm.data.builder.build import build
from minilm.data.read.cached_reader import NotCached
from minilm.data.read.rows import Batch
from minilm.data.stream import Stream
from minilm.orchestrator import cli
from minilm.orchestrator.checkpoint.format import sealed
from minilm.orchestrator.driver.verify_run import verify_run
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.feed import ledger
from minilm.orchestrator.feed.ledger import Expected, Ledger, from_limbs, rows_digest, to_limbs
from minilm.orchestrator.stage.folder import StageFolder
from minilm.orchestrator.system.files import read_json, write_json
from minilm.orchestrator.worker.loop import run_stage
from tests.support import checkpoints_in, describe_folder, make_spec

MODULUS = 1 << 128


def batch(rows: int = 6, tokens: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randint(0, 9, (rows, tokens), generator=generator), None, torch.arange(rows) * 7)


def taken(whole: Batch, rows: list[int]) -> Batch:
    return Batch(whole.input_ids[rows], None, whole.row_ids[rows])


def test_a_digest_is_frozen_for_ever():
    rows = Batch(torch.tensor([[1, 2, 3], [4, 5, 6]]), None, torch.tensor([10, 2**40]))
    assert rows_digest(rows) == 0x2A69D9CE6B25827F8AA049750FF473E9
    masked = rows._replace(mask=torch.tensor([[True, True, False], [True, True, True]]))
    assert rows_digest(masked) == 0xFB7049993F232A3772FDF5AD852E2E26


def test_order_and_cut_of_a_step_do_not_count():
    whole = batch()
    assert rows_digest(taken(whole, [3, 1, 0, 5, 4, 2])) == rows_digest(whole)
    cut = rows_digest(taken(whole, [0, 1])) + rows_digest(taken(whole, [2, 3, 4, 5]))
    assert cut % MODULUS == rows_digest(whole)


def test_what_is_read_counts():
    whole = batch()
    other = whole.input_ids.clone()
    other[2, 3] += 1
    different = [
        whole._replace(input_ids=other),
        whole._replace(row_ids=whole.row_ids + 1),
        whole._replace(mask=torch.arange(5)[None, :] < torch.tensor([5, 5, 5, 4, 5, 5])[:, None]),
        taken(whole, [0, 1, 2, 3, 4]),
        taken(whole, [0, 1, 2, 3, 4, 4]),
        taken(whole, [0, 1, 2, 3, 4, 5, 5]),
    ]
    digests = {rows_digest(b) for b in (whole, *different)}
    assert len(digests) == 7
    full = whole._replace(mask=torch.ones(6, 5, dtype=torch.bool))
    assert rows_digest(full) == rows_digest(whole)


def test_limbs_add_up_over_ranks():
    numbers = [MODULUS - 1, 2**127 + 12345, 17]
    sums = [sum(limbs) for limbs in zip(*map(to_limbs, numbers), strict=True)]
    assert from_limbs(sums) == sum(numbers) % MODULUS
    assert max(sums) < 2**63


def test_a_bounded_number_of_steps_is_compared_with_first_and_last_among_them():
    kept = Ledger()
    for step in range(100_000):
        kept.close_step(step, to_limbs(step))
    assert len(kept.recent) <= ledger.MAX_RECENT
    steps = [step for step, _ in kept.pop_steps_to_check()]
    assert len(steps) == ledger.CHECKED_STEPS
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert kept.pop_steps_to_check() == []
    kept.close_step(100_000, to_limbs(5))
    assert kept.pop_steps_to_check() == [(100_000, 5)]


def test_the_running_digest_of_a_run_is_the_recomputed_one(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path, steps=7, batch=12)
    assert run_stage(spec)
    path = checkpoints_in(StageFolder(tmp_path).checkpoints)[-1]
    calls = []
    check = verify_run(path, [str(shards)], lambda done, steps: calls.append((done, steps)), micro_batch=5)
    assert check.sound
    assert (check.step, check.rows, calls[-1]) == (7, 84, (7, 7))
    assert "84 rows of 7 steps are exactly those" in check.text()


def test_a_checkpoint_of_other_rows_is_told(shards, teacher, tmp_path, capsys):
    assert run_stage(make_spec(shards, teacher, tmp_path, steps=3))
    path = checkpoints_in(StageFolder(tmp_path).checkpoints)[-1]
    meta = read_json(path / "checkpoint.json")
    verb = ["data", "verify-run", str(path), str(shards)]
    assert cli.main(verb) == 0
    assert "24 rows of 3 steps are exactly those" in capsys.readouterr().out
    write_json(path / "checkpoint.json", sealed(meta | {"ledger": meta["ledger"] | {"seed": 4}}))
    check = verify_run(path)
    assert not check.sound
    assert "24 rows of 3 steps are NOT those that seed and data give" in check.text()
    assert cli.main([*verb, "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == check.as_dict()


def test_another_data_set_is_refused(shards, teacher, text, tmp_path):
    assert run_stage(make_spec(shards, teacher, tmp_path / "run", steps=3))
    other = tmp_path / "other"
    build([text], str(teacher), other, seq_len=16, held_out=0.1, seed=0, processes=1)
    path = checkpoints_in(StageFolder(tmp_path / "run").checkpoints)[-1]
    with pytest.raises(UserError, match="belongs to other data .* give what the run has read"):
        verify_run(path, [str(other)])
    with pytest.raises(UserError, match="cannot be read .* give a folder step-… of a stage's checkpoints"):
        verify_run(tmp_path)


@pytest.mark.parametrize("fault", ["contents", "twice"])
def test_a_wrong_row_stops_the_run_before_its_checkpoint(shards, teacher, tmp_path, monkeypatch, fault):
    original = Stream.iterate

    def iterate(self, first, steps, mine):
        for number, item in enumerate(original(self, first, steps, mine)):
            if number == 9:  # step 4 of two micro-batches each
                if fault == "contents":
                    item.input_ids[1, 3] += 1
                else:
                    item.row_ids[1], item.input_ids[1] = item.row_ids[0], item.input_ids[0]
            yield item

    monkeypatch.setattr(Stream, "iterate", iterate)
    spec = make_spec(shards, teacher, tmp_path)
    with pytest.raises(
        UserError,
        match=r"the rows that step 4 was computed from are not those of the data set .* nothing was saved",
    ):
        run_stage(spec)
    names = [p.name for p in checkpoints_in(StageFolder(tmp_path).checkpoints)]
    assert names == ["step-000000003"]
    monkeypatch.undo()
    assert run_stage(spec)


def test_expected_does_not_depend_on_the_micro_batch(shards):
    digests = {
        Expected(describe_folder(shards), seed=3, batch=12, micro_batch=m).digest(5) for m in (1, 4, 12)
    }
    assert len(digests) == 1


def test_steps_whose_rows_have_left_the_cache_are_told_not_compared(shards, monkeypatch, caplog):
    expected = Expected(describe_folder(shards), seed=3, batch=12, micro_batch=4)
    right, read = expected.digest(5), expected.digest

    def digest(step: int) -> int:
        if step == 4:
            raise NotCached("gone")
        return read(step)

    monkeypatch.setattr(expected, "digest", digest)
    with caplog.at_level("INFO"):
        expected.check([(4, 0), (5, right)])
        assert "rows of 1 of 2 steps were not compared: their shards have left the cache" in caplog.text
        caplog.clear()
        expected.check([(5, right)])
        assert not caplog.text
        with pytest.raises(UserError, match="step 5 was computed from are not those"):
            expected.check([(4, 0), (5, right + 1)])


def test_the_ledger_goes_on_from_the_checkpoint(shards, teacher, tmp_path):
    spec = make_spec(shards, teacher, tmp_path / "parts", steps=9)
    whole = replace(spec, folder=str(tmp_path / "whole"))
    assert run_stage(whole)

    class Halt(Exception):
        pass

    def halt(step: int) -> None:
        if step == 5:
            raise Halt

    with pytest.raises(Halt):
        run_stage(spec, on_step=halt)
    assert run_stage(spec)
    one, other = (Path(StageFolder(Path(j.folder)).done).read_text() for j in (whole, spec))
    assert one == other
