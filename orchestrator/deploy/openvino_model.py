"""An encoder's ONNX graph as a model of OpenVINO (XML and weights, float32). Needs the extra `openvino`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilm.orchestrator.deploy.onnx_graph import OUTPUT
from minilm.orchestrator.deploy.served import ServedEncoder


def write_openvino(graph: Path, file: Path) -> None:
    """Write `graph` (ONNX) to `file` (.xml) and, beside it, its weights (.bin)."""
    import openvino

    openvino.save_model(openvino.Core().read_model(graph), file, compress_to_fp16=False)


def open_openvino(file: Path, config: Any, threads: int = 0) -> ServedEncoder:
    """The model in `file` (.xml) as an encoder. threads: 0 for all cores."""
    import openvino

    precision = {"INFERENCE_PRECISION_HINT": "f32"}  # or it computes in bfloat16 where the processor can
    limit = {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    model = openvino.Core().compile_model(file, "CPU", precision | limit)
    names = [node.get_any_name() for node in model.inputs]
    return ServedEncoder(config, names, lambda arrays: model(arrays)[OUTPUT].copy())
