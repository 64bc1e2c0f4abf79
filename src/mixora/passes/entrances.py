"""Hooks at the entrances of a model: what a layer cannot see in its input is read here, once for each pass."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from mixora.passes.forward import Pass, Stream, abandon, begin, current, current_trace, end, seed_of
from mixora.routing.draws import current_serving

_kept: WeakKeyDictionary[Cache, dict[str, Any]] = WeakKeyDictionary()


def expect_draws(model: nn.Module) -> None:
    """Have every pass that begins at an entrance of `model` draw what its routes follow from."""
    for entrance in _entrances(model):
        entrance._mixora_draws = True  # type: ignore[assignment]


@contextmanager
def followed_by(model: nn.Module, then: Callable[..., Any]) -> Iterator[None]:
    """Hand each output of `model` to `then(model, args, kwargs, output)` while open; it gives what takes its place.

    It is called when the pass is over, and may call the model: these calls are not followed by another.
    """
    is_busy = False

    def follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal is_busy
        if is_busy:
            return output
        is_busy = True
        try:
            return then(module, args, kwargs, output)
        finally:
            is_busy = False

    handle = model.register_forward_hook(follow, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def install(model: nn.Module) -> list[Any]:
    """Hook the entrances of `model`; returns the handles that remove the hooks."""
    handles, entrances = [], _entrances(model)
    for entrance in entrances:
        inside = set(entrance.modules()) - {entrance}
        entrance._mixora_entrances = entrances  # type: ignore[assignment]
        entrance._mixora_entrances_inside = [e for e in entrances if e in inside]  # type: ignore[assignment]
        handles.append(entrance.register_forward_pre_hook(_enter, with_kwargs=True))
        handles.append(entrance.register_forward_hook(_leave, with_kwargs=True, always_call=True))
    return handles


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The modules a forward pass can begin at: a model, its backbone, and every model inside of it.

    Such as the halves of an encoder-decoder, or the tower for images, which `generate` calls by itself. A module around
    models of transformers, which may name its inputs as it likes, is entered at each of these.
    """
    inner = [] if isinstance(model, PreTrainedModel) else _outermost_models(model)
    if inner:
        return [entrance for each in inner for entrance in _entrances(each)]
    found = [model, getattr(model, getattr(model, "base_model_prefix", "") or "-", None)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found += [model.get_encoder(), model.get_decoder()]  # type: ignore[operator]
    found += [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list(dict.fromkeys(m for m in found if isinstance(m, nn.Module)))


def _outermost_models(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, PreTrainedModel):
        return [module]
    return list(dict.fromkeys(model for child in module.children() for model in _outermost_models(child)))


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    here = _open_pass(module)
    if here is None:
        here = _read_pass(module, _named(module, args, kwargs))
        begin(here)
    here.opened.append(module)


def _open_pass(module: nn.Module) -> Pass | None:
    """The pass that an entrance is called in; None where one begins.

    A pass which this call cannot be a part of was interrupted: after a `KeyboardInterrupt`, torch calls no hook.
    """
    while (here := current()) is not None and not here.is_replay:
        outer = here.opened[-1] if here.opened else module
        if module in outer._mixora_entrances_inside:  # type: ignore[operator]
            return here
        if module not in outer._mixora_entrances:  # type: ignore[operator]
            # another model, called by this one
            return None
        abandon(here)
    return here


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    here = current()
    if here is None:
        return
    here.opened.pop()
    if not here.opened and not here.is_replay:
        end(here, output)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def _read_pass(module: nn.Module, inputs: dict[str, Any]) -> Pass:
    trace = current_trace()
    seed = seed_of(module.training) if getattr(module, "_mixora_draws", False) else None
    here = Pass(
        trace=trace,
        is_observed=trace is not None,
        owns_losses=trace is not None and trace.owns_losses,
        with_grad=torch.is_grad_enabled(),
        seed=seed,
        serving=current_serving(),
        kept=_kept_for(inputs.get("past_key_values")) if seed is None else None,
    )
    length, before = _length_of(inputs, "input_ids", "inputs_embeds"), _length_before(inputs.get("past_key_values"))
    kept = inputs.get("logits_to_keep")
    here.head_columns = kept if isinstance(kept, Tensor) or kept else None
    if inputs.get("encoder_hidden_states") is not None:
        # a decoder called by itself
        _put(here.mask_BS, "source", inputs.get("encoder_attention_mask"), torch.bool)
        _put(here.mask_BS, "target", inputs.get("attention_mask"), torch.bool, length, before)
        return here
    _put(here.positions_BS, "source", inputs.get("position_ids"), None, length)
    mask_BS = inputs.get("attention_mask")
    if mask_BS is None and module.training and "source" in here.positions_BS:
        mask_BS = _mask_of_packed(here.positions_BS["source"])
    _put(here.mask_BS, "source", mask_BS, torch.bool, length, before)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        length = _length_of(inputs, "decoder_input_ids", "decoder_inputs_embeds")
        _put(here.mask_BS, "target", _target_mask(inputs), torch.bool, length, before)
    return here


def _length_of(inputs: dict[str, Any], *names: str) -> int | None:
    """How many tokens of each row come in, where that is said."""
    given = next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor)), None)
    return None if given is None or given.dim() < 2 else given.shape[1]


def _mask_of_packed(positions_BS: Tensor) -> Tensor:
    """Real tokens of packed sequences, which come without a mask: what fills a row up stands at positions 0.

    So does a last sequence of one token; in training nothing follows from it, since it has no next token.
    """
    is_tail_BS = positions_BS.flip(1).cumsum(1).flip(1) == 0
    return ~is_tail_BS | ~positions_BS.any(dim=1, keepdim=True)


def _kept_for(cache: Any) -> dict[str, Any] | None:
    """What passes keep for each other as long as `cache`, a `transformers.Cache`, lives."""
    return _kept.setdefault(cache, {}) if isinstance(cache, Cache) and not torch.compiler.is_compiling() else None


def _length_before(cache: Any) -> int | Tensor | None:
    """How many tokens a cache of fixed size holds, behind which a mask may go on; None of other caches."""
    try:
        return cache.get_seq_length() if isinstance(cache, Cache) and cache.is_compileable else None
    except ValueError:
        # a state that holds no tokens
        return None


def _put(
    into: dict[Stream, Tensor],
    stream: Stream,
    value: Any,
    dtype: torch.dtype | None,
    length: int | None = None,
    before: int | Tensor | None = None,
) -> None:
    """With a cache, a mask speaks of earlier tokens too; the `length` after those `before`, or the last, come in."""
    if isinstance(value, Mapping):
        # one for each kind of layer; on padding they agree, and all keys stand in the one that sees all
        value = value.get("full_attention", next(iter(value.values()), None))
    if isinstance(value, Tensor) and value.dim() == 4 and dtype is torch.bool and value.shape[2] == length:
        value, before = _sees_itself(value, before), None
    if isinstance(value, Tensor) and value.dim() == 2:
        if length is not None and before is not None and value.shape[1] > length:
            columns = torch.arange(length, device=value.device) + torch.as_tensor(before, device=value.device)
            value = value[:, columns.clamp(max=value.shape[1] - 1)]
        elif length is not None:
            value = value[:, -length:]
        into[stream] = value if dtype is None else value.to(dtype)


def _sees_itself(mask_B1SK: Tensor, before: int | Tensor | None) -> Tensor:
    """Real tokens, by what each query sees of the keys (as bool, or as what is added to scores): padding sees no token.

    `generate` with a cache of fixed size hands on such a mask in place of one of tokens: [B, S].
    """
    length, keys = mask_B1SK.shape[2:]
    queries = torch.arange(length, device=mask_B1SK.device)
    own = queries + torch.as_tensor(keys - length if before is None else before, device=queries.device)
    seen_BS = mask_B1SK[:, 0, queries, own.clamp(max=keys - 1)]
    return seen_BS == 0 if seen_BS.is_floating_point() else seen_BS.bool()


def _target_mask(inputs: dict[str, Any]) -> Tensor | None:
    """Real tokens of the decoder's input; without a mask they follow from the labels, which it gets shifted by one."""
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if mask is not None or labels is None or inputs.get("decoder_input_ids") is not None or labels.dim() != 2:
        return mask
    is_label = labels != -100
    reads_real = torch.cat([torch.ones_like(is_label[:, :1]), is_label[:, :-1]], dim=1)
    # behind the last label a row has ended: its unpadded form has no such position
    is_before_end = is_label.flip(1).cummax(dim=1).values.flip(1)
    return reads_real & is_before_end
