"""Trials: the independent units of an evaluation, each (model, task, setting, seed), each with a result file.

A trial's file is named by the digest of all that determines its numbers, so an evaluation that was killed goes on from
what is there, trials may run anywhere and in any order, and a changed model or data set is a new trial. Each computes
with one thread of the CPU, whatever else the machine does: other numbers of threads give other bits, and trials fill a
machine side by side.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from minilm.model.encoder.sentence_layout import read_search_texts
from minilm.orchestrator.errors import InfrastructureError
from minilm.orchestrator.evaluation.check_data import check_data, data_fingerprint
from minilm.orchestrator.evaluation.embed import cosine_similarity, search
from minilm.orchestrator.evaluation.fine_tune import Curve, check_head, fine_tune
from minilm.orchestrator.evaluation.protocols import Protocol, Setting
from minilm.orchestrator.evaluation.sources import (
    Source,
    build,
    head_of,
    model_type,
    search_tokens,
    source_digest,
    tokenizer_of,
)
from minilm.orchestrator.evaluation.squad import fine_tune_spans
from minilm.orchestrator.evaluation.tasks import TASKS, Task
from minilm.orchestrator.system.files import read_json, sha256_json, write_json
from minilm.orchestrator.system.versions import code_version
from minilm.orchestrator.train.numerics import AUTOCAST, choose_precision

TORCH_BYTES = 3 << 29  # of a process, its data and the larger batches
FORMAT = 3  # of a trial's file; another number makes every trial new


@dataclass(frozen=True)
class Trial:
    """One unit, as plain values: it can be sent to another process.

    model_digest, data_digest: of `source_digest` and `data_fingerprint`. train_rows: None for all. prompts: before
    queries and texts of a search.
    """

    source: Source
    model_digest: str
    task: str
    data: str
    data_digest: str
    protocol: str
    setting: Setting
    seed: int
    train_rows: int | None
    device: str
    precision: str
    prompts: tuple[str, str] = ("", "")

    @cached_property
    def key(self) -> str:
        values = asdict(self)
        for name in ("source", "data", "protocol"):  # where things lie, and what they are called
            values.pop(name)
        if not any(self.prompts):  # so it was before there were any
            values.pop("prompts")
        code = {k: v for k, v in code_version().items() if k in ("torch", "transformers")}
        return sha256_json([FORMAT, values, code])[:32]

    def file(self, folder: Path) -> Path:
        return folder / "trials" / f"{self.key}.json"


def plan_trials(
    sources: Iterable[Source],
    tasks: Iterable[tuple[Task, Protocol]],
    data: Path,
    *,
    seeds: int | None,
    train_rows: int | None,
    device: torch.device,
    results: Path | None = None,
) -> list[Trial]:
    """Every trial of these models and tasks, in the order of a table. Reads and checks all data: UserError where any
    of it is not as published, before anything runs.

    results: the folder of the trials that are done; what is there was trained in one precision, and goes on in it.
    """
    sources = list(sources)
    precision = begun_in(results, device) or choose_precision("auto", None, device)
    digests = {source.name: source_digest(source) for source in sources}
    trials = []
    for task, protocol in tasks:
        rows = check_data(task, data)
        for source in sources:
            check_head(model_type(source), task.kind)
            if not task.is_trained:
                head_of(source)
        fingerprint = data_fingerprint(task, data)
        count = seeds or protocol.seeds_of(rows if train_rows is None else min(rows, train_rows))
        for source in sources:
            if not task.is_trained and not source.draws:
                own = 1  # nothing in it is random
            else:
                own = count if task.is_trained else seeds or max(count, 5)
            settings, prompts = protocol.settings_of(task), ("", "")
            if task.kind == "retrieval":
                texts = read_search_texts(source.folder)
                prompts = (texts.query, texts.text)
                settings = tuple(replace(s, tokens=search_tokens(source, s.tokens)) for s in settings)
            for setting in settings:
                trials += [
                    Trial(
                        source=source,
                        model_digest=digests[source.name],
                        task=task.name,
                        data=str(data),
                        data_digest=fingerprint,
                        protocol=protocol.name,
                        setting=setting,
                        seed=seed,
                        train_rows=train_rows if task.is_trained else None,
                        device=device.type,
                        precision=precision if task.is_trained else "float32",
                        prompts=prompts,
                    )
                    for seed in range(own)
                ]
    return trials


def begun_in(folder: Path | None, device: torch.device) -> str | None:
    """The precision of the trainings that `folder` has from such a device; None where it has none."""
    for path in sorted(folder.glob("trials/*.json")) if folder else ():
        found = read_json(path)
        if found and found["device"] == device.type and TASKS[found["task"]].is_trained:
            return str(found["precision"])
    return None


def run_trial(trial: Trial, folder: Path) -> dict[str, Any]:
    """The trial's result: from its file where there is one, else computed and written, whole or not at all.

    metrics: higher is better; curve: (step, loss) pairs of the training; seconds: what it took when it ran.
    """
    if (before := read_json(trial.file(folder))) is not None:
        return before | {"model": trial.source.name}
    with one_thread():
        result = compute(trial)
    write_json(trial.file(folder), result)
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(trial: Trial) -> dict[str, Any]:
    began = time.monotonic()
    task, device = TASKS[trial.task], torch.device(trial.device)
    encoder, tokenizer = build(trial.source, trial.seed), tokenizer_of(trial.source)
    setting, data = trial.setting, Path(trial.data)
    autocast = AUTOCAST[trial.precision]
    curve: Curve = []
    how: dict[str, Any] = {"seed": trial.seed, "train_rows": trial.train_rows}
    how |= {"device": device, "autocast": autocast}
    sizes: dict[str, Any] = {"tokens": setting.tokens, "batch": setting.batch, "device": device}
    if task.kind == "cosine":
        metrics = cosine_similarity(encoder, head_of(trial.source), tokenizer, task, data, **sizes)
    elif task.kind == "retrieval":
        metrics = search(encoder, head_of(trial.source), tokenizer, data, trial.prompts, **sizes)
    elif task.kind == "spans":
        metrics, curve = fine_tune_spans(encoder, tokenizer, data, setting, **how)
    else:
        metrics, curve = fine_tune(encoder, tokenizer, task, data, setting, **how)
    return {
        "model": trial.source.name,
        "task": trial.task,
        "protocol": trial.protocol,
        "setting": setting.as_dict(),
        "seed": trial.seed,
        "train_rows": trial.train_rows,
        "model_digest": trial.model_digest,
        "data_digest": trial.data_digest,
        "device": trial.device,
        "precision": trial.precision,
        "versions": code_version(),
        "metrics": metrics,
        "curve": curve,
        "seconds": time.monotonic() - began,
    }


def side_by_side(
    trials: Sequence[Trial], folder: Path, processes: int
) -> Generator[dict[str, Any], None, None]:
    """Each trial's result, in order, from so many processes at once; 1 is this one.

    Whatever ends it ends them; what is done stays. InfrastructureError where one of them was killed.
    """
    if processes == 1:
        yield from (run_trial(trial, folder) for trial in trials)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    others = {child.pid for child in multiprocessing.active_children()}
    pool = ProcessPoolExecutor(processes, context, _live_with_parent)
    try:
        waiting = [pool.submit(run_trial, trial, folder) for trial in trials]
        for future in waiting:
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise InfrastructureError(
            f"one of {processes} processes with trials was killed, perhaps for want of memory; the same command goes "
            f"on from what is done, with --parallel 1 one trial at a time"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child.pid not in others:
                child.terminate()


def _live_with_parent() -> None:
    """The parent answers Ctrl-C, and a process ends with it even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def processes_for(trials: Iterable[Trial], folder: Path) -> int:
    """How many trials that are not done the cores and the free memory allow at once; one where a GPU computes.

    A training holds a model's weights some five times (gradients, AdamW's two, activations), beside torch itself.
    """
    todo = [trial for trial in trials if not trial.file(folder).exists()]
    if not todo or todo[0].device != "cpu":
        return 1
    sizes = [
        path.stat().st_size
        for one in {t.source for t in todo}
        for path in Path(one.folder).glob("*.safetensors")
    ]
    room = psutil.virtual_memory().available // (5 * max(sizes, default=0) + TORCH_BYTES)
    return max(1, min(len(os.sched_getaffinity(0)), len(todo), room))


def recorded(folder: Path, model_digest: str) -> list[dict[str, Any]]:
    """Every result in `folder` of the model with this `source_digest`, by whatever name it was evaluated."""
    files = sorted((folder / "trials").glob("*.json"))
    results = [result for path in files if (result := read_json(path)) is not None]
    return [result | {"model": model_digest} for result in results if result["model_digest"] == model_digest]
