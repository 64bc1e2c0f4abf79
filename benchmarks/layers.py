"""Time and memory of single layers and of AdaMix's step, each against what it is to be compared with.

A layer is the feed-forward module of SmolLM2-135M with random weights, 1024 tokens, forward and backward, the gradient
of its input among those that are made.

- `pesc`: the recipe's experts behind the module, against one adapter as wide as what a token uses.
- `mixlora`: the recipe's experts in the module's linears, against the order of operations in which the last frozen
  linear runs for every chosen expert and the results are summed: expert by expert, and for all slots at once.
- `adamix-lora`: two passes that are compared, against two plain forwards: ordinary logits, cross entropy of the first,
  both divergences written out, one backward; and against two passes with the task's own loss, not compared.
"""

import argparse
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import mixora
from benchmarks import measuring
from benchmarks.kernels import Case
from benchmarks.measuring import Step, compare_memory, tabulate
from benchmarks.running import DTYPES, run
from benchmarks.training_step import fill, make_base, make_batch
from mixora.recipes import read_recipe

WIDTH, INNER, TOKENS = 576, 1536, 1024
EXPERTS, TOP_K = 8, 2
BALANCE = {"load_balance": {"coefficient": 0.01}}


class Model(nn.Module):
    """One layer where a model has it, so that rules find it."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: layer})])
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0][self.name](x)


def make_mlp(dtype: torch.dtype) -> Model:
    """Llama's feed-forward module, the same weights each time."""
    torch.manual_seed(0)
    return Model("mlp", LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER))).to(dtype)


def take_rule(recipe: str, name: str, router: dict[str, Any] | None = None, **of_expert: Any) -> dict[str, Any]:
    """A rule of a recipe, without dropout."""
    rule = read_recipe(recipe).rules[name].model_dump(mode="json")
    changes = {"dropout": 0.0, **of_expert}
    return {**rule, "expert": {**rule["expert"], **changes}, "router": router or rule["router"]}


def adapt(base: nn.Module, rule: dict[str, Any], losses: dict[str, Any] | None = None) -> Any:
    return fill(peft.get_peft_model(base, mixora.MixoraConfig(rules={"layer": rule}, losses=losses or {})))


def make_step(model: nn.Module, x_BTI: Tensor) -> Step:
    """Forward and backward with the gradients of the input and of all that is trained."""
    leaves = [x_BTI.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    with torch.no_grad():
        dy_BTO = torch.randn(model(x_BTI).shape, generator=torch.Generator().manual_seed(2)).to(x_BTI.dtype)
    return lambda: torch.autograd.grad(model(x_BTI), leaves, dy_BTO)


def draw_input(dtype: torch.dtype, tokens: int = TOKENS) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def pesc_steps(rank: int, dtype: torch.dtype) -> dict[str, Step]:
    """PESC's layer, and one adapter of the width that its chosen experts have together."""
    experts = adapt(make_mlp(dtype), take_rule("pesc", "ffn", rank=rank), BALANCE)
    single = adapt(make_mlp(dtype), take_rule("pesc", "ffn", {"kind": "single"}, rank=TOP_K * rank))
    return {name: make_step(model, draw_input(dtype)) for name, model in (("mixora", experts), ("adapter", single))}


class LateSum(nn.Module):
    """MixLoRA as its authors' code orders it, with the weighted sum after the last linear; our tensors' memory is used.

    `at_once`: frozen linears and experts' hidden for all slots together, else expert by expert.
    """

    def __init__(self, ours: Any, at_once: bool) -> None:
        super().__init__()
        mlp = ours.get_base_model().layers[0]["mlp"]
        linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.frozen = nn.ModuleList(linear.base_layer for linear in linears)
        self.scale = linears[0].parts["default"].expert.scale(linears[0].parts["default"].shape)
        tensors = [{kind: t.detach() for kind, t in linear.parameters_of("default").items()} for linear in linears]
        self.downs = nn.ParameterList(nn.Parameter(t["A"].unflatten(0, (EXPERTS, -1))) for t in tensors)
        self.ups = nn.ParameterList(nn.Parameter(t["B"].unflatten(0, (EXPERTS, -1))) for t in tensors)
        self.router = nn.Parameter(tensors[0]["router"].clone())
        self.at_once = at_once

    def forward(self, x_BTI: Tensor) -> Tensor:
        x_TI = x_BTI.flatten(0, 1)
        wide = torch.promote_types(x_TI.dtype, torch.float32)
        probs_TE = F.linear(x_TI.to(wide), self.router.to(wide)).softmax(dim=-1)
        weights_TK, experts_TK = probs_TE.topk(TOP_K, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(x_TI.dtype)
        gate_TF, up_TF = self.frozen[0](x_TI), self.frozen[1](x_TI)
        if self.at_once:
            return self._compute_at_once(x_TI, gate_TF, up_TF, weights_TK, experts_TK).view_as(x_BTI)
        y_TO = torch.zeros_like(x_TI)
        for expert in range(EXPERTS):
            token_n, choice_n = (experts_TK == expert).nonzero(as_tuple=True)
            y_nO = self._compute(expert, x_TI[token_n], gate_TF[token_n], up_TF[token_n])
            y_TO = y_TO.index_add(0, token_n, weights_TK[token_n, choice_n, None] * y_nO)
        return y_TO.view_as(x_BTI)

    def _add(self, linear: int, expert: int, x_nI: Tensor) -> Tensor:
        down_rI, up_rO = (rows[linear][expert].to(x_nI.dtype) for rows in (self.downs, self.ups))
        return self.scale * (F.linear(x_nI, down_rI) @ up_rO)

    def _compute(self, expert: int, x_nI: Tensor, gate_nF: Tensor, up_nF: Tensor) -> Tensor:
        """One expert on its own tokens."""
        hidden_nF = F.silu(gate_nF + self._add(0, expert, x_nI)) * (up_nF + self._add(1, expert, x_nI))
        return self.frozen[2](hidden_nF) + self._add(2, expert, hidden_nF)

    def _compute_at_once(self, x_TI: Tensor, gate_TF: Tensor, up_TF: Tensor, *choice: Tensor) -> Tensor:
        """All experts as one wide adapter with a mask, on choice after choice."""
        weights_TK, experts_TK = choice
        mask_SE = F.one_hot(experts_TK.T.flatten(), EXPERTS).to(x_TI.dtype)

        def add(linear: int, x_SI: Tensor) -> Tensor:
            mask_SR = mask_SE.repeat_interleave(self.downs[linear].shape[1], dim=1)
            down_RI, up_RO = (rows[linear].flatten(0, 1).to(x_SI.dtype) for rows in (self.downs, self.ups))
            return self.scale * ((F.linear(x_SI, down_RI) * mask_SR) @ up_RO)

        x_SI = x_TI.repeat(TOP_K, 1)
        hidden_SF = F.silu(gate_TF.repeat(TOP_K, 1) + add(0, x_SI)) * (up_TF.repeat(TOP_K, 1) + add(1, x_SI))
        y_KTO = (self.frozen[2](hidden_SF) + add(2, hidden_SF)).unflatten(0, (TOP_K, -1))
        return (weights_TK.T[..., None] * y_KTO).sum(dim=0)


def mixlora_models(rank: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Ours, and the two references, which compute the same."""
    ours = adapt(make_mlp(dtype), take_rule("mixlora", "ffn", rank=rank, alpha=2 * rank))
    late = {"late sum, by expert": LateSum(ours, at_once=False), "late sum, at once": LateSum(ours, at_once=True)}
    return {"mixora": ours, **late}


def mixlora_steps(rank: int, dtype: torch.dtype) -> dict[str, Step]:
    return {name: make_step(model, draw_input(dtype)) for name, model in mixlora_models(rank, dtype).items()}


def adamix_steps(
    layers: int, dtype: torch.dtype, device: str = "cpu", make_base: Any = make_base, batch: Any = None
) -> dict[str, Step]:
    """A step with the consistency loss, the same by hand, and two passes with the task's loss alone, not fused."""
    batch = batch or make_batch(device)

    def adapt_all(**changes: Any) -> Any:
        config = mixora.recipe("adamix-lora", task_type="CAUSAL_LM", **changes)
        return fill(peft.get_peft_model(make_base(layers, dtype, device), config))

    ours, plain = adapt_all(), adapt_all(**{"losses.consistency.coefficient": 0.0})

    def run(model: Any, fused: bool, times: int) -> object:
        model.zero_grad(set_to_none=True)
        for _ in range(times):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, _ = mixora.compute_loss(model, batch, fused_loss=fused)
            loss.backward()
        return loss.item()

    def run_by_hand() -> object:
        plain.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            p, q = (plain(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1).float() for _ in range(2))
            task = F.cross_entropy(p, batch["labels"][:, 1:].flatten())
            loss = task + (_divergence(p, q.detach()) + _divergence(q, p.detach())) / 2
        loss.backward()
        return loss.item()

    return {
        "mixora": lambda: run(ours, True, 1),
        "two plain forwards": run_by_hand,
        "two passes": lambda: run(plain, False, 2),
        "mixora, loss not fused": lambda: run(ours, False, 1),
    }


def _divergence(from_NC: Tensor, of_NC: Tensor) -> Tensor:
    """KL(of || from), the mean over tokens, as one writes it."""
    return F.kl_div(F.log_softmax(from_NC, dim=-1), F.softmax(of_NC, dim=-1), reduction="batchmean")


def make_linear(case: Case) -> tuple[Any, Tensor]:
    """One linear with experts and a router, kernel `auto`, and its input; `skewed`: expert 0 serves every token."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    expert = {"kind": "lora", "rank": case.rank}
    router = {"kind": "topk", "num_experts": case.experts, "top_k": case.top_k, "renormalise": True}
    base = Model("linear", nn.Linear(case.width, case.width, bias=False)).to(dtype)
    model = adapt(base, {"targets": ["linear"], "expert": expert, "router": router}, BALANCE)
    x_BTI = draw_input(dtype, case.tokens)
    if case.skewed:
        # a feature that all tokens have, by which the router finds expert 0; with more than this, the other choice's
        # weight would be a denormal number, with which a CPU is slow
        x_BTI[..., 0] = 1
        with torch.no_grad():
            model.get_base_model().layers[0]["linear"].parameters_of("default")["router"][0, 0] = 10
    return model, x_BTI


def compare(
    label: str, steps: dict[str, Step], repeats: int, device: str = "cpu", **facts: Any
) -> list[dict[str, Any]]:
    """Time and memory of each, with the ratios to the second, which is what ours is compared with."""
    yardstick = list(steps)[1]
    times = measuring.compare(steps, yardstick, repeats, device)
    peaks = compare_memory(steps, yardstick, device=device)
    found = {name: {**times[name], **peaks[name]} for name in steps}
    return tabulate(found, layer=label, **facts)


def measure(dtype: torch.dtype, layers: int, repeats: int) -> list[dict[str, Any]]:
    rows = [row for rank in (64, 512) for row in compare("pesc", pesc_steps(rank, dtype), repeats, rank=rank)]
    rows += compare("mixlora", mixlora_steps(8, dtype), repeats, rank=8)
    return rows + compare("adamix-lora", adamix_steps(layers, dtype), max(repeats // 3, 1), layers=layers)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--layers", type=int, default=4, help="of the model that AdaMix trains")
    parser.add_argument("--repeats", type=int, default=25)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    rows = measure(getattr(torch, options.dtype), options.layers, options.repeats)
    return {"dtype": options.dtype, "rows": rows}


def draw(found: dict[str, Any]) -> Any:
    from benchmarks.plotting import draw_ratios

    title = f"Single layers, and AdaMix's step, {found['dtype']}"
    return draw_ratios(found["rows"], ("layer", "rank", "layers"), title, "time / the row at 1.00")


if __name__ == "__main__":
    run("layers")
