"""The files by which MLflow's own commands load a registered model: they lie beside the plain transformers folder.

`mlflow.transformers.load_model`, `mlflow.pyfunc.load_model` and `mlflow models serve` read `MLmodel`. It names MLflow's
own loader, and of transformers `AutoModel` and `AutoTokenizer`, which take safetensors and JSON: nothing in it, or in
what it names, is code. `pull` leaves these files out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from minilm.model.files import has_vocabulary, tokenizer_files
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.versions import versions

TOKENIZER = "components/tokenizer"  # where MLflow looks for it, and nowhere else
FILES = ("MLmodel", "requirements.txt", "python_env.yaml", "input_example.json", "serving_input_example.json")
EXAMPLE = "A sentence whose tokens become vectors."


def is_mlflows(file: str) -> bool:
    """Whether the relative path `file` of a registered model is one of those that `write_mlflow_files` writes."""
    return file in FILES or file.startswith(f"{TOKENIZER}/")


def refuse_own_code(folder: Path) -> None:
    """UserError where a file names code of the model's own: whoever loads the model would be asked to run it."""
    for file in sorted(folder.rglob("*.json")):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue  # transformers will say so
        if isinstance(values, dict) and "auto_map" in values:
            raise UserError(
                f"{file} names code of the model's own (auto_map), which loading it would run; remove that key, if "
                f"transformers knows the architecture without it"
            )


def write_mlflow_files(folder: Path, out: Path, *, model_id: str, run_id: str) -> None:
    """Write into `out` what MLflow needs beside the model in `folder`; nothing for one without a tokenizer, of which
    no text can be asked."""
    if not has_vocabulary(folder):
        return
    import mlflow.pyfunc  # pandas and more, seconds to import
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    hidden = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("hidden_size", -1)
    model = Model(
        model_id=model_id,
        run_id=run_id,
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string)]),
            outputs=Schema([TensorSpec(np.dtype("float64"), (-1, hidden))]),
        ),
    )
    model.saved_input_example_info = {
        "artifact_path": "input_example.json",
        "type": "json_object",
        "serving_input_path": "serving_input_example.json",
    }
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.transformers",
        python_env="python_env.yaml",
        model_config={"truncation": True},
    )
    model.add_flavor("transformers", **_flavour())
    for file in tokenizer_files(folder):
        copy = out / TOKENIZER / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    needed = versions(("mlflow", "torch", "transformers"))
    lines = "".join(f"{name}=={version.partition('+')[0]}\n" for name, version in needed.items())
    (out / "requirements.txt").write_text(lines, encoding="utf-8")
    environment = {"python": _python(model), "dependencies": ["-r requirements.txt"]}
    (out / "python_env.yaml").write_text(json.dumps(environment), encoding="utf-8")
    (out / "input_example.json").write_text(json.dumps(EXAMPLE), encoding="utf-8")
    (out / "serving_input_example.json").write_text(json.dumps({"inputs": EXAMPLE}), encoding="utf-8")
    model.save(str(out / "MLmodel"))


def _flavour() -> dict[str, Any]:
    """As `mlflow.transformers.save_model` writes it, but that weights and config lie in the folder itself, and that
    classes are transformers' automatic ones, which take no code from a model."""
    return {
        "transformers_version": versions(("transformers",))["transformers"],
        "code": None,
        "task": "feature-extraction",
        "instance_type": "FeatureExtractionPipeline",
        "framework": "pt",
        "pipeline_model_type": "AutoModel",
        "model_binary": ".",
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
    }


def _python(model: Any) -> str:
    return str(model.flavors["python_function"]["python_version"])
