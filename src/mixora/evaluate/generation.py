"""Text that the model generates for prompts, in batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixora.bases import count_positions
from mixora.display.stages import Advance
from mixora.errors import DataError
from mixora.evaluate.inference import batch_by_length, inference

# Values under which generation changes no score: set outright, since a model may bring others of its own.
GREEDY = {"num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    do_sample: bool = False,
    advance: Advance | None = None,
    **settings: Any,
) -> list[str]:
    """Continue each prompt until EOS or `max_new_tokens`.

    Decoders' prompts are padded on the left, encoders' on the right, with a mask, so that a prompt gives the same
    text in any batch (up to rounding). The tokenizer's EOS and the model's own end a text.

    Args:
        do_sample: draw from the model's distribution with torch's ambient generator; greedy otherwise.
        settings: further arguments of `model.generate`, for example temperature or num_beams.

    Returns:
        One text per prompt, in order, without prompt and special tokens; white space stays as generated.

    Raises:
        DataError: no prompts, an empty one, `max_new_tokens` under 1, no EOS token, or more tokens than the model has
            positions for.
    """
    _check_prompts(prompts, max_new_tokens)
    _check_positions(model, prompts, max_new_tokens)
    ends = end_ids(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    options = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "pad_token_id": padding, "eos_token_id": ends}
    options |= ({} if do_sample else GREEDY) | settings
    left, texts = not model.config.is_encoder_decoder, [""] * len(prompts)
    with inference(model) as device:
        for batch in batch_by_length([len(prompt) for prompt in prompts], batch_size, advance):
            ids, mask = pad_prompts([prompts[row] for row in batch], padding, left=left)
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
            new = output[:, ids.shape[1] :] if left else output
            for row, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[row] = text
    return texts


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    empty = [number for number, prompt in enumerate(prompts, 1) if not len(prompt)]
    if empty:
        raise DataError(f"prompt {empty[0]} has no tokens; valid: one or more")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens: got {max_new_tokens}; valid: 1 or more")


def _check_positions(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """The last token of an answer is not read, and an encoder-decoder's answer begins with a token of its own."""
    most, longest = count_positions(model), max(map(len, prompts), default=0)
    are_apart = model.config.is_encoder_decoder
    needed = max(longest, max_new_tokens) if are_apart else longest + max_new_tokens - 1
    if most is not None and needed > most:
        valid = f"{most} each" if are_apart else f"{most + 1} together"
        raise DataError(
            f"the longest prompt has and max_new_tokens allows {longest} and {max_new_tokens} tokens; "
            f"valid for this model: at most {valid}"
        )


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and the model's own. `DataError` where there is none."""
    own = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    known = sorted({i for i in ids if i is not None})
    if not known:
        raise DataError("neither the tokenizer nor the model names an EOS token, so an answer would have no end")
    return known


def pad_prompts(prompts: Sequence[Sequence[int]], padding: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` (1 for real tokens), both int64 [batch, length]."""
    length = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        filler, ones = [padding] * (length - len(prompt)), [1] * len(prompt)
        ids.append([*filler, *prompt] if left else [*prompt, *filler])
        mask.append([0] * len(filler) + ones if left else ones + [0] * len(filler))
    return torch.tensor(ids), torch.tensor(mask)
