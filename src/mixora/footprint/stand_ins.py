"""What a training step on the meta device needs in the place of operators that look at numbers, or at the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_EQUAL_WIDTHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_NARROW_VALUES = torch.ops.aten._scaled_dot_product_efficient_attention


@contextmanager
def stand_ins() -> Iterator[None]:
    """While open, tensors without numbers are taken for rows that are full, and attention is a fused kernel's.

    A model asks its masks and positions whether it may leave masks out: it may. Every label is supervised. On the meta
    device torch would compute attention with all its scores, which no device keeps that has a fused kernel for the
    shapes.
    """
    own = F.scaled_dot_product_attention
    # replaced by name: a mode for functions is off in backward, where checkpointing runs blocks again
    F.scaled_dot_product_attention = _attend
    try:
        with _FullRows():
            yield
    finally:
        F.scaled_dot_product_attention = own


class _FullRows(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is Tensor.nonzero and args[0].is_meta:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        if func is Tensor.__getitem__ and args[0].is_meta and getattr(args[1], "dtype", None) == torch.bool:
            return args[0].flatten(0, args[1].dim() - 1).clone()
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # what the fused kernels add to their scores
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    if query.shape[-1] == value.shape[-1]:
        return _EQUAL_WIDTHS(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return _NARROW_VALUES(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
