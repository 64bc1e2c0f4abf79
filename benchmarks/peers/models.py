"""Training steps of other libraries and of mixora, each built in an environment of its own.

All on the same frozen Llama and the same batch; 8 experts of rank 8 in all seven linears of a block, of which 2 serve a
token, where a library lets one choose. What a library forces otherwise stands in the note of its row.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Step
from benchmarks.training_step import (
    LINEARS,
    compute_mixture_loss,
    fill,
    make_base,
    make_batch,
    make_lora,
    make_mixture,
    make_step,
)

EXPERTS, RANK, TOP_K = 8, 8, 2
Build = Callable[[int, torch.dtype], Step]


def build_lora(layers: int, dtype: torch.dtype) -> Step:
    return make_step(make_lora(make_base(layers, dtype)), dtype)


def build_mola(layers: int, dtype: torch.dtype) -> Step:
    return make_step(make_mixture(make_base(layers, dtype)), dtype, compute_loss=compute_mixture_loss)


def build_mixlora(layers: int, dtype: torch.dtype) -> Step:
    from peft import get_peft_model

    import mixora

    settings = {"num_experts": EXPERTS, "top_k": TOP_K, "rank": RANK, "alpha": 2 * RANK, "dropout": 0.0}
    model = fill(get_peft_model(make_base(layers, dtype), mixora.recipe("mixlora", task_type="CAUSAL_LM", **settings)))
    return make_step(model, dtype, compute_loss=compute_mixture_loss)


def save_loras(base: Any, folder: str) -> list[str]:
    """As many adapters on disk as there are experts."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for expert in range(EXPERTS):
        torch.manual_seed(expert)
        fill(model).save_pretrained(Path(folder) / str(expert))
    model.unload()
    return [str(Path(folder) / str(expert)) for expert in range(EXPERTS)]


def build_xlora(layers: int, dtype: torch.dtype) -> Step:
    from peft import XLoraConfig, get_peft_model

    base = make_base(layers, dtype)
    with tempfile.TemporaryDirectory() as folder:
        # PEFT finds adapters by these names alone
        adapters = {str(n): path for n, path in enumerate(save_loras(base, folder))}
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters, layerwise_scalings=True
        )
        return make_step(get_peft_model(base, config).train(), dtype)


def build_arrow(layers: int, dtype: torch.dtype) -> Step:
    from peft import ArrowConfig, create_arrow_model

    base = make_base(layers, dtype)
    with tempfile.TemporaryDirectory() as folder:
        model = create_arrow_model(base, save_loras(base, folder), arrow_config=ArrowConfig(top_k=TOP_K))
    for name, parameter in model.named_parameters():
        # the method itself trains nothing
        parameter.requires_grad_("lora_" in name and "task_" in name)
    return make_step(model.train(), dtype)


def build_moe_peft(kind: str, layers: int, dtype: torch.dtype) -> Step:
    os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CPU"
    from moe_peft.adapters import adapter_factory
    from moe_peft.common import LLMBatchConfig, LLMModelInput
    from moe_peft.model import LLMModel
    from moe_peft.models import from_pretrained

    base = make_base(layers, dtype)
    model = LLMModel(from_pretrained(base, attn_impl="eager", device="cpu"))
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.05, "target_modules": LINEARS}
    if kind != "LORAMOE":
        settings |= {"top_k": TOP_K, "router_loss": True}
    if kind == "MIXLORA":
        settings["routing_strategy"] = "mixlora"
    model.init_adapter(adapter_factory(kind, "peer", num_experts=EXPERTS, **settings))
    weights = model.get_adapter_weight_dict("peer").values()
    ids_BS = make_batch()["input_ids"]

    def step() -> object:
        for weight in weights:
            weight.grad = None
        given = LLMModelInput(
            batch_configs_=[LLMBatchConfig("peer", 0, len(ids_BS))],
            batch_tokens_=ids_BS.clone(),
            batch_labels_=ids_BS.clone(),
            batch_masks_=torch.ones_like(ids_BS),
        )
        (output,) = model.forward(given)
        loss = output.loss if output.aux_loss is None else output.loss + output.aux_loss
        loss.backward()
        return loss.item()

    return step


def draw_mixlora_weights(base: Any) -> dict[str, Tensor]:
    """Under the names of a checkpoint: a LoRA in attention, a LoRA for each expert and a gate in the rest."""
    weights = {}

    def draw(name: str, *size: int) -> None:
        weights[f"{name}.weight"] = torch.randn(size) * 0.02

    for n, layer in enumerate(base.model.layers):
        prefix = f"mixlora.layers.{n}"
        draw(f"{prefix}.mlp.moe_gate", EXPERTS, base.config.hidden_size)
        for linear in LINEARS:
            place = "self_attn" if hasattr(layer.self_attn, linear) else "mlp"
            module = getattr(getattr(layer, place), linear)
            copies = [f".experts.{expert}" for expert in range(EXPERTS)] if place == "mlp" else [""]
            for copy in copies:
                draw(f"{prefix}.{place}.{linear}{copy}.lora_A", RANK, module.in_features)
                draw(f"{prefix}.{place}.{linear}{copy}.lora_B", module.out_features, RANK)
    return weights


def build_mixlora_package(layers: int, dtype: torch.dtype) -> Step:
    from mixlora import MixLoraConfig, inject_adapter_in_model

    base = make_base(layers, dtype).train().requires_grad_(False)
    names = {"base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA"}
    sizes = {"r": RANK, "lora_alpha": 2 * RANK, "num_experts": EXPERTS, "top_k": TOP_K, "target_modules": LINEARS}
    settings = {**names, **sizes, "routing_strategy": "mixlora", "lora_dropout": 0.05, "act_fn": "silu"}
    config = MixLoraConfig.from_config(settings)
    config.adapter_name_, config.dtype_ = "default", torch.float32
    inject_adapter_in_model(base, config, draw_mixlora_weights(base))
    # attention's pairs are parameters of the model, experts and gates are not
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    for layer in base.model.layers:
        moe = layer.mlp.mixlora_moes["default"]
        trained.append(moe.gate_.requires_grad_())
        trained += [matrix.weight for expert in moe.experts_.values() for matrix in (expert.lora_A, expert.lora_B)]
    step = make_step(base, dtype)

    def reset_and_step() -> object:
        for weight in trained:
            weight.grad = None
        return step()

    return reset_and_step


MODELS: dict[str, Build] = {
    "lora": build_lora,
    "mola": build_mola,
    "mixlora": build_mixlora,
    "xlora": build_xlora,
    "arrow": build_arrow,
    "moe_peft_mixlora": partial(build_moe_peft, "MIXLORA"),
    "moe_peft_mola": partial(build_moe_peft, "MOLA"),
    "moe_peft_loramoe": partial(build_moe_peft, "LORAMOE"),
    "mixlora_package": build_mixlora_package,
}
