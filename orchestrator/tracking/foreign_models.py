"""Which files of a model that somebody else registered make a plain transformers folder.

`mlflow.transformers.log_model` spreads a model over folders (weights in `model/`, tokenizer in `components/tokenizer/`)
and puts files of its own beside them; other flavours have other folders. What is taken is found by the files alone:
the folder with a config.json and safetensors weights, the tokenizer's, and of both only files of safe kinds.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from minilm.model.files import ADAPTER, VOCABULARIES
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.tracking.model_files import is_safe, refuse_outside

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")


def plain_folder(files: Iterable[str], where: str) -> dict[str, str]:
    """The files to take: path in the registry → name in the folder.

    files: all paths of the model `where`. UserError: no safetensors weights with a config.json, or several.
    """
    files = sorted(files)
    refuse_outside(files, where)
    folders: dict[PurePosixPath, set[str]] = defaultdict(set)
    for file in files:
        folders[PurePosixPath(file).parent].add(PurePosixPath(file).name)
    models = [folder for folder, names in folders.items() if _holds_model(names)]
    if not models:
        raise UserError(f"{where} {_why_none(files)}")
    least = min(len(folder.parts) for folder in models)
    model, *others = [folder for folder in models if len(folder.parts) == least]
    if others:
        raise UserError(
            f"{where} holds several models ({', '.join(map(str, (model, *others)))}): download the one that is meant "
            "and register it by itself, with `minilm register`"
        )
    taken = [model]
    if folders[model].isdisjoint(VOCABULARIES):
        tokenizers = [folder for folder, names in folders.items() if not names.isdisjoint(VOCABULARIES)]
        named = [folder for folder in tokenizers if folder.name == "tokenizer"]
        taken += (named or tokenizers)[:1]
    return {str(folder / name): name for folder in taken for name in sorted(folders[folder]) if is_safe(name)}


def _holds_model(names: set[str]) -> bool:
    weights = {name for name in names if name.endswith(".safetensors")}
    return "config.json" in names and bool(weights - {"adapter_model.safetensors"})


def _why_none(files: list[str]) -> str:
    by_name = {PurePosixPath(file).name: file for file in files}
    if ADAPTER in by_name:
        return (
            f"holds an adapter ({by_name[ADAPTER]}) without the model that it changes: merge them "
            "(merge_and_unload of peft), and register the whole model"
        )
    if pickled := [file for file in files if file.endswith(_PICKLES)]:
        return (
            f"has its weights in {pickled[0]}, which is no safetensors file and may be a pickle, never read here: "
            "save the model with save_pretrained of transformers, and register that"
        )
    return (
        "has no folder with a config.json and safetensors weights: register a model with its weights "
        "(mlflow.transformers.log_model without save_pretrained=False, or `minilm register`), or name the hub's model"
    )
