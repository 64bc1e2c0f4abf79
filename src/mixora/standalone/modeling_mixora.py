"""A language model of transformers with the adapters of a mixture, written by mixora; needs transformers alone.

    beside a linear module:         y = f(x) + s * sum_e w_e U_e D_e x
    behind a module of any kind:    y = f(x) + s * sum_e w_e (U_e gelu(D_e f(x) + b_e) + c_e)

with w the softmax of W x in fp32, its K largest entries, divided by their sum where `renormalise` says so; or without
W the one expert of each site. Everything else is the code of the base model in transformers. It is for inference:
padding is routed like any token, which no other token notices, and there are no losses.

SPDX-License-Identifier: Apache-2.0
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseModel


class MixoraConfig(BaseConfig):
    """The base's configuration; `mixora_sites` holds the settings of an `Adapter` for each adapted module, by path."""

    model_type = "mixora"
    mixora_sites: dict[str, Any] | None = None


class Adapter(nn.Module):
    """The experts of one module and their router. Rows of all experts, R in sum, lie below each other.

    down [R, what experts read], up [R, out], router [E, in] in fp32; down_bias [R] and up_bias [E, out] where they are.
    """

    def __init__(
        self,
        is_behind: bool,
        in_features: int,
        out_features: int,
        ranks: list[int],
        top_k: int,
        renormalise: bool,
        scale: float,
        has_biases: bool,
    ) -> None:
        super().__init__()
        self.is_behind, self.ranks, self.scale = is_behind, ranks, scale
        self.top_k, self.renormalise = top_k, renormalise
        read = out_features if is_behind else in_features
        self.down = nn.Parameter(torch.empty(sum(ranks), read))
        self.up = nn.Parameter(torch.empty(sum(ranks), out_features))
        self.down_bias = nn.Parameter(torch.empty(sum(ranks))) if has_biases else None
        self.up_bias = nn.Parameter(torch.empty(len(ranks), out_features)) if has_biases else None
        self.router = nn.Parameter(torch.empty(len(ranks), in_features, dtype=torch.float32)) if top_k else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y`, what the module gives for `x`, with what the experts add."""
        read_TI = (y if self.is_behind else x).reshape(-1, self.down.shape[1])
        y_TO = y.reshape(-1, y.shape[-1])
        if self.router is None:
            y_TO = torch.addmm(y_TO, self._expand(read_TI, slice(None)) * self.scale, self.up)
            return (y_TO if self.up_bias is None else y_TO + self.scale * self.up_bias).reshape(y.shape)
        weights_TK, experts_TK = self._route(x.reshape(-1, x.shape[-1]))
        delta_TO, start = torch.zeros_like(y_TO), 0
        for expert, rank in enumerate(self.ranks):
            rows = slice(start, start := start + rank)
            token_n, slot_n = (experts_TK == expert).nonzero(as_tuple=True)
            weights_n1 = (weights_TK[token_n, slot_n] * self.scale).to(y.dtype)[:, None]
            added_nO = (self._expand(read_TI[token_n], rows) * weights_n1) @ self.up[rows]
            if self.up_bias is not None:
                added_nO = added_nO + weights_n1 * self.up_bias[expert]
            delta_TO.index_add_(0, token_n, added_nO)
        return (y_TO + delta_TO).reshape(y.shape)

    def _route(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        assert self.router is not None
        probs_TE = F.linear(x_TI.float(), self.router.float()).softmax(dim=-1)
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK, experts_TK

    def _expand(self, x_nI: Tensor, rows: slice) -> Tensor:
        hidden_nr = F.linear(x_nI, self.down[rows], None if self.down_bias is None else self.down_bias[rows])
        return F.gelu(hidden_nr) if self.is_behind else hidden_nr


def _adapt(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    adapter: Any = module.mixora_adapter
    if isinstance(output, tuple):
        return adapter(args[0], output[0]), *output[1:]
    return adapter(args[0], output)


class MixoraForCausalLM(BaseModel):
    """The base's own class; its adapted modules hold an `Adapter` each, which a hook adds to what they give."""

    config_class = MixoraConfig
    # routers decide in fp32, whatever the others compute in
    _keep_in_fp32_modules_strict = {"mixora_adapter.router"}

    def __init__(self, config: MixoraConfig) -> None:
        super().__init__(config)
        for path, settings in (config.mixora_sites or {}).items():
            module = self.get_submodule(path)
            module.mixora_adapter = Adapter(**settings)
            module.register_forward_hook(_adapt)
