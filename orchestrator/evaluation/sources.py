"""A model as it is evaluated: a transformers folder, or one of the two controls made from a folder.

    FOLDER                  its weights
    random:FOLDER[:SHAPE]   the same architecture with random weights, another draw for each seed
    layers:FOLDER:SHAPE     cut from the folder's layers without distillation; SHAPE is LAYERSxHIDDEN, as in 3x192

Any encoder that plain transformers loads from safetensors is taken; the controls need a family that students can have.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from minilm.data.tokenizer import has_tokenizer, load_tokenizer
from minilm.model.encoder.build import build_student, quiet_transformers
from minilm.model.encoder.initialize import initialize
from minilm.model.encoder.sentence_head import SentenceHead, load_head
from minilm.model.encoder.sentence_layout import (
    MODULES,
    SentenceLayout,
    read_layout,
    read_search_texts,
)
from minilm.model.encoder.shape import load_config, shape_of
from minilm.model.encoder.weights import check_folder, check_loaded
from minilm.model.export import weights_digest
from minilm.model.files import tokenizer_files
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.system.text import one_line

_SHAPE = re.compile(r"l?(\d+)[x-]h?(\d+)", re.IGNORECASE)
CONTROLS = ("random", "layers")


@dataclass(frozen=True)
class Source:
    """name: as the user wrote it. kind: "folder", "random" or "layers". shape: (layers, hidden) of a control, None for
    the folder's own."""

    name: str
    kind: str
    folder: str
    shape: tuple[int, int] | None = None

    @property
    def is_control(self) -> bool:
        return self.kind in CONTROLS

    @property
    def draws(self) -> bool:
        """Whether each seed gives other weights before any training."""
        return self.kind == "random"


def split_control(text: str) -> tuple[str, str, tuple[int, int] | None]:
    """(kind, reference of the folder, shape) of a MODEL as it is written. UserError for a control that is not whole."""
    kind, _, rest = text.partition(":")
    if kind not in CONTROLS:
        return "folder", text, None
    reference, _, last = rest.rpartition(":")
    match = _SHAPE.fullmatch(last) if reference else None
    shape = (int(match[1]), int(match[2])) if match else None
    reference = reference if shape else rest
    if not reference or (kind == "layers" and shape is None):
        raise UserError(
            f"given {text!r}; allowed: random:FOLDER, random:FOLDER:SHAPE and layers:FOLDER:SHAPE, with SHAPE as in "
            f"3x192 (layers x hidden size)"
        )
    return kind, reference, shape


def check_source(source: Source) -> None:
    """UserError or ModelError where the model cannot be evaluated, before anything runs."""
    folder = Path(source.folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{source.name} is no model (no config.json in {folder}); give a transformers folder")
    model_type(source)
    if not has_tokenizer(folder):
        raise UserError(
            f"{source.name} has no tokenizer (no tokenizer.json or vocabulary file in {folder}); save its tokenizer "
            f"there with save_pretrained"
        )
    build(source, 0)


def tokenizer_of(source: Source) -> Any:
    return load_tokenizer(source.folder)


def model_type(source: Source) -> str:
    """The architecture, as transformers calls it. UserError where config.json is not one that it can read."""
    try:
        return str(AutoConfig.from_pretrained(source.folder, trust_remote_code=False).model_type)
    except Exception as error:  # whatever is in the file reaches code that expects numbers
        raise UserError(
            f"{source.name}: cannot read {source.folder}/config.json ({one_line(error)}); give a folder that "
            f"save_pretrained wrote"
        ) from error


def build(source: Source, seed: int) -> PreTrainedModel:
    """The encoder in float32, without a head, in eval mode. seed: of a control's random weights."""
    if source.kind != "random":
        own = load(Path(source.folder))
        if source.kind == "folder":
            return own
        config = load_config(source.folder)
        student = build_student(config, **_sizes(config, source.shape), seed=seed)
        initialize(student, own, "teacher-layers")
        return student.eval()
    config = load_config(source.folder)
    return build_student(config, **_sizes(config, source.shape), seed=seed).eval()


def load(folder: Path) -> PreTrainedModel:
    """The encoder in `folder` in float32 and eval mode. UserError or ModelError unless its weights are its config's."""
    check_folder(folder)
    try:
        with quiet_transformers():
            model, report = AutoModel.from_pretrained(
                str(folder),
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # `check_loaded` names them
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (
        Exception
    ) as error:  # transformers raises whatever its modules do for values that they did not expect
        raise UserError(
            f"cannot load the weights of {folder}: {one_line(error)}; give a folder that save_pretrained wrote"
        ) from error
    check_loaded(str(folder), model, report, head=False)
    return model.eval()


def head_of(source: Source) -> SentenceHead:
    """What makes a vector of hidden states: the folder's own modules, else the mean over tokens. A control pools as its
    folder does, without dense layers. ModelError where modules cannot be applied, or their weights are not there."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    found = read_layout(source.folder, config.hidden_size) or SentenceLayout()
    return (
        SentenceHead(SentenceLayout(found.pooling)) if source.is_control else load_head(source.folder, found)
    )


def search_tokens(source: Source, tokens: int) -> int:
    """Of a query or text, at most: the folder's own limit where that is below `tokens`."""
    own = (
        read_search_texts(source.folder).max_tokens or tokenizer_of(source).model_max_length
    )  # 1e30 for none
    return int(min(tokens, own))


def _sizes(config: Any, shape: tuple[int, int] | None) -> dict[str, Any]:
    own = shape_of(config)
    layers, hidden = shape or (own.layers, own.hidden)
    same = hidden == own.hidden
    return {"layers": layers, "hidden": hidden, "heads": own.heads, "ffn": own.ffn if same else None}


def source_digest(source: Source) -> str:
    """sha256 (hex) of all that makes the model: weights but for a random control, config, tokenizer, pooling, shape."""
    folder = Path(source.folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps([source.kind, source.shape, config], sort_keys=True).encode())
    pooling = sorted((*folder.glob(MODULES), *folder.glob("[0-9]*_*/config.json")))
    for path in (*pooling, *tokenizer_files(folder)):
        digest.update(path.read_bytes())
    if source.kind != "random":
        digest.update(weights_digest(folder).encode())
    return digest.hexdigest()
