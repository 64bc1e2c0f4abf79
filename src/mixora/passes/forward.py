"""One forward pass of a model: which tokens are real, found again when activation checkpointing recomputes a layer.

An adapted layer sees only hidden states. What else it needs (the attention mask, sequence boundaries) is read at the
model's entrances by hooks and kept for the time of the pass. Nothing here refers to a layer or a model, so copies of a
model stay independent of each other.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mixora.host.world import sum_over_processes
from mixora.passes.inputs import Input
from mixora.routing import Observation, Routing, Tokens, Trace
from mixora.routing.draws import MERGED, Draw, Serving, current_serving, draw_seed

Stream = Literal["source", "target"]
logger = logging.getLogger("mixora")


@dataclass
class Shared:
    """A routing that several layers use.

    `path`: the router's module. `made_from`: the input it read. `readers`: paths of the layers that read it too.
    """

    path: str
    made_from: Input
    routing: Routing
    readers: set[str] = field(default_factory=set)


@dataclass
class Pooled:
    """Sums over the tokens of one site, which those of the other processes join when the pass is over.

    `hear` is then told the sums of all processes, and gives the gradient of a loss with respect to each, which
    `gradients` keeps for backward.
    """

    sums: list[Tensor]
    hear: Callable[[list[Tensor]], list[Tensor]]
    gradients: list[Tensor] | None = None


@dataclass
class Pass:
    """The tokens of one forward pass.

    mask_BS: bool per stream, True on the real of the tokens that come in; `source` is the (only) input of a decoder
    or encoder and the encoder's input of an encoder-decoder, `target` the decoder's input of the latter.
    positions_BS: position ids, which restart where another sequence begins (packing). `head_columns`: which tokens
    the head gets, as `logits_to_keep` says it; None for all. `opened`: the entrances that the pass is in, the
    outermost first. `trace` is set while the pass runs under one, `is_observed` and `owns_losses` outlive it.
    `with_grad`: gradients were on at the entrance. `again`: this pass as recomputed layers see it. `seed`: what
    this pass's routes are drawn by, where they are; `serving`: what serves where not. `shared`: per adapter the
    last routing, which other layers may use. `joined`: per adapter the products that layers made for each other;
    `outputs`: what takes their place without gradients. `kept`: what the passes that go on with one cache of keys
    and values keep for each other; None without a cache and where routes are drawn; `is_kept_checked`: nothing of
    it is old. `pooled`: per site and adapter, a call after the other, what goes to the other processes. `calls`:
    per site and adapter, how often it was called where it adds the gradient of its loss.
    """

    mask_BS: dict[Stream, Tensor] = field(default_factory=dict)
    positions_BS: dict[Stream, Tensor] = field(default_factory=dict)
    head_columns: int | Tensor | None = None
    opened: list[nn.Module] = field(default_factory=list)
    trace: Trace | None = None
    is_observed: bool = False
    owns_losses: bool = False
    with_grad: bool = False
    is_replay: bool = False
    again: "Pass | None" = None
    seed: int | None = None
    serving: Serving = MERGED
    shared: dict[str, Shared] = field(default_factory=dict)
    joined: dict[str, Any] = field(default_factory=dict)
    outputs: Any = None
    kept: dict[str, Any] | None = None
    is_kept_checked: bool = False
    pooled: dict[tuple[str, str], list[Pooled]] = field(default_factory=dict)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    _tokens: dict[tuple[Stream, torch.Size, int], Tokens] = field(default_factory=dict)
    _has_padding: dict[Stream, bool] = field(default_factory=dict)

    def draw_at(self, path: str) -> Draw:
        """What serves the site at `path`, where its router draws."""
        return Draw(None if self.seed is None else f"{self.seed}/{path}", self.serving.members)

    def tokens(self, stream: Stream, x: Tensor, times: int = 1) -> Tokens:
        """The tokens of a layer's input `x` [..., I], flattened to T, each of them so many `times` in a row."""
        key = (stream, x.shape[:-1], times)
        if key not in self._tokens:
            if times == 1:
                self._tokens[key] = self._read_tokens(stream, x.shape[:-1], x.device)
            else:
                once = self.tokens(stream, x)
                valid_T, group_T = (t.repeat_interleave(times) for t in (once.valid_T, once.group_T))
                self._tokens[key] = replace(once, valid_T=valid_T, group_T=group_T)
        return self._tokens[key]

    def has_padding(self, stream: Stream) -> bool:
        """Whether some token of a stream is padding, as far as that can be told without waiting for a device."""
        if stream not in self._has_padding:
            mask_BS = self.mask_BS.get(stream)
            self._has_padding[stream] = mask_BS is not None and (mask_BS.device.type != "cpu" or not mask_BS.all())
        return self._has_padding[stream]

    def _read_tokens(self, stream: Stream, shape: torch.Size, device: torch.device) -> Tokens:
        mask, positions = self.mask_BS.get(stream), self.positions_BS.get(stream)
        if _counts_time_first(mask, shape):
            turned = self._read_tokens(stream, shape[::-1], device)
            valid_T, group_T = (t.view(shape[::-1]).T.flatten() for t in (turned.valid_T, turned.group_T))
            return replace(turned, valid_T=valid_T, group_T=group_T)
        mask, positions = (self._fit(per_token, shape) for per_token in (mask, positions))
        known = [t for t in (mask, positions) if t is not None]
        shape = known[0].shape if known else shape
        valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.to(device)
        starts = torch.zeros(shape, dtype=torch.bool, device=device)
        if len(shape) > 1:
            starts[..., :1] = True
        if positions is not None:
            positions = positions.to(device)
            index = torch.arange(valid.shape[-1], device=device)
            # the real token before each token: padding between two sequences belongs to neither
            last = torch.where(valid, index, -1).cummax(dim=-1).values.roll(1, dims=-1)
            before = positions.gather(-1, last.clamp(min=0))
            starts |= valid & (index > 0) & (last >= 0) & (positions != before + 1)
        group_T = (starts.flatten().cumsum(0) - 1).clamp(min=0)
        return Tokens(valid.flatten(), group_T, observed=self.is_observed)

    def _fit(self, per_token_BS: Tensor | None, shape: torch.Size) -> Tensor | None:
        """`per_token_BS` for the tokens of a layer's input, of leading `shape`; None where these are not known ones."""
        if per_token_BS is None:
            return None
        if len(shape) == 2 and per_token_BS.shape[0] in (1, shape[0]):
            for of_layer in (per_token_BS, self._cut_for_head(per_token_BS)):
                if of_layer.shape[1] == shape[1]:
                    return of_layer.expand(shape)
        elif per_token_BS.numel() == shape.numel():
            return per_token_BS
        _tell_misfit()
        return None

    def _cut_for_head(self, per_token_BS: Tensor) -> Tensor:
        columns = self.head_columns
        if columns is None:
            return per_token_BS
        return per_token_BS[:, -columns:] if isinstance(columns, int) else per_token_BS[:, columns]

    def record(self, path: str, adapter: str, routing: Routing) -> None:
        """Hand a routing to the open trace, once: what is recomputed was seen before."""
        if self.trace is not None:
            self.trace.observations.append(Observation(path, adapter, self.trace.passes, self.with_grad, routing))
            # a loss on the routing alone reaches the pass from here
            mark((routing.probs_TE, routing.logits_TE), self)


def _counts_time_first(mask_BS: Tensor | None, shape: torch.Size) -> bool:
    """Whether a layer's input is [S, B, I], as inside of XLNet and Longformer."""
    return mask_BS is not None and len(shape) == 2 and shape[0] != shape[1] and mask_BS.shape == shape[::-1]


@cache
def _tell_misfit() -> None:
    logger.warning(
        "a layer computes with other tokens than the attention mask or the position ids speak of (chunks, frames, "
        "patches): there, padding counts as real, and limits of capacity hold for all rows of its input together"
    )


class _State(threading.local):
    """The open passes and trace of this thread (autograd recomputes CUDA layers on a thread of its own)."""

    def __init__(self) -> None:
        self.stack: list[Pass] = []
        self.trace: Trace | None = None


_state = _State()


def current() -> Pass | None:
    """The pass being run, None outside of a model's forward."""
    return _state.stack[-1] if _state.stack else None


def current_trace() -> Trace | None:
    """The trace that a pass which begins now belongs to."""
    return _state.trace


def begin(here: Pass) -> None:
    """Make `here` the pass being run."""
    _state.stack.append(here)


def abandon(here: Pass) -> None:
    """Forget a pass that was left without its end, and those that were begun in it."""
    del _state.stack[_state.stack.index(here) :]


def end(here: Pass, output: Any) -> None:
    """The pass being run is over and gave `output`; what outlives it holds no graph."""
    _state.stack.pop()
    here.shared.clear()
    here.joined.clear()
    here.outputs = None
    if here.pooled and output is not None:
        _pool(here)
    mark(output, here)
    if here.trace is not None:
        here.trace.passes += 1
    # the hooks on the outputs keep the pass for a recomputation
    here.trace = None


def _pool(here: Pass) -> None:
    """One collective for all sites of a pass."""
    waiting = [pooled for calls in here.pooled.values() for pooled in calls]
    for pooled, sums in zip(waiting, sum_over_processes([p.sums for p in waiting]), strict=True):
        pooled.gradients = pooled.hear(sums)


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
def replay(seen: Pass) -> Iterator[None]:
    """Run a layer again as in pass `seen`: the same tokens, nothing recorded twice."""
    if seen.again is None:
        seen.again = replace(seen, trace=None, is_replay=True, opened=[], shared={}, joined={}, outputs=None)
    _state.stack.append(seen.again)
    try:
        yield
    finally:
        _state.stack.pop()


@contextmanager
def entered(draws: bool = False) -> Iterator[Pass]:
    """The pass that a layer runs in: the open one, the one that it is recomputed for, or one of its own.

    `draws`: whether the layer is in training and its routes are drawn.
    """
    here, seen = current(), recomputed()
    if here is None and seen is not None:
        with replay(seen):
            assert seen.again is not None
            yield seen.again
    else:
        yield here or Pass(seed=seed_of(draws), serving=current_serving())


class _Backward:
    """The pass whose gradients autograd is working on: it goes through the passes one by one, the latest first."""

    seen: Pass | None = None


def recomputed() -> Pass | None:
    """The pass that a layer called now is recomputed for by activation checkpointing; None outside of backward."""
    is_in_backward = torch._C._current_graph_task_id() != -1
    return _Backward.seen if is_in_backward else None


def _begin_backward(seen: Pass, gradient: Tensor) -> None:
    _Backward.seen = seen


def mark(found: Any, seen: Pass) -> None:
    """Let the first gradient that flows back into a pass through one of the tensors `found` say which pass it is."""
    for tensor in tree_leaves(found):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(partial(_begin_backward, seen))


def seed_of(training: bool) -> int | None:
    """What the routes of a pass that begins now follow from, where routers draw; None where none is drawn."""
    return draw_seed(shared=training) if training or current_serving().draws else None
