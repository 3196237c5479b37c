"""The plan of ten recipes against what is measured, with stand-ins for their teachers: half the width for the students.

python -m tests.plan_figures FOLDER   tokens a second of every stage, measured, and by the rate of the first one
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from minilm.data.builder.build import build
from minilm.model.encoder.sentence_head import SentenceHead, save_head
from minilm.model.encoder.sentence_layout import SentenceLayout
from minilm.orchestrator.bench.stage_rate import stage_tokens_per_second
from minilm.orchestrator.driver.curriculum import Driver
from minilm.orchestrator.driver.workdir import Workdir
from minilm.orchestrator.launch.attempt import begin_attempt
from minilm.orchestrator.plan.cost import Machine, Work, flops_per_second, memory, plan
from minilm.orchestrator.plan.estimate import works
from minilm.orchestrator.recipe.load import load_recipe
from minilm.orchestrator.recipe.schema import Recipe
from minilm.orchestrator.resolve.stages import ResolvedStage
from minilm.orchestrator.stage.data import DataSpec
from minilm.orchestrator.stage.folder import StageFolder
from tests.conftest import make_teacher, write_text
from tests.support import describe_folder
from tests.test_recipe_library import LIBRARY, SHAPES, teachers

TEN = {  # recipe: what is special about it
    "bert-l6-h384-ta": "an assistant",
    "bert-l6-h384-attention-only": "values run and are read by nothing",
    "bert-l6-h384-value-mse": "a projection",
    "bert-l6-h384-layer-to-layer": "a loss on every layer",
    "bert-l6-h384-hidden-relation": "the last layer runs to its end",
    "bert-l6-h384-soft-label-mlm": "heads, at some tokens",
    "v2-bert-large-l6-h384": "a layer in the middle, relation heads",
    "v2-roberta-large-l12-h384": "RoBERTa",
    "xlmr-l12-h384": "XLM-R",
    "embed-mpnet-l6-h384": "a learned position bias; vectors",
}


def stand_in(
    name: str, folder: Path, *, seq_len: int, hidden: int, vocabulary: int, weights: bool = False, changes=()
) -> Recipe:
    """The packaged recipe with teachers of its own kind, layers and heads but these sizes, with random weights or none.
    Students have half the width, or the whole where relation heads ask for it."""
    recipe = load_recipe(LIBRARY / f"{name}.yaml")

    def make(reference: str) -> str:
        kind, layers, _, heads, *_ = SHAPES[reference]
        out = folder / f"{kind}-{layers}"
        config = AutoConfig.for_model(
            kind, num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden, intermediate_size=4 * hidden,
            vocab_size=vocabulary, max_position_embeddings=seq_len + 2,
            architectures=["BertForMaskedLM"] if kind == "bert" else None,
        )  # fmt: skip
        if not weights:
            config.save_pretrained(out)
        elif not (out / "config.json").exists():
            (AutoModelForMaskedLM if kind == "bert" else AutoModel).from_config(config).save_pretrained(out)
        save_head(SentenceHead(SentenceLayout()), out, hidden, seq_len)
        return str(out)

    given = [*teachers(f"{name}.yaml", make), f"data.seq_len={seq_len}"]
    for stage in recipe.stages:
        width = hidden if stage.relation_heads else hidden // 2
        values = {"student.hidden": width, "student.ffn": 4 * width, **dict(changes)}
        given += [f"stages.{stage.name}.{key}={value}" for key, value in values.items()]
    return load_recipe(
        LIBRARY / f"{name}.yaml", [*given, "compute={micro_batch: 8, threads: 1, device: cpu}"]
    )


def data_of(folder: Path, *, seq_len: int, vocabulary: int) -> DataSpec:
    """Rows of words, with a tokenizer that knows as many words as a stand-in."""
    tokenizer = make_teacher(folder / "tokenizer", extra_words=tuple(f"w{i}" for i in range(vocabulary - 90)))
    text = write_text(folder / "text.txt", 2000)
    build([text], str(tokenizer), folder / "shards", seq_len=seq_len, held_out=0.1, seed=0, processes=1)
    return describe_folder(folder / "shards")


WORKER = """
import re
from pathlib import Path
from minilm.orchestrator.worker.__main__ import main
assert main() == 0
status = Path("/proc/self/status").read_text()  # getrusage remembers the peak of the process that forked this one
print(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""


def peak_of_worker(recipe: Recipe, resolved: ResolvedStage, data: DataSpec, folder: Path) -> int:
    """Bytes that the process of a worker held at most which trained the stage from its start to its end."""
    nobody = Driver(recipe, Workdir(folder), None, data, (), [], None, None, None, None)  # type: ignore[arg-type]
    spec = nobody.make_spec(resolved)
    of_stage = StageFolder(Path(spec.folder))
    begin_attempt(replace(spec, attempt="alone"), of_stage)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(of_stage.spec)], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.splitlines()[-1]) << 10


def planned_peak(work: Work) -> int:
    return memory(work).total + memory(work).save_copy


def rates(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Of every stage its name, tokens a second of one worker, and those that the rate of the first one predicts."""
    machine = Machine()
    for name in TEN:
        recipe = stand_in(
            name, folder, seq_len=128, hidden=768, vocabulary=20000, changes={"batch": 32}.items()
        )
        for work in works(recipe, None):
            rate = stage_tokens_per_second(recipe, work, torch.device("cpu"), "float32")
            if not machine.flops_per_second:
                machine = Machine(flops_per_second(work, rate))
            seconds = plan(work, machine, [1]).seconds(1) or 0.0
            yield f"{name} {work.stage}", rate, work.steps * work.batch * work.seq_len / seconds


if __name__ == "__main__":
    for stage, rate, predicted in rates(Path(sys.argv[1])):
        print(f"{stage:42}{rate:>8,.0f}{predicted:>8,.0f}{predicted / rate:>7.2f}", flush=True)
