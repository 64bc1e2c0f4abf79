"""Several texts in one cache of keys and values, which any of them may enter or leave between two tokens.

Rows are padded on the left: the newest token of each stands in the last column, a mask says which columns are a row's
own, and positions count those. So a row computes what it would alone, up to the rounding of products of other sizes.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mixora.errors import ModelError

KNOWN_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass
class CachedRows:
    """B rows of S columns. mask_BS: int64, 1 on a row's own tokens."""

    cache: DynamicCache
    mask_BS: Tensor

    def __len__(self) -> int:
        return self.mask_BS.shape[0]

    def join(self, others: "CachedRows") -> None:
        """Put `others` below; their cache must not be used any more."""
        width = max(self.mask_BS.shape[1], others.mask_BS.shape[1])
        for ours, theirs in zip(self.cache.layers, others.cache.layers, strict=True):
            ours.keys = torch.cat([_widen_states(layer.keys, width) for layer in (ours, theirs)])
            ours.values = torch.cat([_widen_states(layer.values, width) for layer in (ours, theirs)])
        self.mask_BS = torch.cat([_widen_mask(rows.mask_BS, width) for rows in (self, others)])

    def keep(self, places: Sequence[int]) -> None:
        """Leave the rows at `places` alone in the cache, and no column that is padding to all of them."""
        index = torch.tensor(places, device=self.mask_BS.device)
        self.mask_BS = self.mask_BS[index]
        begin = int(self.mask_BS.any(dim=0).int().argmax())
        self.mask_BS = self.mask_BS[:, begin:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[index, :, begin:], layer.values[index, :, begin:]


class Decoder:
    """A causal language model that reads rows; `device` is where it stands.

    Raises `ModelError` for one whose state between two tokens is more than keys and values.
    """

    def __init__(self, model: Any, padding: int) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        unknown = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - KNOWN_ATTENTION)
        if unknown or base.config.is_encoder_decoder:
            found = unknown[0] if unknown else "an encoder"
            raise ModelError(
                f"{config.model_type}: has {found}, whose state rows of a batch cannot share; valid: a decoder with "
                "full or sliding attention"
            )
        accepted = inspect.signature(base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._model, self._padding = model, padding
        self.device = next(base.parameters()).device
        self._check_cache()

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[CachedRows, Tensor]:
        """Read prompts: rows of their own, and the logits [B, V] of the token after each."""
        width = max(map(len, prompts))
        ids = [[self._padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        rows = CachedRows(DynamicCache(), torch.tensor(mask, device=self.device))
        positions_BS = (rows.mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        return rows, self._run(torch.tensor(ids, device=self.device), positions_BS, rows)

    def advance(self, rows: CachedRows, tokens: Sequence[int]) -> Tensor:
        """Read one token for each row: the logits [B, V] of the next."""
        positions_B1 = rows.mask_BS.sum(dim=1, keepdim=True)
        rows.mask_BS = F.pad(rows.mask_BS, (0, 1), value=1)
        return self._run(torch.tensor(tokens, device=self.device).unsqueeze(1), positions_B1, rows)

    def _run(self, ids_BN: Tensor, positions_BN: Tensor, rows: CachedRows) -> Tensor:
        given = {"input_ids": ids_BN, "attention_mask": rows.mask_BS, "past_key_values": rows.cache, "use_cache": True}
        if self._takes_positions:
            given["position_ids"] = positions_BN
        with torch.no_grad():
            return self._model(**given, **self._options).logits[:, -1]

    def _check_cache(self) -> None:
        rows, _ = self.begin([[self._padding, self._padding]])
        layers = list(rows.cache.layers)
        if not layers or any(type(layer) is not DynamicLayer or layer.get_seq_length() != 2 for layer in layers):
            raise ModelError("the model keeps no keys and values of all layers between two tokens, so it cannot answer")


def _widen_states(states_BHSD: Tensor, width: int) -> Tensor:
    return F.pad(states_BHSD, (0, 0, width - states_BHSD.shape[2], 0))


def _widen_mask(mask_BS: Tensor, width: int) -> Tensor:
    return F.pad(mask_BS, (width - mask_BS.shape[1], 0))
