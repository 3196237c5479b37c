"""A transformers encoder that stops at the q/k/v projections of one layer and hands them out.

transformers calls one attention function per layer with Q, K, V split into heads, after any rotary embedding.
The tapped layer gets a function of ours: it raises, which ends the forward there. So nothing behind the
tapped projections runs, gradients are intact, and no model code is copied. Layers in front of it run plain
SDPA. An objective may `watch` more: layers in front (they run on), or the hidden states that leave the tapped
layer.

Leaves out: decoders; architectures that do not call the attention interface (they need an adapter, see
mpnet.py).

Invariants: the wrapped model stays an ordinary transformers model (called directly, it runs to its end); a
forward leaves no state behind in the model, in the thread or in autograd, whether it ends by the tap or by an
error; no tensor outlives the forward but the taps and their autograd graph; no host sync.
"""

import copy
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from model import mpnet
from model.attention import attend
from model.errors import ModelError

SDPA, TAP = "minilm-sdpa", "minilm-tap"  # names in transformers' registries; never written into a config.json


class Taps(NamedTuple):
    """What one layer's attention is made of: q, k, v [batch, heads, tokens, head_size]; q and k after
    rotation.

    bias: an additive position bias on the scores, broadcastable to [batch, heads, tokens, tokens], or None.
    If watched: hidden, the layer's output [batch, tokens, hidden]; earlier, the taps of layers in front;
    logits [batch, k, vocabulary] of the model's head, at the k positions asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    hidden: Tensor | None = None
    earlier: "tuple[Taps, ...]" = ()
    logits: Tensor | None = None

    def like(self, other: "Taps") -> "Taps":
        """Each tensor in the dtype of its counterpart: under autocast hidden states can differ from q, k and v."""
        cast = {
            name: own.to(its.dtype)
            for name, own, its in zip(self._fields, self, other, strict=True)
            if isinstance(own, Tensor) and isinstance(its, Tensor)
        }
        earlier = tuple(own.like(its) for own, its in zip(self.earlier, other.earlier, strict=True))
        return self._replace(**cast, earlier=earlier)

    def tensors(self, parts: Collection[str]) -> list[Tensor]:
        """The tensors of these fields, those of earlier layers included."""
        own = [value for part, value in self._asdict().items() if part in parts and value is not None]
        return own + [tensor for taps in self.earlier for tensor in taps.tensors(parts)]


class TappedEncoder(nn.Module):
    """`model` cut at the q/k/v projections of layer `layer` (1 is the layer after the embeddings)."""

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        num_layers = model.config.num_hidden_layers
        if not 1 <= layer <= num_layers:
            raise ModelError(
                f"layer {layer} does not exist: {model.config.model_type} has layers 1 to {num_layers}"
            )
        self.model = model
        self.training = model.training
        self.layer = layer
        if model.config.model_type == "mpnet":
            mpnet.install(model, _attention)
        model.config._attn_implementation = TAP
        discovery = _Discovery(layer)
        with _quietly(model), torch.no_grad():
            _run(model, discovery, _probe_ids(model), None)
        model.config._attn_implementation = SDPA
        if len(discovery.modules) < layer:
            raise ModelError(
                f"architecture {model.config.model_type} does not call the attention interface: no tap"
            )
        self._attentions = tuple(discovery.modules)  # a tuple: they are already registered inside `model`
        self.watch()

    def watch(self, *, layers: Sequence[int] = (), parts: Collection[str] = ("q", "k", "v", "bias")) -> None:
        """Say what an objective reads: the taps of `layers` too (ascending, before the tap); which `parts`.

        parts: fields of `Taps`. With "hidden" the tapped layer runs to its end and its output is handed out;
        with "logits" all of the model runs.
        """
        if list(layers) != sorted(set(layers)) or any(not 1 <= layer < self.layer for layer in layers):
            raise ModelError(
                f"layers {list(layers)} cannot be watched; use ascending ones from 1 to {self.layer - 1}"
            )
        self._earlier, self._parts = tuple(layers), frozenset(parts)
        for layer in (*layers, self.layer):
            # A config of its own: layers that are not tapped never meet the tap, so they can be compiled.
            attention = self._attentions[layer - 1]
            config = copy.copy(self.model.config)
            config._attn_implementation = TAP
            setattr(attention, "config", config)  # noqa: B010  (a plain assignment does not type-check)

    def blocks(self) -> list[nn.Module]:
        """The layers 1 to `layer` as modules."""
        for stack in self.model.modules():
            if isinstance(stack, nn.ModuleList) and len(stack) >= self.layer:
                found = list(stack)[: self.layer]
                pairs = zip(found, self._attentions, strict=True)
                if all(attention in set(block.modules()) for block, attention in pairs):
                    return found
        raise ModelError(f"architecture {self.model.config.model_type} keeps its layers in no list")

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the layers in front of the tap, one by one; the tapped layer itself stays as it is.

        Off unless called: on a CPU it gains 7 % in a teacher and loses 3 % in a student (docs/benchmarks.md).
        """
        for block in self.blocks()[:-1]:
            block.compile(backend=backend)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Taps:
        """input_ids int64 [batch, tokens]; mask bool [batch, tokens], True where a token is valid, None: all.

        positions: int64 [batch, k], where logits are wanted, if these are watched.
        """
        if mask is not None and (mask.dtype != torch.bool or mask.shape != input_ids.shape):
            raise ModelError(
                f"mask is {mask.dtype} {list(mask.shape)}; for input_ids {list(input_ids.shape)} it must be"
                " torch.bool of the same shape"
            )
        wanted = [self._attentions[layer - 1] for layer in (*self._earlier, self.layer)]
        collection = _Collection(wanted, stop_at_last=not {"hidden", "logits"} & self._parts)
        logits = None
        if positions is not None and "logits" in self._parts:
            with _only_at(positions, self.model.base_model):
                logits = _run(self.model, collection, input_ids, mask).logits
        elif collection.stop_at_last:
            _run(self.model, collection, input_ids, mask)
        else:
            with _stop_after(self.blocks()[-1], collection):
                _run(self.model, collection, input_ids, mask)
        if len(collection.taps) < len(wanted):
            raise ModelError(
                f"{self.model.config.model_type} ended without reaching the tap of layer {self.layer}"
            )
        *earlier, last = collection.taps
        return last._replace(earlier=tuple(earlier), hidden=collection.hidden, logits=logits)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that what is watched depends on, of those that require gradients.

        Named as in model.state_dict(): without further watching, all in front of and at the tap.
        Read off the autograd graph of a two-token forward, so it is right for every architecture; no gradient
        is computed and no random number drawn.
        """
        with _quietly(self.model), torch.enable_grad():
            ids = _probe_ids(self.model)
            taps = self(ids, None, ids[:, :1] if "logits" in self._parts else None)
        reached: set[int] = set()
        seen: set[Any] = set()
        nodes = [tensor.grad_fn for tensor in taps.tensors(self._parts)]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                reached.add(id(node.variable))
            nodes.extend(parent for parent, _ in node.next_functions)
        return {name: p for name, p in self.model.named_parameters() if id(p) in reached}


class _Reached(BaseException):
    """Ends a forward at the tap. Not an Exception, so that no `except Exception` in model code swallows
    it."""


class _Discovery:
    """Lists the attention modules of layers 1 to `layer` in the order of their calls."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.modules: list[nn.Module] = []

    def visit(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        self.modules.append(module)
        if len(self.modules) == self.layer:
            raise _Reached


class _Collection:
    """Keeps the taps of the wanted attention modules during one forward, and ends it at the last."""

    def __init__(self, wanted: list[nn.Module], *, stop_at_last: bool) -> None:
        self.wanted = wanted
        self.stop_at_last = stop_at_last
        self.taps: list[Taps] = []
        self.hidden: Tensor | None = None

    def visit(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        if module is not self.wanted[len(self.taps)]:
            return
        groups = (
            q.shape[1] // k.shape[1]
        )  # grouped-query attention: every query head sees its group's k and v
        self.taps.append(Taps(q, repeat_kv(k, groups), repeat_kv(v, groups), bias))
        if self.stop_at_last and len(self.taps) == len(self.wanted):
            raise _Reached


_active = threading.local()


def _run(
    model: PreTrainedModel, visitor: _Discovery | _Collection, input_ids: Tensor, mask: Tensor | None
) -> Any:
    """The model's output, or None where the visitor ended the forward."""
    outer = getattr(_active, "visitor", None)
    _active.visitor = visitor
    try:
        return model(input_ids=input_ids, attention_mask=mask)
    except _Reached as reached:
        reached.__traceback__ = None  # its frames hold every activation on the way to the tap
        return None
    finally:
        _active.visitor = outer


@contextmanager
def _stop_after(block: nn.Module, collection: _Collection) -> Iterator[None]:
    def keep(_block: nn.Module, _arguments: Any, output: Any) -> None:
        if getattr(_active, "visitor", None) is collection:  # not another thread's forward
            collection.hidden = output[0] if isinstance(output, tuple) else output
            raise _Reached

    handle = block.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _only_at(positions: Tensor, base: nn.Module) -> Iterator[None]:
    """Let the head behind the base model see the hidden states at `positions` only."""
    run = getattr(_active, "selecting", None)
    _active.selecting = positions

    def select(_base: nn.Module, _arguments: Any, output: Any) -> Any:
        if getattr(_active, "selecting", None) is positions:  # not another thread's forward
            hidden = output.last_hidden_state
            at = positions[..., None].expand(-1, -1, hidden.shape[-1])
            output["last_hidden_state"] = hidden.gather(1, at)
        return output

    handle = base.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
        _active.selecting = run


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """What a tapped layer calls. `bias` (from an adapter) is already part of attention_mask."""
    bias = kwargs.pop("bias", None)
    visitor: _Discovery | _Collection | None = getattr(_active, "visitor", None)
    if visitor is not None:
        visitor.visit(module, query, key, value, bias)
    return attend(module, query, key, value, attention_mask, **kwargs)


def _mask_without_sync(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' SDPA mask, less its `mask.all()` (a host sync); a row of padding only sees itself."""
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
        attention_mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(SDPA, attend)
AttentionInterface.register(TAP, _attention)
AttentionMaskInterface.register(SDPA, _mask_without_sync)
AttentionMaskInterface.register(TAP, _mask_without_sync)


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return torch.zeros(1, 2, dtype=torch.int64, device=model.device)


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode for a moment, so that a probe draws no random number; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
