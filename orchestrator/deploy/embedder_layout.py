"""The layout of sentence-transformers around a plain encoder: mean pooling of valid tokens, then length 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULES = "modules.json"


def write_layout(folder: Path, hidden: int, max_tokens: int) -> bool:
    """Let `SentenceTransformer(folder)` load the encoder in `folder`; False where the folder has modules of its own,
    which stay as they are. hidden: the width of its states."""
    if (folder / MODULES).exists():
        return False
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir()
    _write(folder / "1_Pooling" / "config.json", _pooling(hidden))
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    _write(folder / MODULES, modules)
    return True


def _pooling(hidden: int) -> dict[str, Any]:
    modes = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    return {"word_embedding_dimension": hidden, "include_prompt": True} | {
        f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes
    }


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
