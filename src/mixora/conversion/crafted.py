"""Released checkpoints of crafted models (Camelidae, Qwen2idae, Sparsetral; PESC, arXiv 2401.02731) -> base + adapter.

Beside the tensors of a dense model they hold, per layer, `mlp.moe_adapter.router.weight` [E, d] and, per expert,
`mlp.moe_adapter.experts.{e}.adapter_down.weight` [R, d] and `...adapter_up.weight` [d, R]. Their code weighs experts by
a softmax over the kept logits, or by a softmax over all of them renormalised over the kept: the same numbers.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mixora.bases import sketch
from mixora.bases.limits import check_sizes
from mixora.config import Strict, parse
from mixora.conversion.tensors import (
    Shapes,
    check_shapes,
    read_json,
    read_shapes,
    read_tensors,
    shapes_of,
    write_adapter,
)
from mixora.depth import Count
from mixora.display.stages import Advance, Stage, count
from mixora.errors import CheckpointError, ModelError
from mixora.planning.plan import Plan
from mixora.tuner import MixoraConfig, plan, recipe

# model types of released checkpoints, and those of the dense models below them
_DENSE = {"camelidae": "llama", "qwen2idae": "qwen2", "sparsetral": "mistral"}
_SIZES = ("adapter_dim", "moe_scaling", "num_experts", "topk")
# settings of the released code that an ordinary configuration does not have
_THEIRS = (*_SIZES, "auto_map", "moe_dtype", "adapter_dropout", "output_router_logits", "router_aux_loss_coef")
_ADAPTER = re.compile(r"model\.layers\.(\d+)\.mlp\.moe_adapter\.(router|experts\.(\d+)\.adapter_(down|up))\.weight")
# what files of old versions hold and no model reads
_BUFFER = re.compile(r".*rotary_emb\.inv_freq")
# what else belongs to the base: its tokenizer, how it ends and draws a text, its licence
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_*")
_COMPANIONS = (*_TOKENIZER, "generation_config.json", "LICENSE*")


class Sizes(Strict):
    """What a released configuration says of its experts: E, K, R and s."""

    num_experts: Count
    topk: Count
    adapter_dim: Count
    moe_scaling: float

    def config(self) -> MixoraConfig:
        """The recipe `pesc` of these sizes, without LoRA: released checkpoints hold it merged into the base."""
        made = recipe(
            "pesc", num_experts=self.num_experts, top_k=self.topk, rank=self.adapter_dim, scale=self.moe_scaling
        )
        rules = {"ffn": {**made.rules["ffn"], "targets": ["mlp"]}}
        return MixoraConfig(recipe="pesc", rules=rules, losses=made.losses, task_type="CAUSAL_LM", inference_mode=True)

    def shapes(self, config: PreTrainedConfig) -> Shapes:
        """Name and shape of every tensor that the experts and routers must have."""
        found: Shapes = {}
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}.mlp.moe_adapter."
            found[prefix + "router.weight"] = (self.num_experts, config.hidden_size)
            for expert in range(self.num_experts):
                found[f"{prefix}experts.{expert}.adapter_down.weight"] = (self.adapter_dim, config.hidden_size)
                found[f"{prefix}experts.{expert}.adapter_up.weight"] = (config.hidden_size, self.adapter_dim)
        return found


def convert_crafted(source: Path, claim: Callable[[], Path] | None, progress: Stage) -> Plan:
    """Split a released checkpoint into an ordinary dense checkpoint, `base`, and an `adapter` for it.

    Both go to the folder that `claim` makes once everything fits; without it nothing is written. Reads safetensors or
    `.bin` files, in one file or sharded; one shard at a time is in memory.
    """
    config, sizes = _read_config(source)
    shards = _find_shards(source)
    dense = sketch(config, source)
    _check(read_shapes(shards), dense, sizes.shapes(config), source)
    settings = sizes.config()
    table = plan(dense, settings)
    if claim is None:
        return table
    folder = claim()
    with progress("writing the adapter, files read") as advance:
        _write_adapter(folder, _tensors_of(count(shards, advance)), dense, settings)
    with progress("writing the base, files") as advance:
        _write_base(folder / "base", shards, config, advance)
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            shutil.copy(file, folder / "base" / file.name)
    return table


def _read_config(source: Path) -> tuple[PreTrainedConfig, Sizes]:
    data = read_json(source / "config.json")
    missing = [name for name in _SIZES if name not in data]
    if missing:
        raise CheckpointError(
            f"{source}: config.json lacks {', '.join(missing)}; valid: a released checkpoint of a crafted model"
        )
    named = str(data.get("model_type"))
    model_type = _DENSE.get(named, named)
    if model_type not in _DENSE.values():
        known = ", ".join((*_DENSE, *_DENSE.values()))
        raise CheckpointError(f"{source}: config.json: model_type: got {data.get('model_type')!r}; valid: {known}")
    kept = {name: value for name, value in data.items() if name not in (*_THEIRS, "model_type", "architectures")}
    try:
        sizes = parse(Sizes, {name: data[name] for name in _SIZES})
        config = AutoConfig.for_model(model_type, **kept)
        check_sizes(config, source)
    except ModelError:
        raise
    except Exception as error:
        # settings of the wrong type make transformers raise anything
        raise CheckpointError(f"{source}: config.json: {error}") from None
    config.architectures = [{"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[model_type] + "ForCausalLM"]
    return config, sizes


def _find_shards(source: Path) -> list[Path]:
    """The files that hold the tensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = source / f"{name}.index.json"
        if index.is_file():
            names = _read_names(index)
            missing = [shard for shard in names if not (source / shard).is_file()]
            if missing:
                raise CheckpointError(f"{source}: {index.name} names files that are not there: {', '.join(missing)}")
            return [source / shard for shard in names]
        if (source / name).is_file():
            return [source / name]
    raise CheckpointError(f"{source}: holds no weights; valid: model.safetensors or pytorch_model.bin, or their shards")


def _read_names(index: Path) -> list[str]:
    """The files that an index names, all of them beside it."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(map(_is_file_name, table.values())):
        raise CheckpointError(f"{index}: weight_map: got {str(table)[:200]}; valid: names of files in the same folder")
    return sorted(set(table.values()))


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and 0 < len(os.fsencode(name)) < 256 and "\0" not in name


def _check(found: Shapes, dense: PreTrainedModel, of_experts: Shapes, source: Path) -> None:
    """Compare the tensors on disk with those of the dense model and its experts."""
    expected = shapes_of(dense.state_dict()) | of_experts
    if dense.config.tie_word_embeddings and "lm_head.weight" not in found:
        del expected["lm_head.weight"]
    kept = {name: shape for name, shape in found.items() if not _BUFFER.fullmatch(name)}
    check_shapes(kept, expected, source, "a crafted model")


def _tensors_of(shards: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for shard in shards:
        yield from read_tensors(shard).items()


def _write_adapter(
    folder: Path, stored: Iterable[tuple[str, Tensor]], dense: PreTrainedModel, config: MixoraConfig
) -> None:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored:
        match = _ADAPTER.fullmatch(name)
        if match:
            layers.setdefault(match[1], {})[match[2]] = tensor.clone()
    tensors: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        prefix = f"base_model.model.model.layers.{layer}.mlp.mixora_"
        experts = [f"experts.{expert}.adapter_" for expert in range(len(parts) // 2)]
        tensors[prefix + "A"] = torch.cat([parts[expert + "down"] for expert in experts])
        tensors[prefix + "B"] = torch.cat([parts[expert + "up"].T for expert in experts])
        tensors[prefix + "router"] = parts["router"].float()
    write_adapter(folder / "adapter", dense, config, str(folder / "base"), tensors)


def _write_base(folder: Path, shards: list[Path], config: PreTrainedConfig, advance: Advance) -> None:
    folder.mkdir()
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(count(shards, advance), start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        kept = {
            key: tensor.contiguous()
            for key, tensor in read_tensors(shard).items()
            if not _ADAPTER.fullmatch(key) and not _BUFFER.fullmatch(key)
        }
        save_file(kept, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, name)
        size += sum(tensor.nbytes for tensor in kept.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.save_pretrained(folder)
