"""What a merge writes: an ordinary PEFT LoRA adapter, an adapter of ours with one expert, or a dense checkpoint."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mixora.bases import is_resized, resolve_base
from mixora.contracts import Parameters
from mixora.errors import ModelError
from mixora.mixture import PREFIX, mixtures_of
from mixora.mixture.folding import check_untied
from mixora.mixture.low_rank import LowRank
from mixora.mixture.parts import Parts
from mixora.planning import whole_modules
from mixora.planning.assembly import make_plan
from mixora.routing.draws import Draw
from mixora.tuner import MixoraConfig

Pairs = Mapping[str, LowRank]


def write_lora(folder: Path, model: PeftModel, adapter: str, pairs: Pairs) -> None:
    """Write `pairs`, by path, and what else the adapter trained (`modules_to_save`) for plain PEFT to read."""
    base = model.get_base_model()
    config, scaled = _configure(pairs)
    config.target_modules = shortest_names(pairs, _module_names(base))
    config.fan_in_fan_out = any(isinstance(_frozen(base, path), Conv1D) for path in pairs)
    tensors: dict[str, Tensor] = {}
    for path, pair in scaled.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = pair.A_rI
        tensors[f"base_model.model.{path}.lora_B.weight"] = pair.B_rO.T
    _write_adapter(folder, model, adapter, config, tensors)


def write_mixture(folder: Path, model: PeftModel, adapter: str, members: tuple[int, ...] | None) -> None:
    """Write an adapter of ours with one expert at each site, the mean of `members` where experts are drawn."""
    source = model.peft_config[adapter]
    assert isinstance(source, MixoraConfig)
    rules = {name: {**rule, "router": {"kind": "single"}} for name, rule in source.rules.items()}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, list[int]] = {}
    for module in mixtures_of(model):
        if adapter in module.parts:
            one = _make_one(module.parts[adapter], module.parameters_of(adapter), members)
            ranks[module.path] = [len(one["A"])]
            tensors |= {f"base_model.model.{module.path}.{PREFIX}{kind}": tensor for kind, tensor in one.items()}
    config = MixoraConfig(rules=rules, allocation=ranks)
    config.plan = make_plan(model.get_base_model(), config.method, whole_modules.names_of(source)).to_list()
    _write_adapter(folder, model, adapter, config, tensors)


def _make_one(parts: Parts, parameters: Parameters, members: tuple[int, ...] | None) -> dict[str, Tensor]:
    """The tensors of the one expert that serves; where it has another rank, B makes up for the alpha / rank of that."""
    served = parts.router.serve(parameters, Draw(members=members))
    shape = replace(parts.shape, ranks=(len(served["A"]),))
    return {**served, "B": served["B"] * (parts.expert.scale(parts.shape) / parts.expert.scale(shape))}


def _write_adapter(folder: Path, model: PeftModel, adapter: str, config: Any, tensors: dict[str, Tensor]) -> None:
    """The files of an adapter on the same base, with the other modules that `adapter` trained."""
    source = model.peft_config[adapter]
    config.task_type = source.task_type
    config.base_model_name_or_path = name_base(source.base_model_name_or_path)
    config.revision = source.revision
    config.modules_to_save = getattr(source, "modules_to_save", None)
    config.inference_mode = True
    # as PEFT decides, which would ask the hub for the base
    resized = is_resized(model.get_base_model())
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=resized)
    whole = {name: tensor for name, tensor in state.items() if PREFIX not in name}
    save_file(dict(_storable(whole | tensors)), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def write_dense(folder: Path, model: PeftModel, pairs: Pairs) -> None:
    """Add `pairs` to the frozen weights and write the model without adapters; `model` is used up."""
    base = model.get_base_model()
    modules: dict[str, Any] = {path: base.get_submodule(path) for path in pairs}
    for module in modules.values():
        module.check_weight()
    check_untied(base, modules.values())
    with torch.no_grad():
        for path, module in modules.items():
            module.shift_base_weight(pairs[path].delta_OI(), safe_merge=True)
    dense: PreTrainedModel = model.unload()
    _declare_head(dense)
    dense.save_pretrained(str(folder))


def _declare_head(dense: PreTrainedModel) -> None:
    """Say in the configuration that a head trained whole is tied to the embeddings no more: some loaders believe it.

    Not in encoder-decoders, where the same word ties the embeddings of both halves, which still are one; transformers
    finds by itself that their head is another.
    """
    head: Any = dense.get_output_embeddings()
    embeddings: Any = dense.get_input_embeddings()
    if head is None or head.weight is embeddings.weight or dense.config.is_encoder_decoder:
        return
    for config in (dense.config, dense.config.get_text_config()):
        config.tie_word_embeddings = False


def name_base(name: str | None) -> str | None:
    """What transformers alone can read, where `name` is a short name or a GGUF file that only mixora resolves."""
    try:
        return str(resolve_base(name)) if name else name
    except ModelError:
        return name


def shortest_names(paths: Iterable[str], modules: Iterable[str]) -> list[str]:
    """For PEFT's `target_modules`: the shortest endings of `paths` that name no other one of `modules`.

    An ending never holds a number, which would say the layer: where no such ending will do, the whole path stands.
    """
    adapted, others = set(paths), set(modules)
    others -= adapted
    names: set[str] = set()
    for path in adapted:
        endings = (
            ending for ending in _endings(path) if not any(f".{other}".endswith(f".{ending}") for other in others)
        )
        names.add(next(endings, path))
    return sorted(names)


def _endings(path: str) -> Iterator[str]:
    """The endings of a path in whole steps, the shortest first, as far as the first number."""
    steps = path.split(".")
    for first in range(len(steps) - 1, -1, -1):
        if steps[first].isdigit():
            return
        yield ".".join(steps[first:])


def _module_names(base: nn.Module) -> Iterator[str]:
    """Names of the modules as they are without adapters; PEFT targets none inside of one that is trained whole."""
    for name, _ in base.named_modules():
        inside = "original_module" in name or "modules_to_save" in name or PREFIX in name
        if name and not inside and not name.endswith("base_layer"):
            yield name.replace(".base_layer", "")


def _frozen(base: nn.Module, path: str) -> nn.Module:
    module: Any = base.get_submodule(path)
    return module.get_base_layer()


def _configure(pairs: Pairs) -> tuple[LoraConfig, dict[str, LowRank]]:
    """The ranks and alphas of a configuration, and pairs that stand for the same changes under it.

    PEFT scales by alpha / rank, one alpha where all ranks are equal. Where that cannot say the scales of the pairs as
    a whole number, B is scaled and alpha is the rank.
    """
    ranks = {path: pair.rank for path, pair in pairs.items()}
    alphas = {path: pair.scale * pair.rank for path, pair in pairs.items()}
    uniform = len(set(ranks.values())) == 1
    if not all(alpha.is_integer() for alpha in alphas.values()) or (uniform and len(set(alphas.values())) > 1):
        alphas = {path: float(rank) for path, rank in ranks.items()}
        pairs = {path: LowRank(pair.A_rI, pair.B_rO.float() * pair.scale) for path, pair in pairs.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], int(Counter(alphas.values()).most_common(1)[0][0])
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={_expression(path): r for path, r in ranks.items() if r != rank},
        alpha_pattern={_expression(path): int(a) for path, a in alphas.items() if int(a) != alpha},
    )
    return config, dict(pairs)


def _expression(path: str) -> str:
    """PEFT takes the keys of patterns for regular expressions of what a path ends with; this one means one path."""
    return "^" + path.replace(".", r"\.")


def _storable(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """safetensors writes no views and no shared memory."""
    for name, tensor in tensors.items():
        yield name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
