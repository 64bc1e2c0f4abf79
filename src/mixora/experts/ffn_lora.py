"""LoRA experts that are whole feed-forward parts (MixLoRA, arXiv 2404.15159).

FFN_e(x) = W2_e (act(W1_e x) * W3_e x),  W_e = W + s B_e A_e;  y = sum_{e in route(x)} w_e FFN_e(x)
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mixora.contracts import Kernel, Parameters, SpanningExpert
from mixora.experts.lora import Lora, LoraConfig
from mixora.routing import Routing


class FfnLoraConfig(LoraConfig):
    """As for LoRA experts; `rank` is that of one expert in each linear of the feed-forward part.

    Each chosen expert of a token draws its own dropout.
    """

    kind: Literal["ffn_lora"] = "ffn_lora"  # type: ignore[assignment]  # the tag that tells the two apart


class FfnLora(Lora, SpanningExpert):
    """Parameters A [R, I] and B [R, O] per linear; the hidden of a token is computed once for each of its experts."""

    Config = FfnLoraConfig
    joins = False
    spans_ffn = True

    def enter(self, x_TI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """w_e B_e A_e dropout(x); without dropout a token has one A x for all of its slots."""
        if training and self.config.dropout:
            x_SI = torch.cat([x_TI] * routing.experts_TK.shape[1])
            return self.delta(x_SI, parameters, routing.by_slot(), kernel, training)
        slots = kernel.by_slot(kernel.expand(x_TI, parameters["A"], routing), routing)
        return kernel.contract(slots, parameters["B"], routing.by_slot())

    def leave(self, x_SI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """sum_e w_e B_e A_e dropout(slot of e), the sum before B."""
        x_SI = F.dropout(x_SI, self.config.dropout, training)
        slots = kernel.expand(x_SI, parameters["A"], routing.by_slot())
        return kernel.contract(kernel.by_token(slots, routing), parameters["B"], routing)
