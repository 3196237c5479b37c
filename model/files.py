"""What may lie in a model folder: one list for what an export writes, a registry takes and a download fetches.

A model is a plain transformers folder of text and safetensors. Leaves out every format that can hold a pickle.
"""

import shlex
from pathlib import Path

SUFFIXES = (".json", ".txt", ".safetensors", ".md", ".model", ".jinja")  # .model: sentencepiece

ADAPTER = "adapter_config.json"  # of peft: weights that belong to another model
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
)
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in `folder`, those that an export takes along."""
    return sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file())


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds the words of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def to_safetensors(folder: Path | str) -> str:
    """A shell command that writes the pickled weights in `folder` as safetensors, without running code in them."""
    program = (
        "import sys,glob,torch,safetensors.torch as s; d=sys.argv[1]; "
        "s.save_file({k:v.clone(memory_format=torch.contiguous_format) for f in glob.glob(d+'/pytorch_model*.bin') "
        "for k,v in torch.load(f,map_location='cpu',weights_only=True).items()}, d+'/model.safetensors',"
        " {'format':'pt'})"
    )
    return f'python -c "{program}" {shlex.quote(str(folder))}'
