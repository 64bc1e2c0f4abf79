"""Batches of tensors from encoded rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixora.data.encoding import IGNORED
from mixora.data.prompts import ModelKind
from mixora.errors import DataError

Features = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Pads encoded rows on the right; serves as the `data_collator` of a transformers Trainer.

    Padded rows give int64 tensors `input_ids`, `attention_mask` (1 for real tokens, whatever the padding id), perhaps
    `token_type_ids`, all [batch, length], and `labels`: [batch, length] padded with -100, or [batch] int64 or float32.

    Packed rows (those with `position_ids`) are laid end to end in one row, [1, total], without an attention mask:
    models tell the rows of a bin apart by position ids only where no mask is given, and flash attention only in a
    batch of one row. Padding to a multiple adds tokens at position 0, one sequence each, so a token at position 0
    that no position 1 follows is padding (every real row has two tokens or more).
    """

    tokenizer: PreTrainedTokenizerBase
    model_kind: ModelKind
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise DataError(f"pad_to_multiple_of: got {self.pad_to_multiple_of}; valid: 1 or more, or none")

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """Tensors of `features`, rows of an `Encoded.dataset`; `DataError` for a tokenizer without PAD and EOS."""
        if "position_ids" in features[0]:
            return self._lay_end_to_end(features)
        batch = {"input_ids": self._pad(features, "input_ids", self._padding_id())}
        lengths = torch.tensor([len(f["input_ids"]) for f in features])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        if "token_type_ids" in features[0]:
            batch["token_type_ids"] = self._pad(features, "token_type_ids", 0)
        if "labels" in features[0]:
            batch["labels"] = self._labels(features)
        return batch

    def _padding_id(self) -> int:
        known = [i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None]
        if not known:
            raise DataError("the tokenizer has neither a PAD nor an EOS token to fill batches with")
        return known[0]

    def _labels(self, features: Features) -> Tensor:
        first = features[0]["labels"]
        if isinstance(first, float):
            return torch.tensor([f["labels"] for f in features], dtype=torch.float32)
        if isinstance(first, int):
            return torch.tensor([f["labels"] for f in features])
        return self._pad(features, "labels", IGNORED)

    def _pad(self, features: Features, name: str, filler: int) -> Tensor:
        length = self._rounded(max(len(f[name]) for f in features))
        return torch.tensor([[*f[name], *[filler] * (length - len(f[name]))] for f in features])

    def _lay_end_to_end(self, features: Features) -> dict[str, Tensor]:
        fillers = {"input_ids": self._padding_id(), "labels": IGNORED, "position_ids": 0}
        joined = {name: list(chain.from_iterable(f[name] for f in features)) for name in fillers}
        return {name: self._pad([joined], name, filler) for name, filler in fillers.items()}

    def _rounded(self, length: int) -> int:
        step = self.pad_to_multiple_of or 1
        return -(-length // step) * step
