"""A transformers encoder that stops at the q/k/v projections of one layer and hands them out.

transformers calls one attention function per layer with Q, K, V split into heads, after any rotary embedding.
The tapped layer gets a function of ours: it raises, which ends the forward there. So nothing behind the
tapped projections runs, gradients are intact, and no model code is copied. Layers in front of it run plain
SDPA.

Leaves out: architectures that do not call the attention interface (they need an adapter of their own),
decoders.

Invariants: the wrapped model stays an ordinary transformers model (called directly, it runs to its end); a
forward leaves no state behind in the model, in the thread or in autograd, whether it ends by the tap or by an
error; no tensor outlives the forward but the taps and their autograd graph; no host sync.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from model.errors import ModelError

SDPA, TAP = "minilm-sdpa", "minilm-tap"  # names in transformers' registries; never written into a config.json


class Taps(NamedTuple):
    """What one layer's attention is made of: q, k, v [batch, heads, tokens, head_size]; q and k after
    rotation.

    bias: an additive position bias on the scores, broadcastable to [batch, heads, tokens, tokens], or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None


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
        model.config._attn_implementation = TAP
        probe = _Probe(stop_after=layer)
        with _quietly(model), torch.no_grad():
            _run(model, probe, _probe_ids(model), None)
        model.config._attn_implementation = SDPA
        if probe.module is None:
            raise ModelError(
                f"architecture {model.config.model_type} does not call the attention interface: no tap"
            )
        # A config of its own for the tapped module: the other layers never meet the tap, so they can be
        # compiled.
        self._tapped = [probe.module]  # in a list: it is already registered inside `model`
        config = copy.copy(model.config)
        config._attn_implementation = TAP
        setattr(probe.module, "config", config)  # noqa: B010  (a plain assignment does not type-check)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Taps:
        """input_ids int64 [batch, tokens]; mask bool [batch, tokens], True where a token is valid, None:
        all."""
        if mask is not None and (mask.dtype != torch.bool or mask.shape != input_ids.shape):
            raise ModelError(
                f"mask is {mask.dtype} {list(mask.shape)}; for input_ids {list(input_ids.shape)} it must be"
                " torch.bool of the same shape"
            )
        probe = _Probe(module=self._tapped[0])
        _run(self.model, probe, input_ids, mask)
        if probe.taps is None:
            raise ModelError(
                f"{self.model.config.model_type} ended without reaching the tap of layer {self.layer}"
            )
        return probe.taps

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in front of and at the tap that require gradients, named as in model.state_dict().

        Read off the autograd graph of a two-token forward, so it is right for every architecture; no gradient
        is computed and no random number drawn.
        """
        with _quietly(self.model), torch.enable_grad():
            taps = self(_probe_ids(self.model))
        reached: set[int] = set()
        seen: set[Any] = set()
        nodes = [tensor.grad_fn for tensor in (taps.q, taps.k, taps.v, taps.bias) if tensor is not None]
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


class _Probe:
    """One forward's business with the tap: stop at `module`, or at the `stop_after`-th attention call."""

    def __init__(self, module: nn.Module | None = None, stop_after: int = 0) -> None:
        self.module = module
        self.stop_after = stop_after
        self.taps: Taps | None = None

    def visit(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self.stop_after:
            self.stop_after -= 1
            if self.stop_after:
                return
            self.module = module
        if module is not self.module:
            return
        groups = (
            q.shape[1] // k.shape[1]
        )  # grouped-query attention: every query head sees its group's k and v
        self.taps = Taps(q, repeat_kv(k, groups), repeat_kv(v, groups))
        raise _Reached


_active = threading.local()


def _run(model: PreTrainedModel, probe: _Probe, input_ids: Tensor, mask: Tensor | None) -> None:
    outer = getattr(_active, "probe", None)
    _active.probe = probe
    try:
        model(input_ids=input_ids, attention_mask=mask)
    except _Reached as reached:
        reached.__traceback__ = None  # its frames hold every activation on the way to the tap
    finally:
        _active.probe = outer


def _tap_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    probe: _Probe | None = getattr(_active, "probe", None)
    if probe is not None:
        probe.visit(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def _mask_without_sync(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' SDPA mask, less its `mask.all()` (a host sync); a row of padding only sees itself."""
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
        attention_mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(SDPA, sdpa_attention_forward)
AttentionInterface.register(TAP, _tap_attention)
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
