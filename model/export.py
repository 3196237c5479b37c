"""A student as a plain transformers folder: config, safetensors, tokenizer, model card.

Leaves out: registering it anywhere; optimiser state; anything that would need our code to be loaded again.
Invariant: the folder is either whole or absent. It is written under a temporary name beside its destination, every
file and the folder are synced, and one rename puts it in place; an older folder stays whole until that moment. What
a killed export has left (`.NAME.*.tmp`, locked by flock while its writer lives) is removed by the next.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minilm.model.errors import ModelError
from minilm.model.files import has_vocabulary, tokenizer_files

if TYPE_CHECKING:  # the driver needs `weights_digest` alone, without modelling code
    from transformers import PreTrainedModel

    from minilm.model.encoder.sentence_head import SentenceHead


def export_student(
    model: "PreTrainedModel",
    tokenizer_folder: Path,
    out: Path,
    card: str,
    head: "SentenceHead | None" = None,
) -> None:
    """Write `model` with the tokenizer of `tokenizer_folder` and `card` as README.md to the folder `out`,
    atomically.

    AutoModel and AutoTokenizer load `out` without our code or a network. The tokenizer cuts text at the longest row
    that the model takes. An earlier export at `out` is replaced. head: of an embedding model; sentence-transformers
    then loads `out` too, and its vectors are the head's.
    """
    from minilm.model.encoder.build import quiet_transformers
    from minilm.model.encoder.sentence_head import save_head
    from minilm.model.encoder.shape import shape_of

    if not has_vocabulary(tokenizer_folder):
        raise ModelError(f"{tokenizer_folder} holds no tokenizer; give the tokenizer/ folder of the data set")
    with whole_folder(out) as temporary:
        with quiet_transformers():
            model.save_pretrained(temporary)
        for file in tokenizer_files(tokenizer_folder):
            copy = temporary / file.relative_to(tokenizer_folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        shape = shape_of(model.config)
        _set_max_length(temporary, shape.max_tokens)
        if head is not None:
            save_head(head, temporary, shape.hidden, shape.max_tokens)
        (temporary / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `out` when the block ends, and is removed where the block raises."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _temporary_folder(out)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes files private, mkdtemp folders
            _sync(path)
        _put_in_place(temporary, out)
        _remove_leftovers(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def weights_digest(source: Path | Mapping[str, Tensor]) -> str:
    """sha256 (hex) over every tensor's name, dtype, shape and bytes, in name order: equal only bit for bit.

    source: an exported folder or a state dict; both give the same digest for the same weights. Dense layers behind a
    model's pooling (N_Dense/) count too.
    """
    digest = hashlib.sha256()
    tensors = _load(source) if isinstance(source, Path) else source
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_card(
    name: str,
    model: "PreTrainedModel",
    *,
    trained: Iterable[str],
    teacher: str,
    facts: Mapping[str, str],
    teacher_card: Path | None = None,
    head: "SentenceHead | None" = None,
) -> str:
    """The README.md of an export (Markdown): what it is good for, how to load it, what distillation did not train.

    trained: names of the trained parameters (`TappedEncoder.trained_parameters`); facts: further rows of the
    table; teacher_card: the teacher's README.md, from which licence and language are taken, never guessed; head: of
    an embedding model.
    """
    trained = set(trained)
    untrained = [key for key, _ in model.named_parameters() if key not in trained]
    config = model.config
    rows = {
        "Teacher": teacher,
        "Architecture": f"{config.model_type}, {config.num_hidden_layers} layers,"
        f" hidden size {config.hidden_size}, {config.num_attention_heads} heads",
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **facts,
    }
    if head is not None:
        layout = head.layout
        rows["Vectors"] = f"{layout.width(config.hidden_size)} numbers: {layout.pooling} pooling" + "".join(
            f", a dense layer to {layer.outputs}" for layer in layout.dense
        )
    table = "\n".join(f"| {key} | {' '.join(str(value).split())} |" for key, value in rows.items())
    listed = "\n".join(f"- `{key}`" for key in untrained) or "- none"
    use, source, load, why = _EMBEDDER if head is not None else _ENCODER
    if head is None and not untrained:
        use = "All of its weights were trained."
    return f"""---
{_metadata(teacher_card, embeds=head is not None)}
---
# {name}

{use}

An encoder distilled from its teacher by the objective below ({source}).

| | |
|---|---|
{table}

## Load it

{load}

## Not trained by distillation

{why} They are:

{listed}
"""


_ENCODER = (
    "**Fine-tune it before use.** The last layer's weights after its queries, keys and values were not trained and"
    " hold their initial values: where these were random, pooled vectors mean nothing until a task trains them.",
    "MiniLM, arXiv 2002.10957",
    """    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained("this folder")
    tokenizer = AutoTokenizer.from_pretrained("this folder")""",
    """Distillation reads queries, keys and values of the last layer. The weights after these projections
keep their initial values until fine-tuning trains them.""",
)
_EMBEDDER = (
    "**Use it as it is.** It makes a vector of a text, in its teacher's own space: its vectors and the teacher's can be"
    " compared by their cosine, so texts that the teacher has embedded can be searched with it.",
    "LEAF, arXiv 2509.12539, after MiniLM, arXiv 2002.10957",
    """    from sentence_transformers import SentenceTransformer
    vectors = SentenceTransformer("this folder").encode(["a text", "another one"])

It is a plain transformers folder as well: `AutoModel` and `AutoTokenizer` load it, for the hidden states or for
fine-tuning.""",
    "Everything that makes a vector was trained. What else the folder holds keeps the values that it started with.",
)


def _set_max_length(folder: Path, max_tokens: int) -> None:
    """Let the tokenizer in `folder` cut text at `max_tokens`."""
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    values["model_max_length"] = max_tokens
    values.pop(
        "auto_map", None
    )  # of code that would come along with the teacher's, and be asked for when it is loaded
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _temporary_folder(out: Path) -> tuple[Path, int]:
    """A new folder beside `out`, and a descriptor that locks it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    lock = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks, where leftovers stay
        fcntl.flock(lock, fcntl.LOCK_SH)
    return folder, lock


def _put_in_place(temporary: Path, out: Path) -> None:
    aside = None
    if out.exists():  # a folder that is not empty cannot be renamed over
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        out.rename(aside / "old")
    temporary.rename(out)
    _sync(out.parent)
    if aside is not None:
        shutil.rmtree(aside)


def _remove_leftovers(out: Path) -> None:
    for left in out.parent.iterdir():
        if not (left.name.startswith(f".{out.name}.") and left.suffix == ".tmp"):
            continue
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no safetensors weights; give a folder written by export_student")
    try:
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for file in sorted(folder.glob("[0-9]*_Dense/model.safetensors")):
            found |= {f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()}
        return found
    except SafetensorError as error:
        raise ModelError(f"{folder} holds damaged safetensors weights ({error}); bring them again") from error


def _metadata(teacher_card: Path | None, *, embeds: bool) -> str:
    """YAML for the hub: the library, and what the teacher's card says of licence and language."""
    from huggingface_hub import ModelCard, ModelCardData  # a second to import

    known = {}
    if teacher_card is not None and teacher_card.is_file():
        try:
            found = ModelCard.load(teacher_card, ignore_metadata_errors=True).data
            names = ("license", "license_name", "license_link", "language")
            known = {key: value for key in names if (value := getattr(found, key, None)) is not None}
        except Exception:  # a file that is no card, or whose head is no YAML: nothing is known then
            known = {}
    if embeds:
        known |= {"pipeline_tag": "sentence-similarity"}
    library = "sentence-transformers" if embeds else "transformers"
    data = ModelCardData(library_name=library, tags=["minilm", "distillation"], **known)
    return str(data.to_yaml()).strip()
