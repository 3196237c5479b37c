"""How hidden states become one vector of a text, as a sentence-transformers folder says it: modules.json and what it
names. Read without modelling code.

    Transformer → Pooling → Dense (none, one or several) → Normalize (perhaps)

Leaves out: modules of other kinds, and weights (sentence_head.py). Prompts and the longest text are for who searches;
rows are read as they are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.model.errors import ModelError

MODULES = "modules.json"
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")  # of torch.nn
_LEGACY = {  # config keys of Pooling before sentence-transformers 5
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer behind the pooling, from `inputs` to `outputs` numbers. activation: one of `ACTIVATIONS`. path:
    its folder in the model's, "" for one that has no file yet."""

    inputs: int
    outputs: int
    bias: bool = True
    activation: str = "Identity"
    path: str = ""


@dataclass(frozen=True)
class SearchTexts:
    """What stands before a query, and before a text that is searched. max_tokens: of either, None if not said."""

    query: str = ""
    text: str = ""
    max_tokens: int | None = None


@dataclass(frozen=True)
class SentenceLayout:
    """pooling: one of `POOLINGS`, over valid tokens. dense: layers in order. normalize: whether the length is 1."""

    pooling: str = "mean"
    dense: tuple[DenseLayer, ...] = ()
    normalize: bool = True

    def width(self, hidden: int) -> int:
        """The numbers of a vector, of an encoder of this hidden size."""
        return self.dense[-1].outputs if self.dense else hidden


def read_layout(folder: str | Path, hidden: int) -> SentenceLayout | None:
    """What modules.json in `folder` says; None where there is none.

    hidden: the encoder's hidden size. ModelError for modules that cannot be applied here, or do not fit together, and
    where text is to be lower-cased by somebody else than the tokenizer.
    """
    folder = Path(folder)
    if not (folder / MODULES).is_file():
        return None
    _check_case(folder)
    listed = _read(folder / MODULES, list)
    pooling, normalize = "", False
    dense: list[DenseLayer] = []
    for number, module in enumerate(listed):
        kind, path = _kind(module, folder), str(module.get("path") or "")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise _other(folder, f"{kind} in {path}", "modules lie in folders of the model's own")
        if (kind == "Transformer") != (number == 0) or (kind == "Transformer" and path):
            raise _other(folder, kind, "the model itself must come first, and lie in the folder itself")
        if kind == "Pooling" and number == 1:
            pooling = _pooling(folder / path / "config.json")
        elif kind == "Dense" and pooling and not normalize:
            dense.append(_dense(folder, path, dense[-1].outputs if dense else hidden))
        elif kind == "Normalize" and pooling:
            normalize = True
        elif kind not in ("Transformer", "Dropout"):
            raise _other(folder, kind, "known are Transformer, Pooling, Dense and Normalize, in this order")
    if not pooling:
        raise _other(folder, "no Pooling", "its vectors would be undefined")
    return SentenceLayout(pooling, tuple(dense), normalize)


def read_search_texts(folder: str | Path) -> SearchTexts:
    """What a sentence-transformers folder says of queries and texts. ModelError where a prompt is not to be pooled."""
    folder = Path(folder)
    own = folder / "config_sentence_transformers.json"
    prompts = _read(own, dict).get("prompts") if own.is_file() else {}
    prompts = prompts if isinstance(prompts, dict) else {}
    texts = [prompts[name] for name in ("document", "passage", "corpus") if name in prompts]
    query, text = str(prompts.get("query") or ""), str(texts[0] or "") if texts else ""
    for file in folder.glob("*_Pooling/config.json") if query or text else ():
        if _read(file, dict).get("include_prompt") is False:
            raise ModelError(
                f"{file} pools without the prompt (include_prompt); use a model that pools all tokens"
            )
    limits = [
        _read(file, dict).get("max_seq_length") for file in sorted(folder.glob("sentence_*_config.json"))
    ]
    return SearchTexts(
        query, text, next((limit for limit in limits if type(limit) is int and limit > 0), None)
    )


def _kind(module: Any, folder: Path) -> str:
    if not isinstance(module, dict) or not isinstance(module.get("type"), str):
        raise ModelError(f"{folder / MODULES} is no list of modules; bring it again")
    return str(module["type"]).rpartition(".")[2]


def _other(folder: Path, kind: str, why: str) -> ModelError:
    return ModelError(f"{folder / MODULES} has {kind}: {why}; give a model with these modules")


def _check_case(folder: Path) -> None:
    """ModelError where sentence-transformers lower-cases a text that the tokenizer takes as it is."""
    asking = [
        file for file in sorted(folder.glob("sentence_*_config.json")) if _lowers(file, "do_lower_case")
    ]
    if asking and not _lowers(folder / "tokenizer.json", "normalizer"):
        raise ModelError(
            f"{asking[0]} says do_lower_case, and the tokenizer in {folder} keeps capitals, so rows would have them;"
            " let the tokenizer do it (tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase(),"
            " then save_pretrained), or set do_lower_case to false if the model was trained with capitals"
        )


def _lowers(file: Path, key: str) -> bool:
    """Whether a file's value of `key` asks for lower case: true, or a normalizer that does it."""
    value = _read(file, dict).get(key) if file.is_file() else None
    text = json.dumps(value)
    return value is True or '"Lowercase"' in text or '"lowercase": true' in text


def _pooling(file: Path) -> str:
    config = _read(file, dict)
    given = config.get("pooling_mode") or [mode for key, mode in _LEGACY.items() if config.get(key)]
    modes = given if isinstance(given, list) else [given]
    if not modes:
        raise ModelError(
            f'{file} names no pooling; write "pooling_mode": "mean" (or {", ".join(POOLINGS[1:])}) into it, as the'
            " model was trained to be pooled"
        )
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ModelError(
            f"{file} pools by {' and '.join(map(str, modes))}; use a model that pools by one of {', '.join(POOLINGS)}"
        )
    return str(modes[0])


def _dense(folder: Path, path: str, inputs: int) -> DenseLayer:
    file = folder / path / "config.json"
    config = _read(file, dict)
    places = [config.get(key) for key in ("module_input_name", "module_output_name")]
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rpartition(".")[2]
    if not activation.startswith("torch.nn.") or name not in ACTIVATIONS or config.get("use_residual"):
        what = "a residual connection" if config.get("use_residual") else f"the activation {activation}"
        raise ModelError(f"{file} has {what}; use a dense layer with one of {', '.join(ACTIVATIONS)} alone")
    if any(place not in (None, "sentence_embedding") for place in places):
        raise ModelError(f"{file} reads or writes other things than the sentence's vector; use another model")
    sizes = config.get("in_features"), config.get("out_features")
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[0] != inputs:
        raise ModelError(
            f"{file} maps {sizes[0]} numbers to {sizes[1]}, and gets {inputs}; bring the folder again as it was saved"
        )
    return DenseLayer(inputs, int(sizes[1] or 0), bool(config.get("bias", True)), name, path)


def _read(file: Path, kind: type) -> Any:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is missing or damaged; bring the whole folder again") from error
    if not isinstance(values, kind):
        raise ModelError(f"{file} is not what sentence-transformers writes; bring the whole folder again")
    return values
