"""The packages that a format needs beyond those of this project, and the command that installs them."""

from __future__ import annotations

import importlib.util

from minilm.orchestrator.errors import UserError

# As the extras in pyproject.toml have them: a test says.
PACKAGES = {
    "onnx": ("onnx>=1.19,<2", "onnxscript>=0.7,<0.8", "onnxruntime>=1.23,<2"),
    "openvino": ("onnx>=1.19,<2", "onnxscript>=0.7,<0.8", "openvino>=2026.1,<2027"),
    "sentence-transformers": (),
}
FORMATS = tuple(PACKAGES)


def require_packages(format: str) -> None:
    """UserError unless all that `format` needs can be imported; nothing is imported yet."""
    missing = [text for text in PACKAGES[format] if importlib.util.find_spec(text.split(">")[0]) is None]
    if missing:
        names = ", ".join(text.split(">")[0] for text in missing)
        wanted = " ".join(f"'{text}'" for text in missing)
        raise UserError(
            f"--format {format} needs {names}, not installed in this Python; install with: pip install {wanted}"
        )
