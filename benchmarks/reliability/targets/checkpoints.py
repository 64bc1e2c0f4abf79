"""Checkpoints of other code with damages, as `mixora convert` reads them, and GGUF files."""

import io
import json
from functools import cache
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch

import mixora
from benchmarks.reliability.targets.drawing import Draw
from benchmarks.reliability.targets.material import base_config, base_folder, fresh, make_base, place
from mixora.bases import resolve_base

EXPERTS, RANK = 2, 2
CRAFTED: dict[str, Any] = {
    **{
        name: value
        for name, value in base_config().to_dict().items()
        if name not in ("model_type", "architectures", "transformers_version", "_name_or_path")
    },
    "model_type": "camelidae",
    "adapter_dim": RANK,
    "moe_scaling": 0.25,
    "num_experts": EXPERTS,
    "topk": 2,
}
MOLA: dict[str, Any] = {
    "bias": "none",
    "peft_type": "MOLA",
    "r": RANK,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "num_experts": EXPERTS,
    "top_k": 2,
    "routing_strategy": "mola",
}


@cache
def _crafted_tensors() -> dict[str, torch.Tensor]:
    found = {name: tensor.clone() for name, tensor in make_base().state_dict().items()}
    prefix, width = "model.layers.0.mlp.moe_adapter.", base_config().hidden_size
    found[prefix + "router.weight"] = torch.ones(EXPERTS, width)
    for expert in range(EXPERTS):
        found[f"{prefix}experts.{expert}.adapter_down.weight"] = torch.ones(RANK, width)
        found[f"{prefix}experts.{expert}.adapter_up.weight"] = torch.ones(width, RANK)
    return found


@cache
def _mola_tensors() -> dict[str, torch.Tensor]:
    prefix, width = "mola.layers.0.self_attn.q_proj.", base_config().hidden_size
    found = {prefix + "moe_gate.weight": torch.ones(EXPERTS, width)}
    for expert in range(EXPERTS):
        found[f"{prefix}experts.{expert}.lora_A.weight"] = torch.ones(RANK, width)
        found[f"{prefix}experts.{expert}.lora_B.weight"] = torch.ones(width, RANK)
    return found


@cache
def _saved(kind: str) -> bytes:
    if kind == "safetensors":
        return safetensors.torch.save(_crafted_tensors(), metadata={"format": "pt"})
    file = io.BytesIO()
    torch.save(_mola_tensors() if kind == "mola" else _crafted_tensors(), file)
    return file.getvalue()


def convert_crafted(data: bytes) -> None:
    """A released checkpoint of a crafted model with damages in its configuration, index or weights."""
    draw = Draw(data)
    what = draw.below(6)
    config = draw.damage(CRAFTED) if what < 3 else CRAFTED
    with fresh("crafted") as folder:
        text = json.dumps(config, default=str)
        (folder / "config.json").write_bytes(draw.alter(text.encode()) if draw.byte() % 8 == 0 else text.encode())
        if what == 3:
            index = {"metadata": {}, "weight_map": dict.fromkeys(_crafted_tensors(), "part.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(draw.damage(index), default=str))
            (folder / "part.safetensors").write_bytes(_saved("safetensors"))
        elif what == 4:
            (folder / "pytorch_model.bin").write_bytes(draw.alter(_saved("crafted")))
        else:
            content = _saved("safetensors")
            (folder / "model.safetensors").write_bytes(draw.alter(content) if what == 5 else content)
        mixora.convert(folder, place() / "converted", dry_run=True)


def convert_moe_peft(data: bytes) -> None:
    """An adapter of MoE-PEFT with damages in its configuration or its tensors."""
    draw = Draw(data)
    what = draw.below(4)
    with fresh("moe-peft") as folder:
        config = draw.damage(MOLA) if what < 2 else MOLA
        (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
        content = draw.alter(_saved("mola")) if what > 1 else _saved("mola")
        (folder / "adapter_model.bin").write_bytes(content)
        mixora.convert(folder, place() / "converted", base_folder(), dry_run=True)


@cache
def gguf_file() -> bytes:
    """A Llama of one layer with a tokenizer, as llama.cpp would write it."""
    config, names = base_config(), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    with fresh("gguf-made") as folder:
        writer = gguf.GGUFWriter(folder / "made.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(1)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(n + 33) for n in range(96))])
        writer.add_token_scores([float(-n) for n in range(99)])
        writer.add_token_types([2, 3, 3, *[1] * 96])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for name, tensor in make_base().state_dict().items():
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (folder / "made.gguf").read_bytes()


def read_gguf(data: bytes) -> None:
    """A GGUF file with damages, most of them in its first part."""
    draw, whole = Draw(data), gguf_file()
    head = 600 if draw.byte() % 4 else len(whole)
    with fresh("gguf") as folder:
        (folder / "made.gguf").write_bytes(draw.alter(whole[:head]) + whole[head:])
        resolve_base(folder / "made.gguf")
