"""champion moves only when recorded scores hold; what fails is said, forced moves leave their reason."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from minilm.orchestrator.cli import main
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.comparison import Score
from minilm.orchestrator.evaluation.gate import Gate, check_gate
from minilm.orchestrator.evaluation.protocols import Setting
from minilm.orchestrator.evaluation.sources import Source, source_digest
from minilm.orchestrator.system.files import write_json
from minilm.orchestrator.tracking import registry
from minilm.orchestrator.tracking.client import connect
from minilm.orchestrator.tracking.promotion import record_gate
from minilm.orchestrator.verbs.gate import check_options
from tests.conftest import make_teacher

SETTING = Setting(5e-5, 3, 128, 32)


def make_score(mean: float, task: str = "cola", protocol: str = "glue-fixed", data: str = "data") -> Score:
    return Score("m", task, protocol, "matthews", (mean, mean), {}, SETTING, None, data, 1.0)


@pytest.mark.parametrize(
    ("gate", "candidate", "line"),
    [
        (Gate(("cola",), 0.97), 0.58, "0.5800 is 96.7% of the teacher's 0.6000, below 97.0%"),
        (Gate(("cola",), 0.96), 0.58, None),
        (
            Gate(("cola",), None, 0.005),
            0.56,
            "0.5600 after 0.5700, a change of -0.0100, more than the drop of 0.005",
        ),
        (Gate(("cola",), None, 0.02), 0.56, None),
        (Gate(("cola", "sst2")), 0.60, "sst2: the candidate has no recorded result"),
    ],
)
def test_each_demand_is_a_line(gate, candidate, line):
    found = check_gate(gate, [make_score(candidate)], [make_score(0.60)], [make_score(0.57)])
    failed = [one.text for one in found if not one.holds]
    assert (line is None and not failed) or line in failed[0]


@pytest.mark.parametrize("other", [{"protocol": "glue-minilm"}, {"data": "changed"}])
def test_only_like_is_compared_with_like(other):
    (line,) = check_gate(Gate(("cola",)), [make_score(0.9)], None, [make_score(0.1, **other)])
    assert not line.holds and "has no recorded result on these data" in line.text


def record(folder, results, task: str, scores: list[float]) -> None:
    """Result files as trials write them."""
    digest = source_digest(Source("", "folder", str(folder)))
    for seed, score in enumerate(scores):
        result = {
            "model": "by another name",
            "task": task,
            "protocol": "glue-fixed",
            "setting": SETTING.as_dict(),
            "seed": seed,
            "train_rows": None,
            "model_digest": digest,
            "data_digest": "data",
            "metrics": {"matthews": score, "accuracy": score},
            "seconds": 1.0,
        }
        write_json(results / "trials" / f"{digest[:8]}-{task}-{seed}.json", result)


def test_champion_moves_by_numbers_and_challenger_always(tmp_path, capsys):
    work, results = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    folders = [make_teacher(tmp_path / f"m{i}", layers=i) for i in (1, 2, 3)]
    for folder in folders:
        assert main(["register", str(folder), "m", "--workdir", str(work)]) == 0
    store = f"sqlite:///{work / 'mlflow.db'}"
    capsys.readouterr()

    def promote(version: int, *arguments: str) -> tuple[int, str, dict[str, int]]:
        given = [
            "promote",
            f"models:/m/{version}",
            "champion",
            "--workdir",
            str(work),
            "--results",
            str(results),
        ]
        code = main([*given, *arguments])
        aliases = {name: int(v) for name, v in connect(store).get_registered_model("m").aliases.items()}
        out, err = capsys.readouterr()
        return code, out + err, aliases

    code, text, aliases = promote(1)
    assert code == 2 and "models:/m/1 has no recorded result in" in text and "champion" not in aliases
    record(folders[0], results, "cola", [0.50, 0.52])
    code, text, aliases = promote(1)
    assert code == 0 and "no version is champion yet" in text and aliases["champion"] == 1

    record(folders[1], results, "cola", [0.40, 0.42])
    code, text, aliases = promote(2)
    assert code == 2 and aliases["champion"] == 1 and aliases["challenger"] == 2
    assert "fails  cola (matthews, glue-fixed): 0.4100 after 0.5100, a change of -0.1000" in text
    assert (
        "minilm: error: champion stays where it is (1 of 1 lines fail), challenger is version 2 now: cola"
        in text
    )

    code, text, aliases = promote(2, "--force", "faster by half")
    version = connect(store).get_model_version("m", "2")
    assert code == 0 and aliases["champion"] == 2 and version.tags["minilm.forced"] == "faster by half"
    assert [line["holds"] for line in json.loads(version.tags["minilm.gate"])] == [False]

    record(folders[2], results, "cola", [0.60, 0.60])
    share = [
        "--max-drop",
        "0",
        "--min-share-of-teacher",
        "0.97",
        "--teacher",
        str(folders[0]),
        "--tasks",
        "cola",
    ]
    code, text, aliases = promote(3, *share)
    assert code == 0 and aliases["champion"] == aliases["challenger"] == 3
    assert "0.6000 is 117.7% of the teacher's 0.5100, at least 97.0%" in text
    run = connect(store).get_run(connect(store).get_model_version("m", "3").run_id)
    (logged,) = connect(store).search_logged_models(
        [run.info.experiment_id], f"tags.`minilm.run_id` = '{run.info.run_id}'"
    )
    assert {m.key: m.value for m in logged.metrics} == {"glue-fixed/cola/matthews": 0.6}
    version = connect(store).get_model_version("m", "3")
    assert "minilm.forced" not in version.tags
    many = [line for line in json.loads(version.tags["minilm.gate"]) for _ in range(30)]
    record_gate(store, registry.resolve(store, "models:/m/3"), lines=many, reason=None)
    kept = json.loads(
        connect(store).get_model_version("m", "3").tags["minilm.gate"]
    )  # whole, though it is long
    assert len(kept) == 60 and all(line["holds"] and "text" not in line for line in kept)

    code, text, aliases = promote(1, *share[:-1], "sst2")
    assert code == 2 and "sst2: the candidate has no recorded result" in text and aliases["champion"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models:/m/1", "champion", "--tasks", "colla"], "no task is called 'colla'; did you mean 'cola'?"),
        (["models:/m/7", "champion"], "model 'm' has no version 7; its versions: 1"),
        (["models:/n@best", "champion"], "no model 'n' is registered; "),
        (["models:/m@bets", "champion"], "model 'm' has no alias 'bets'; "),
        (["models:/m/1", "champion", "--min-share-of-teacher", "0.9"], "needs --teacher MODEL"),
        (["models:/m/1", "champion", "--force", " "], "--force needs a reason"),
        (
            ["models:/m/1", "champion", "--against", "stable"],
            "model 'm' has no alias 'stable'; aliases: best",
        ),
        (["models:/m/1", "champion", "--against", "best"], "models:/m@best is the candidate itself"),
        (
            ["models:/m/1", "champion", "--data", "."],
            "--data needs --evaluate, which runs what is not recorded yet",
        ),
        (["models:/m/1", "good", "--evaluate"], "--evaluate needs --data DIR, which holds a folder"),
    ],
)
def test_the_gate_refuses_in_one_line(tmp_path, teacher, capsys, arguments, message):
    main(["register", str(teacher), "m", "--alias", "best", "--workdir", str(tmp_path)])
    capsys.readouterr()
    assert main(["promote", *arguments, "--workdir", str(tmp_path), "--results", str(tmp_path / "r")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert set(registry.connect(f"sqlite:///{tmp_path / 'mlflow.db'}").get_registered_model("m").aliases) == {
        "best"
    }


def test_an_alias_that_moves_in_any_case_is_not_guarded():
    with pytest.raises(UserError, match="given 'challenger', which moves to every candidate, whether or not"):
        check_options(Namespace(alias="challenger"))
