"""One forward pass of a model: which tokens are real, found again when activation checkpointing recomputes a layer.

An adapted layer sees only hidden states. What else it needs (the attention mask, sequence boundaries) is read at the
model's entrances by hooks and kept for the time of the pass. Nothing here refers to a layer or a model, so copies of a
model stay independent of each other.
"""

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixora.routing import Observation, Routing, Tokens, Trace

Stream = Literal["source", "target"]
logger = logging.getLogger("mixora")


@dataclass
class Pass:
    """The tokens of one forward pass.

    mask_BS: bool per stream, True on real tokens; `source` is the (only) input of a decoder or encoder and the
    encoder's input of an encoder-decoder, `target` the decoder's input of the latter. positions_BS: position ids,
    which restart where another sequence begins (packing). `trace` is set while the pass runs under one, `is_observed`
    and `owns_losses` outlive it. `with_grad`: gradients were on at the entrance. `shared`: routings that several layers
    use, with the input they were made from.
    """

    mask_BS: dict[Stream, Tensor] = field(default_factory=dict)
    positions_BS: dict[Stream, Tensor] = field(default_factory=dict)
    trace: Trace | None = None
    is_observed: bool = False
    owns_losses: bool = False
    with_grad: bool = False
    is_replay: bool = False
    depth: int = 0
    shared: dict[str, tuple[Tensor, Routing]] = field(default_factory=dict)
    _tokens: dict[tuple[Stream, torch.Size], Tokens] = field(default_factory=dict)

    def tokens(self, stream: Stream, x: Tensor) -> Tokens:
        """The tokens of a layer's input `x` [..., I], flattened to T."""
        key = (stream, x.shape[:-1])
        if key not in self._tokens:
            self._tokens[key] = self._read_tokens(stream, x)
        return self._tokens[key]

    def _read_tokens(self, stream: Stream, x: Tensor) -> Tokens:
        mask, positions = _fit(self.mask_BS.get(stream), x), _fit(self.positions_BS.get(stream), x)
        known = [t for t in (mask, positions) if t is not None]
        shape = known[0].shape if known else x.shape[:-1]
        valid = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None else mask.to(x.device)
        starts = torch.zeros(shape, dtype=torch.bool, device=x.device)
        if len(shape) > 1:
            starts[..., 0] = True
        if positions is not None:
            jumps = positions[..., 1:] != positions[..., :-1] + 1
            starts[..., 1:] |= jumps.to(x.device) & valid[..., 1:] & valid[..., :-1]
        group_T = (starts.flatten().cumsum(0) - 1).clamp(min=0)
        return Tokens(valid.flatten(), group_T, observed=self.is_observed)

    def record(self, path: str, adapter: str, routing: Routing) -> None:
        """Hand a routing to the open trace, once: what is recomputed was seen before."""
        if self.trace is not None:
            self.trace.observations.append(Observation(path, adapter, self.trace.passes, self.with_grad, routing))


def _fit(per_token_BS: Tensor | None, x: Tensor) -> Tensor | None:
    """`per_token_BS` cut to the tokens of `x` [..., I]: with a cache, only the last ones of each row are computed."""
    if per_token_BS is None:
        return None
    shape = x.shape[:-1]
    if len(shape) == 2 and per_token_BS.shape[0] in (1, shape[0]) and per_token_BS.shape[1] >= shape[1]:
        return per_token_BS[:, per_token_BS.shape[1] - shape[1] :].expand(shape)
    if per_token_BS.numel() == shape.numel():
        return per_token_BS
    logger.debug("a per-token input of shape %s does not fit a layer input of shape %s", per_token_BS.shape, x.shape)
    return None


class _State(threading.local):
    """The open passes and trace of this thread (autograd recomputes CUDA layers on a thread of its own)."""

    def __init__(self) -> None:
        self.stack: list[Pass] = []
        self.trace: Trace | None = None


_state = _State()


def current() -> Pass | None:
    """The pass being run, None outside of a model's forward."""
    return _state.stack[-1] if _state.stack else None


@contextmanager
def tracing(owns_losses: bool = False) -> Iterator[Trace]:
    """Record every routing of the forward passes run inside; the inner of two nested traces records."""
    outer, trace = _state.trace, Trace(owns_losses)
    _state.trace = trace
    try:
        yield trace
    finally:
        _state.trace = outer


@contextmanager
def replay(seen: Pass) -> Iterator[Pass]:
    """Run a layer again as in pass `seen`: the same tokens, fresh routings, nothing recorded twice."""
    again = replace(seen, trace=None, is_replay=True, depth=1, shared={})
    _state.stack.append(again)
    try:
        yield again
    finally:
        _state.stack.remove(again)


def is_in_backward() -> bool:
    """Whether autograd is running: a layer called then is being recomputed."""
    return torch._C._current_graph_task_id() != -1


class _Recomputable:
    """A checkpointed function that knows its second and later calls to be recomputations of its pass."""

    def __init__(self, function: Callable[..., Any], seen: Pass) -> None:
        self.function, self.seen, self.has_run = function, seen, False

    def __call__(self, *args: Any) -> Any:
        if not self.has_run:
            self.has_run = True
            return self.function(*args)
        with replay(self.seen):
            return self.function(*args)


class Checkpointing:
    """Wraps the function with which transformers checkpoints a layer, so that recomputation sees its own pass."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        seen = current()
        return self.checkpoint(function if seen is None else _Recomputable(function, seen), *args)


def install(model: nn.Module) -> list[Any]:
    """Hook the entrances of `model`; returns the handles that remove the hooks."""
    handles = []
    for entrance in _entrances(model):
        handles.append(entrance.register_forward_pre_hook(_enter, with_kwargs=True))
        handles.append(entrance.register_forward_hook(_leave, with_kwargs=True, always_call=True))
    return handles


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The modules a forward pass can begin at: the model, its backbone, and the halves of an encoder-decoder."""
    found = [model, getattr(model, getattr(model, "base_model_prefix", "") or "-", None)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found += [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
    return list(dict.fromkeys(m for m in found if isinstance(m, nn.Module)))


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    here = current()
    if here is None:
        here = _read_pass(module, _named(module, args, kwargs))
        _state.stack.append(here)
        if module.training:
            _keep_passes_over_recomputation(module)
    here.depth += 1


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    here = current()
    if here is None:
        return
    here.depth -= 1
    if here.depth == 0:
        _state.stack.pop()
        here.shared.clear()
        if here.trace is not None:
            here.trace.passes += 1
        # what outlives the pass must hold no graph: layers keep it for a recomputation, and models are copied
        here.trace = None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def _read_pass(module: nn.Module, inputs: dict[str, Any]) -> Pass:
    trace = _state.trace
    here = Pass(
        trace=trace,
        is_observed=trace is not None,
        owns_losses=trace is not None and trace.owns_losses,
        with_grad=torch.is_grad_enabled(),
    )
    _put(here.mask_BS, "source", inputs.get("attention_mask"), torch.bool)
    _put(here.positions_BS, "source", inputs.get("position_ids"), None)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        _put(here.mask_BS, "target", _target_mask(inputs), torch.bool)
    return here


def _put(into: dict[Stream, Tensor], stream: Stream, value: Any, dtype: torch.dtype | None) -> None:
    if isinstance(value, Tensor) and value.dim() == 2:
        into[stream] = value if dtype is None else value.to(dtype)


def _target_mask(inputs: dict[str, Any]) -> Tensor | None:
    """Real tokens of the decoder's input; without a mask they follow from the labels, which it gets shifted by one."""
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if mask is not None or labels is None or inputs.get("decoder_input_ids") is not None or labels.dim() != 2:
        return mask
    return torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], dim=1)


def _keep_passes_over_recomputation(model: nn.Module) -> None:
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, Checkpointing):
            module._gradient_checkpointing_func = Checkpointing(checkpoint)  # type: ignore[assignment]
