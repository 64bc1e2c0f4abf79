"""What other programs read of a LoRA adapter in PEFT's layout, restated from their rules without their code.

vLLM: the fields of `vllm/lora/peft_helper.py` and the names that `vllm/lora/utils.py` parses. Fields that it does not
know, `rank_pattern` and `alpha_pattern` among them, are dropped without a word.
llama.cpp: `convert_lora_to_gguf.py` takes `lora_alpha` and the pairs; the runtime scales by alpha / rank of each pair.
"""

import json

import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."


def read(folder):
    """The configuration, and A and B of each module by its path; what is no pair is listed."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs, others = {}, []
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if name.startswith(PREFIX) and name.endswith(".weight") and kind in ("lora_A", "lora_B"):
            pairs.setdefault(path, {})[kind] = tensor
        else:
            others.append(name)
    return config, pairs, others


def problems_for_vllm(folder, linears, max_lora_rank=16):
    """Why vLLM would refuse the adapter, or compute something else, on a model with linears of these last names."""
    config, pairs, others = read(folder)
    found = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if config.get("modules_to_save"):
        found.append("modules_to_save is not None")
    if config.get("use_dora"):
        found.append("DoRA is not supported")
    if config.get("bias", "none") != "none":
        found.append("bias is not none")
    if config["r"] > max_lora_rank:
        found.append(f"rank {config['r']} is greater than max_lora_rank {max_lora_rank}")
    found += [f"{name} is not read" for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    ranks = {len(pair["lora_A"]) for pair in pairs.values()} | {pair["lora_B"].shape[1] for pair in pairs.values()}
    if ranks != {config["r"]}:
        found.append(f"ranks {sorted(ranks)} where r is {config['r']}")
    found += [f"{name} is no LoRA weight" for name in others]
    unknown = sorted({path.rpartition(".")[2] for path in pairs} - set(linears))
    return found + ([f"unexpected target modules {unknown}"] if unknown else [])


def problems_for_llama_cpp(folder):
    """Why the converter would refuse the adapter, or the runtime scale it otherwise than PEFT does."""
    config, _, others = read(folder)
    found = [f"{name} is missing" for name in ("lora_alpha", "base_model_name_or_path") if config.get(name) is None]
    found += [f"{name} is not read" for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    found += ["use_rslora is not read"] if config.get("use_rslora") else []
    return found + [f"unexpected name {name}" for name in others]


def apply(model, folder, scale_of):
    """Add each pair to the weight of its module, times `scale_of(config, pair)`: what a server computes."""
    config, pairs, _ = read(folder)
    with torch.no_grad():
        for path, pair in pairs.items():
            model.get_submodule(path).weight += scale_of(config, pair) * pair["lora_B"] @ pair["lora_A"]
    return model.eval()


def vllm_scale(config, pair):
    return config["lora_alpha"] / config["r"]


def llama_cpp_scale(config, pair):
    return config["lora_alpha"] / pair["lora_B"].shape[1] if config["lora_alpha"] else 1.0
