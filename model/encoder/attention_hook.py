"""The attention function of a tapped layer: it takes the taps and ends the forward there.

transformers calls one attention function per layer with Q, K, V split into heads, after any rotary embedding. The
tapped layer gets our function, which raises an exception to end the forward. So nothing after the tapped projections
runs, gradients are intact, and no model code is copied.

Invariants: a forward leaves no state in the model, in the thread or in autograd, whether it ends at the tap or with an
error; threads do not see each other's forwards.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from minilm.model.encoder.attention import attend
from minilm.model.encoder.taps import Blocks, Taps, active_blocks, lying_in

SDPA, TAP = "minilm-sdpa", "minilm-tap"  # names in transformers' registries; never written into a config.json


class _Reached(BaseException):
    """Ends a forward at the tap. Not an Exception, so that no `except Exception` in model code swallows it."""


class Discovery:
    """Lists the attention modules of layers 1 to `layer` in the order of their calls."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.modules: list[nn.Module] = []

    def visit(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        self.modules.append(module)
        if len(self.modules) == self.layer:
            raise _Reached


class Collector:
    """Keeps the taps of the wanted attention modules during one forward, and ends it at the last."""

    def __init__(self, wanted: list[nn.Module], *, stop_at_last: bool) -> None:
        self.wanted = wanted
        self.stop_at_last = stop_at_last
        self.taps: list[Taps] = []
        self.hidden: Tensor | None = None

    def visit(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        if module is not self.wanted[len(self.taps)]:
            return
        groups = q.shape[1] // k.shape[1]  # grouped queries: every query head sees its group's k and v
        self.taps.append(Taps(q, repeat_kv(k, groups), repeat_kv(v, groups), bias))
        if self.stop_at_last and len(self.taps) == len(self.wanted):
            raise _Reached


_active = threading.local()


def run(
    model: PreTrainedModel,
    visitor: Discovery | Collector,
    input_ids: Tensor,
    mask: Tensor | Blocks | None,
    positions: Tensor | None = None,
) -> Any:
    """The model's output, or None where the visitor ended the forward. positions: of the tokens, if not by row."""
    outer = getattr(_active, "visitor", None)
    _active.visitor = visitor
    try:
        if not isinstance(mask, Blocks):
            return model(input_ids=input_ids, attention_mask=mask)
        with lying_in(mask):
            return model(input_ids=input_ids, position_ids=positions)
    except _Reached as reached:
        reached.__traceback__ = None  # its frames hold every activation before the tap
        return None
    finally:
        _active.visitor = outer


@contextmanager
def stop_after(block: nn.Module, collector: Collector) -> Iterator[None]:
    """End the forward after this layer, and keep its output in the collector."""

    def keep(_block: nn.Module, _arguments: Any, output: Any) -> None:
        if getattr(_active, "visitor", None) is collector:  # not another thread's forward
            collector.hidden = output[0] if isinstance(output, tuple) else output
            raise _Reached

    handle = block.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def only_at(positions: Tensor, base: nn.Module) -> Iterator[None]:
    """Let the head on the base model see the hidden states at `positions` only."""
    outer = getattr(_active, "selecting", None)
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
        _active.selecting = outer


def tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The attention function of a tapped layer. `bias` (from an adapter) is already part of attention_mask."""
    bias = kwargs.pop("bias", None)
    visitor: Discovery | Collector | None = getattr(_active, "visitor", None)
    if visitor is not None:
        visitor.visit(module, query, key, value, bias)
    return attend(module, query, key, value, attention_mask, **kwargs)


def _mask_without_sync(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' SDPA mask without its `mask.all()`, a host sync; a row that is all padding sees itself."""
    blocks = active_blocks()
    if blocks is not None:  # of one document, the widest
        kwargs["q_length"] = kwargs["kv_length"] = blocks.widest
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
        attention_mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(SDPA, attend)
AttentionInterface.register(TAP, tapped_attention)
AttentionMaskInterface.register(SDPA, _mask_without_sync)
AttentionMaskInterface.register(TAP, _mask_without_sync)
