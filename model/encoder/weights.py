"""Whether a folder's weights are those that its config describes: no more, no fewer, of the same sizes, finite numbers.

transformers leaves out a weight that it has no place for and draws one that is missing at random: the model is then
another one than was saved. Here both are errors that name the weights. Heads behind the encoder may be left out, and a
pooler may be missing: distillation reads neither.
"""

import json
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.model.errors import ModelError
from minilm.model.files import ADAPTER, to_safetensors

if TYPE_CHECKING:  # a folder is looked into without modelling code
    from transformers import PreTrainedModel

_FLOATS = ("F64", "F32", "F16", "BF16")
_CONSTANT = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|original_inv_freq)$")
_POOLER = re.compile(r"(^|\.)pooler\.")
_ADAPTED = re.compile(r"lora_|\.base_layer\.|\.ia3_|\.adapters?\.|^base_model\.model\.")
_QUANTISED = re.compile(r"\.(SCB|weight_format|qweight|qzeros|scales?|weight_scale|absmax|quant_map|g_idx)\b")
_LAYER = re.compile(r"\blayers?\.(\d+)\.")


def check_folder(folder: Path) -> None:
    """ModelError unless the weights in a model folder are safetensors of plain numbers; reads headers only."""
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder} holds an adapter ({ADAPTER}) beside its model, and distillation would leave it out; merge it"
            f" (merge_and_unload of peft, then save_pretrained) and give that folder, or take {ADAPTER} away to distil"
            " the model without it"
        )
    files = _weight_files(folder)
    if not files:
        pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
        if pickles:
            raise ModelError(
                f"{folder} has its weights in {pickles[0]} only, a pickle, which is not read here; make a"
                f" model.safetensors of it: {to_safetensors(folder)}"
            )
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        raise ModelError(
            f"{folder} has no model.safetensors"
            + (f", only {others}" if others else "")
            + "; give the folder that"
            " save_pretrained wrote"
        )
    for file in files:
        for name, kind in _kinds(file):
            if kind not in _FLOATS and not _CONSTANT.search(name):
                raise ModelError(
                    f"{file}: {name} is stored as {kind}, so the weights are quantised; give the model in float32,"
                    " float16 or bfloat16 that it was made from"
                )


def check_loaded(
    name: str, model: "PreTrainedModel", report: Mapping[str, Collection[Any]], *, head: bool
) -> None:
    """ModelError unless a model was loaded whole. name: of its folder; report: transformers' loading info."""
    config = model.config
    missing = sorted(key for key in report["missing_keys"] if not _POOLER.search(key))
    surplus = sorted(key for key in report["unexpected_keys"] if _of_encoder(key, model))
    adapted = [key for key in report["unexpected_keys"] if _ADAPTED.search(key)]
    if adapted:
        raise ModelError(
            f"{name} holds an adapter that is not merged into its weights ({_some(adapted)}); merge it"
            " (merge_and_unload of peft, then save_pretrained) and give that folder"
        )
    if missing:
        kind = f"a {config.model_type} encoder" + (" with its head" if head else "")
        instead = f"; it has {_some(surplus)} instead" if surplus else ""
        raise ModelError(
            f"{name} lacks {len(missing)} weights of {kind} ({_some(missing)}){instead}; give the folder that its"
            " save_pretrained wrote"
        )
    if report["mismatched_keys"]:
        raise ModelError(
            f"{name}: weights and config.json differ in size: "
            + "; ".join(_sizes(entry, config) for entry in sorted(report["mismatched_keys"])[:3])
            + "; give the config.json that was saved with these weights"
        )
    if surplus:
        raise ModelError(f"{name} {_why_surplus(surplus, config)}")
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ModelError(
                f"{name}: weight {key} holds numbers that are not finite; give a model whose training did not diverge"
            )


def _of_encoder(key: str, model: "PreTrainedModel") -> bool:
    """Whether an unexpected weight lies inside the encoder, not in a head on it."""
    if _POOLER.search(key) or _CONSTANT.search(key):
        return False
    base = model.base_model
    first = key.split(".")[0]
    return first == model.base_model_prefix or first in dict(base.named_children())


def _why_surplus(surplus: list[str], config: Any) -> str:
    found = [int(match[1]) for key in surplus if (match := _LAYER.search(key))]
    layers = config.num_hidden_layers
    if found and min(found) >= layers and len(found) == len(surplus):
        return (
            f"has weights of {max(found) + 1} layers, and its config.json says {layers} ({_some(surplus)}); give the"
            " config.json that was saved with them, or save the shorter model with save_pretrained"
        )
    if any(_QUANTISED.search(key) for key in surplus):
        return f"holds quantised weights ({_some(surplus)}); give the model in float32, float16 or bfloat16"
    return (
        f"holds weights inside the encoder that a {config.model_type} has no place for ({_some(surplus)}); it would"
        " be another model without them, so give another one, or one saved by this version of transformers"
    )


def _sizes(entry: tuple[str, Any, Any], config: Any) -> str:
    """One weight's size in the file and by the config, with the config's keys that have that number."""
    key, stored, wanted = entry
    differing = {b for a, b in zip(stored, wanted, strict=False) if a != b}
    keys = [k for k, v in config.to_dict().items() if type(v) is int and v in differing]
    return (
        f"{key} is {' x '.join(map(str, stored))} in the file and {' x '.join(map(str, wanted))} by the config"
        + (f" ({', '.join(keys)})" if keys else "")
    )


def _some(keys: Collection[str]) -> str:
    first, *rest = sorted(keys)
    return f"{first}, …" if rest else first


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads from a folder: one, or the parts that an index names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / part for part in parts]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is no index of weights; bring the whole folder again") from error
    for file in files:
        if not file.is_file():
            raise ModelError(
                f"{folder} lacks {file.name}, which {index.name} names; bring the whole folder again"
            )
    return files


def _kinds(file: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype of every tensor, from the header of a safetensors file."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(size, 100_000_000)))
        yield from ((name, entry["dtype"]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} is no safetensors file, or damaged; bring it again") from error
