"""A model's folder → a folder in the format that a service loads: whole, checked and measured, or absent.

Beside the model lie its tokenizer and config, `export.json` with all that was checked and measured, and the model's
card with the same in words. A model in 8 bits is written only where its score on a task is measured and has dropped by
no more than is allowed. Leaves out heads of tasks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from minilm.model.encoder.sentence_head import SentenceHead, save_head
from minilm.model.encoder.sentence_layout import MODULES, SentenceLayout
from minilm.model.export import weights_digest, whole_folder
from minilm.orchestrator.deploy.beside import copy_beside
from minilm.orchestrator.deploy.latency import Latency, Open, latency_rows, measure_latency
from minilm.orchestrator.deploy.onnx_graph import ONE_FILE, open_onnx, quantise, write_onnx
from minilm.orchestrator.deploy.openvino_model import open_openvino, write_openvino
from minilm.orchestrator.deploy.packages import PACKAGES, require_packages
from minilm.orchestrator.deploy.served import check_same, largest_difference
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.evaluation.batches import most_tokens
from minilm.orchestrator.evaluation.check_data import check_data, data_fingerprint
from minilm.orchestrator.evaluation.embed import cosine_similarity
from minilm.orchestrator.evaluation.protocols import protocol_of
from minilm.orchestrator.evaluation.sources import Source, build, check_source, head_of, tokenizer_of
from minilm.orchestrator.evaluation.tasks import TASKS, Task
from minilm.orchestrator.system.files import check_place, write_json
from minilm.orchestrator.system.text import text_table
from minilm.orchestrator.system.versions import processor_name, versions

GRAPH, INT8, INTERMEDIATE = "model.onnx", "model_int8.onnx", "openvino_model.xml"
_WITHOUT_HEAD = ("Model", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Gate:
    """What 8 bits may cost: the score on `task` (one of kind "cosine"), read from `data`, may fall by `max_drop`."""

    task: Task
    data: Path
    max_drop: float


@dataclass(frozen=True)
class Drop:
    """Both scores on the gate's task and their difference; data: the fingerprint of its files."""

    task: str
    metric: str
    float32: float
    int8: float
    drop: float
    max_drop: float
    data: str

    def __str__(self) -> str:
        return (
            f"{self.task} ({self.metric}): {self.float32:.4f} in float32, {self.int8:.4f} in 8 bits, "
            f"a drop of {self.drop:.4f}, allowed {self.max_drop:g}"
        )


@dataclass(frozen=True)
class Report:
    """What an export has checked and measured. difference: see `largest_difference`; None where nothing was traced.
    files: megabytes (10^6 bytes) by name of the model's files."""

    model: str
    weights: str
    format: str
    difference: float | None
    int8: Drop | None
    latency: tuple[Latency, ...]
    files: dict[str, float]
    machine: str
    versions: dict[str, str]

    def text(self) -> str:
        lines = [", ".join(f"{name} {size:,.1f} MB" for name, size in self.files.items())]
        if self.difference is not None:
            lines.append(
                f"hidden states differ from PyTorch's by at most {self.difference:.1e} on ragged batches"
            )
        if self.int8:
            lines.append(str(self.int8))
        if self.latency:
            tokens = self.latency[0].tokens
            lines += ["", text_table(latency_rows(self.latency)), f"rows of {tokens} tokens; {self.machine}"]
        return "\n".join(lines)

    def card(self) -> str:
        """A section of the model's card."""
        body = "\n".join(f"    {line}".rstrip() for line in self.text().splitlines())
        return f"\n\n## Exported as {self.format}\n\n{body}\n"


def check_export(source: Source, out: Path, format: str, gate: Gate | None) -> None:
    """UserError or ModelError for whatever can be refused before anything runs."""
    require_packages(format)
    if out.exists():
        raise UserError(f"{out} exists; give a folder that does not exist yet, or remove it first")
    check_place(out)
    if gate:
        if format != "onnx":
            raise UserError(
                f"--int8 is made for --format onnx, not {format}; leave it out, or give --format onnx"
            )
        if gate.task.kind != "cosine":
            fit = ", ".join(task.name for task in TASKS.values() if task.kind == "cosine")
            raise UserError(
                f"--task {gate.task.name} has to be trained first; 8 bits are measured on one of: {fit}"
            )
        check_data(gate.task, gate.data)
    check_source(source)
    if gate:
        head_of(source)
    names = AutoConfig.from_pretrained(source.folder, trust_remote_code=False).architectures or ()
    headed = [name for name in names if not name.endswith(_WITHOUT_HEAD)]
    if headed:
        raise UserError(
            f"{source.name} is a {headed[0]}, and an export has the encoder without its head; give the folder of the "
            "encoder, or export this one with torch.onnx.export"
        )


def export(
    source: Source, out: Path, format: str, gate: Gate | None = None, say: Callable[[str], None] = print
) -> Report:
    """Write the model of `source` (a folder) to the new folder `out`; gate: write one in 8 bits beside it, if it holds.

    UserError as `check_export` raises it, where the format computes something else than PyTorch (`check_same`), and
    where 8 bits cost more than the gate allows. `out` is absent then.
    """
    check_export(source, out, format, gate)
    model = build(source, 0).cpu()
    folder = Path(source.folder)
    used = versions(("torch", "transformers", *(text.split(">")[0] for text in PACKAGES[format])))
    difference, drop, latency = None, None, []
    with whole_folder(out.absolute()) as part:
        copy_beside(folder, part, weights=format == "sentence-transformers")
        if format == "sentence-transformers":
            if not (part / MODULES).exists():  # modules of its own stay as they are
                longest = most_tokens(model, tokenizer_of(source).model_max_length)
                save_head(SentenceHead(SentenceLayout()), part, model.config.hidden_size, longest)
        else:
            names = _input_names(model, tokenizer_of(source))
            say(f"writing {GRAPH} …")
            write_onnx(source.name, model, names, part / GRAPH)
            served: dict[str, Open] = {"ONNX": partial(open_onnx, part / GRAPH, model.config)}
            if format == "openvino":
                write_openvino(part / GRAPH, part / INTERMEDIATE)
                for left in part.glob(f"{GRAPH}*"):
                    left.unlink()
                served = {"OpenVINO": partial(open_openvino, part / INTERMEDIATE, model.config)}
            ((_, opened),) = served.items()
            difference = largest_difference(model, opened(0), names)
            check_same(source.name, format, difference, used)
            if gate:
                say(f"writing {INT8}, and measuring {gate.task.name} …")
                quantise(part / GRAPH, part / INT8, one_file=model.num_parameters() <= ONE_FILE)
                served["ONNX, 8 bits"] = partial(open_onnx, part / INT8, model.config)
                drop = _measure_drop(source, model, served["ONNX, 8 bits"], gate)
                say(str(drop))
                if not drop.drop <= gate.max_drop:
                    raise UserError(
                        f"{source.name} in 8 bits loses {drop.drop:.4f} on {drop.task} ({drop.float32:.4f} to "
                        f"{drop.int8:.4f}), and --max-drop is {gate.max_drop:g}, so nothing was written; export it "
                        "without --int8, or allow more"
                    )
            say("measuring latency …")
            latency = measure_latency(model, served)
        report = Report(
            model=source.name,
            weights=weights_digest(folder),
            format=format,
            difference=difference,
            int8=drop,
            latency=tuple(latency),
            files=_sizes(part),
            machine=processor_name(),
            versions=used,
        )
        write_json(part / "export.json", asdict(report))
        with (part / "README.md").open("a", encoding="utf-8") as card:
            card.write(report.card())
    return report


def _measure_drop(source: Source, model: PreTrainedModel, int8: Open, gate: Gate) -> Drop:
    setting = protocol_of(gate.task, None).settings[0]
    metric = gate.task.metrics[0]
    float32, eight = (
        cosine_similarity(
            encoder,
            head_of(source),
            tokenizer_of(source),
            gate.task,
            gate.data,
            tokens=setting.tokens,
            batch=setting.batch,
            device=torch.device("cpu"),
        )[metric]
        for encoder in (model, int8(0))
    )
    data = data_fingerprint(gate.task, gate.data)
    return Drop(gate.task.name, metric, float32, eight, float32 - eight, gate.max_drop, data)


def _input_names(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """What the tokenizer gives and the model takes, in the order of the three."""
    taken = inspect.signature(model.forward).parameters
    given = {"input_ids", "attention_mask", *tokenizer.model_input_names}
    return [
        name for name in ("input_ids", "attention_mask", "token_type_ids") if name in given and name in taken
    ]


def _sizes(part: Path) -> dict[str, float]:
    kinds = (".onnx", ".data", ".xml", ".bin", ".safetensors")
    files = sorted(path for path in part.iterdir() if path.suffix in kinds)
    return {path.name: path.stat().st_size / 1e6 for path in files}
