"""LoRA experts that are whole feed-forward parts (MixLoRA, arXiv 2404.15159).

FFN_e(x) = W2_e (act(W1_e x) * W3_e x),  W_e = W + s B_e A_e;  y = sum_{e in route(x)} w_e FFN_e(x)
"""

from typing import Literal

from mixora.experts.lora import Lora, LoraConfig


class FfnLoraConfig(LoraConfig):
    """As for LoRA experts; `rank` is that of one expert in each linear of the feed-forward part.

    Each chosen expert of a token draws its own dropout.
    """

    kind: Literal["ffn_lora"] = "ffn_lora"  # type: ignore[assignment]  # the tag that tells the two apart


class FfnLora(Lora):
    """Parameters A [R, I] and B [R, O] per linear; the hidden of a token is computed once for each of its experts."""

    Config = FfnLoraConfig
    joins = False
    spans_ffn = True
