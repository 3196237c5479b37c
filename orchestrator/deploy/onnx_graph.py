"""An encoder as an ONNX graph, in float32 or with weights and activations of 8 bits, and as something to call.

Inputs: input_ids, attention_mask and, where the tokenizer gives them, token_type_ids; int64 [batch, length], both free.
Output: last_hidden_state, float32 [batch, length, hidden]. Needs the extra `onnx`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.model.encoder.build import count_parameters
from minilm.orchestrator.deploy.served import ServedEncoder
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.text import one_line

OUTPUT = "last_hidden_state"
ONE_FILE = (
    450_000_000  # parameters: beyond it the weights lie in a file beside the graph, whose limit is 2 GB
)


class _HiddenStates(nn.Module):
    """The encoder with positional inputs and one output, as an export wants it."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state


def write_onnx(name: str, model: PreTrainedModel, names: Sequence[str], file: Path) -> None:
    """Write `model` (in eval mode, on the CPU) to `file`. name: of the model, for the UserError if it can't be."""
    ids = torch.ones((2, 8), dtype=torch.int64)
    mask = (
        torch.arange(8) < torch.tensor([[8], [5]])
    ).long()  # of ones alone, it would be left out of the graph
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    sizes = {0: "batch", 1: "length"}
    try:
        with _quiet(), torch.inference_mode():
            torch.onnx.export(
                _HiddenStates(model, names).eval(),
                tuple(values[key] for key in names),
                str(file),
                dynamo=True,
                input_names=list(names),
                output_names=[OUTPUT],
                dynamic_shapes=(tuple(sizes for _ in names),),
                external_data=count_parameters(model) > ONE_FILE,
                verbose=False,
            )
    except Exception as error:  # whatever the tracing of somebody's modelling code raises
        raise UserError(
            f"torch {torch.__version__} cannot write {name} ({model.config.model_type}) as ONNX: {one_line(error)}; "
            "give a model of another family, or try another version of torch"
        ) from error


def quantise(source: Path, out: Path, *, one_file: bool = True) -> None:
    """Write `source` with 8-bit weights, a scale per channel, and activations that are quantised as they come.

    `reduce_range` leaves 7 bits to the weights: sums of products of 8 bits overflow on processors without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source,
            out,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=not one_file,
        )


def open_onnx(file: Path, config: Any, threads: int = 0) -> ServedEncoder:
    """The graph in `file` as an encoder. threads: 0 for all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return ServedEncoder(config, names, lambda arrays: session.run([OUTPUT], arrays)[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own inside, which are no use to whoever reads our output."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "")
    ]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
