"""Hidden states → one vector a text: pooling, dense layers, length 1; read from and written to a model's folder.

Invariants: what stands at padded positions changes nothing; all of it is computed in float32.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from minilm.model.encoder.sentence_layout import MODULES, DenseLayer, SentenceLayout
from minilm.model.encoder.taps import Blocks
from minilm.model.errors import ModelError
from minilm.model.files import to_safetensors

_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}


class SentenceHead(nn.Module):
    """The modules of a `SentenceLayout`, in float32. Its dense layers are drawn from `seed` and nothing else; a square
    one starts as the identity."""

    def __init__(self, layout: SentenceLayout, seed: int = 0) -> None:
        super().__init__()
        self.layout = layout
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.ModuleList(_linear(layer, generator) for layer in layout.dense)
        self.activations = nn.ModuleList(_ACTIVATIONS[layer.activation]() for layer in layout.dense)

    @torch.no_grad()
    def turn(self, given: Tensor, wanted: Tensor) -> None:
        """Start its one dense layer as the turn that brings vectors `given`, [texts, inputs], nearest to vectors
        `wanted`, [texts, outputs]: of all maps that keep lengths and angles, or drop directions where there are fewer
        outputs, the one of the least squared distance (orthogonal Procrustes, Schönemann 1966), in float64."""
        linear = self.linear[0]
        assert isinstance(linear, nn.Linear)
        left, _, right = torch.linalg.svd(given.double().T @ wanted.double(), full_matrices=False)
        linear.weight.copy_((left @ right).T)
        linear.bias.zero_()

    def forward(self, states: Tensor, mask: Tensor | Blocks | None) -> Tensor:
        """states [batch, tokens, hidden]; mask bool [batch, tokens], None: all valid → float32 [batch, width].

        With blocks for a mask, states are [1, tokens, hidden] and there is a vector for each of their documents.
        """
        device = states.device.type
        known = torch.amp.is_autocast_available(device)  # not on the device "meta"
        with torch.autocast(device, enabled=False) if known else nullcontext():
            states, how = states.float(), self.layout.pooling
            if isinstance(mask, Blocks):
                vector = torch.cat([pool(block, None, how) for block in mask.split(states, 1)])
            else:
                vector = pool(states, mask, how)
            for linear, activation in zip(self.linear, self.activations, strict=True):
                vector = activation(linear(vector))
            return normalize(vector, dim=-1) if self.layout.normalize else vector


def pool(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """[batch, tokens, hidden] → [batch, hidden], over valid tokens, by one of `POOLINGS`; zeros for a row without."""
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if how == "cls":
        first = mask.int().argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), first] * mask.any(dim=1, keepdim=True)
    if how == "max":
        highest = states.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)
        return highest.masked_fill(~mask.any(dim=1, keepdim=True), 0.0)
    total = states.masked_fill(~mask[..., None], 0.0).sum(dim=1)
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return total / (count if how == "mean" else count.sqrt())


def load_head(folder: str | Path, layout: SentenceLayout) -> SentenceHead:
    """The head that `read_layout` found in `folder`, with its weights. ModelError unless these are there and sound."""
    head = SentenceHead(layout)
    for layer, linear in zip(layout.dense, head.linear, strict=True):
        file = Path(folder) / layer.path / "model.safetensors"
        if not file.is_file():
            pickled = (file.parent / "pytorch_model.bin").is_file()
            what = (
                f"{file.parent} has its weights in pytorch_model.bin only, a pickle, which is not read here; make a"
                if pickled
                else f"{file} is missing; bring the whole folder again, and where its weights are a pickle,"
                " pytorch_model.bin, bring that into it too and make a"
            )
            raise ModelError(f"{what} model.safetensors of it: {to_safetensors(file.parent)}")
        try:
            stored = {key.removeprefix("linear."): value.float() for key, value in load_file(file).items()}
            linear.load_state_dict(stored)
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{file} is damaged, or not of its config.json; bring it again") from error
        if not all(bool(value.isfinite().all()) for value in stored.values()):
            raise ModelError(f"{file} holds numbers that are not finite; bring it again")
    return head


def save_head(head: SentenceHead, folder: Path, hidden: int, max_tokens: int) -> None:
    """Write what sentence-transformers reads beside the transformers files in `folder`; versions 2 to 6 load it.

    hidden: the encoder's hidden size; max_tokens: of a row.
    """
    layout = head.layout
    module = "sentence_transformers.models."
    listed = [("", f"{module}Transformer"), ("1_Pooling", f"{module}Pooling")]
    pooling = {f"pooling_mode_{key}": False for key in ("cls_token", "mean_tokens", "max_tokens")}
    pooling |= {"pooling_mode_mean_sqrt_len_tokens": False, _POOLING_KEYS[layout.pooling]: True}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, **pooling})
    for layer, linear, activation in zip(layout.dense, head.linear, head.activations, strict=True):
        path = f"{len(listed)}_Dense"
        listed.append((path, f"{module}Dense"))
        kind = type(activation)
        values: dict[str, object] = {
            "in_features": layer.inputs,
            "out_features": layer.outputs,
            "bias": layer.bias,
        }
        values |= {"activation_function": f"{kind.__module__}.{kind.__name__}"}
        _write(folder / path / "config.json", values)
        weights = {f"linear.{key}": value.contiguous() for key, value in linear.state_dict().items()}
        save_file(weights, folder / path / "model.safetensors")
    if layout.normalize:
        path = f"{len(listed)}_Normalize"
        listed.append((path, f"{module}Normalize"))  # it has no files
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(listed)
    ]
    _write(folder / MODULES, modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", "prompts": {}})


_POOLING_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
}


def _linear(layer: DenseLayer, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(layer.inputs, layer.outputs, bias=layer.bias, device="meta").to_empty(device="cpu")
    start = torch.randn(layer.outputs, layer.inputs, generator=generator) / layer.inputs**0.5
    with torch.no_grad():
        linear.weight.copy_(torch.eye(layer.inputs) if layer.inputs == layer.outputs else start)
        if layer.bias:
            linear.bias.zero_()
    return linear


def _write(file: Path, values: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
