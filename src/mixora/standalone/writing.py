"""A mixture as a checkpoint with its own small modelling file, which transformers alone loads."""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from mixora.cards import Card, Facts, facts_of, write_card
from mixora.display.stages import Stage, silently
from mixora.errors import CheckpointError, ModelError
from mixora.evaluate.inference import inference
from mixora.experts import Bottleneck, Hydra, Lora
from mixora.files.folders import check_folder, claim_folder
from mixora.host.versions import MIXORA
from mixora.mixture import PREFIX, Mixture, mixtures_of
from mixora.routers import Soft, TopK
from mixora.routing.draws import Draw

MODELLING = "modeling_mixora"
ADAPTER = "mixora_adapter"
TRIED_TOKENS = (2, 16)
# the mean difference of a logit that rounding can explain, as a share of the mean logit, by the bytes of a number
TOLERANCES = {8: 1e-6, 4: 1e-3, 2: 0.1}


@dataclass(frozen=True)
class Standalone:
    """What was written. `difference`: the largest of a logit on random tokens, `largest`: the largest logit there."""

    out: Path
    sites: int
    difference: float
    largest: float


@torch.no_grad()
def write_standalone(
    model: PeftModel,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Facts | None = None,
    overwrite: bool = False,
    progress: Stage = silently,
) -> Standalone:
    """Write base and active adapter to `out`, for `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`.

    Neither mixora nor PEFT is needed there. Weights of the base stay as they are: nothing is folded into them. The
    folder is read back, and logits of random tokens are compared, so the model is in memory twice. A model card and
    the `tokenizer` are written beside. `facts`, `overwrite` and `progress` as in `mixora.merge`. Raises
    `CheckpointError` for an adapter of other experts or routers than the file knows, and `ModelError` for a base that
    is no causal language model of transformers, or quantised, or where the logits differ by more than rounding.
    """
    adapter, base = check_standalone(model)
    check_folder(out, overwrite)
    sites, tensors = _read_sites(model, adapter)
    folder = claim_folder(out, overwrite)
    with progress(f"writing {folder}"):
        base.save_pretrained(str(folder), state_dict=tensors | _frozen_state(base), save_original_format=False)
        _write_code(folder, base, sites)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    with progress("reading it back"):
        difference, largest = _compare(model, folder)
    made = Standalone(folder, len(sites), difference, largest)
    write_card(folder, Card("standalone", facts or facts_of(model.peft_config[adapter]), details=_describe(made)))
    return made


def _describe(made: Standalone) -> tuple[str, ...]:
    return (
        "## How it was made",
        "",
        f"The weights of the base are as they were; beside {made.sites} of its modules stand the adapter's tensors.",
        "When it was written, its logits of random tokens were compared with those of the adapter in mixora: the",
        f"largest difference was {made.difference:.3g}, where the largest logit was {made.largest:.3g}.",
    )


def check_standalone(model: PeftModel) -> tuple[str, PreTrainedModel]:
    """The active adapter and its base, which may stand on the meta device; raises what `write_standalone` would."""
    adapter, base = model.active_adapter, model.get_base_model()
    config: Any = model.peft_config[adapter]
    if config.peft_type != MIXORA:
        raise CheckpointError(f"the active adapter {adapter!r} is of type {config.peft_type}; valid: {MIXORA.value}")
    kind = type(base).__name__
    if type(base) not in MODEL_FOR_CAUSAL_LM_MAPPING.values() or getattr(transformers, kind, None) is not type(base):
        raise ModelError(f"standalone: the base is a {kind}; valid: a causal language model that transformers holds")
    if getattr(base, "is_quantized", False):
        raise ModelError("standalone: the base is quantised; valid: the same base in float32, bfloat16 or float16")
    if config.modules_to_save:
        names = ", ".join(config.modules_to_save)
        raise CheckpointError(f"standalone: the adapter trained {names} whole; valid: one without modules_to_save")
    for module in mixtures_of(base):
        if adapter in module.parts and (reason := _find_obstacle(module, adapter)):
            raise CheckpointError(
                f"standalone: {module.path} has {reason}, which the modelling file does not compute; valid: experts "
                "lora, hydra and bottleneck under routers single, uniform, soft and topk; else keep the adapter"
            )
    return adapter, base


def _find_obstacle(module: Mixture, adapter: str) -> str | None:
    parts = module.parts[adapter]
    if module.merged:
        return "its adapter merged into the weight"
    if type(parts.expert) not in (Lora, Hydra, Bottleneck):
        return f"experts of kind {parts.expert.config.kind!r}"
    if not parts.router.is_static and type(parts.router) not in (Soft, TopK):
        return f"a router of kind {parts.router.config.kind!r}"
    if isinstance(parts.router, TopK) and not parts.router.is_by_token:
        return "a capacity limit that holds in evaluation too"
    return None


def _read_sites(model: PeftModel, adapter: str) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The arguments of the file's `Adapter` for each site, by path, and the tensors of all by their names there."""
    sites: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for module in mixtures_of(model):
        if adapter in module.parts:
            found = dict(_tensors_of(module, adapter))
            sites[module.path] = _settings_of(module, adapter, found)
            tensors |= {f"{module.path}.{ADAPTER}.{name}": tensor for name, tensor in found.items()}
    return sites, tensors


def _tensors_of(module: Mixture, adapter: str) -> Iterator[tuple[str, Tensor]]:
    parts = module.parts[adapter]
    served = parts.router.serve(module.parameters_of(adapter), Draw())
    # the file knows no common A
    copies = len(served["B"]) // len(served["A"])
    dtype = next(module.base_layer.parameters()).dtype
    yield "down", served["A"].repeat(copies, 1).to(dtype)
    yield "up", served["B"].to(dtype)
    if "bias_A" in served:
        yield "down_bias", served["bias_A"].to(dtype)
        yield "up_bias", served["bias_B"].to(dtype)
    if not parts.router.is_static:
        # linears that share a router get a copy each: files hold no tensor under two names
        yield "router", module.leader_of(adapter).parameters_of(adapter)["router"].clone()


def _settings_of(module: Mixture, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    parts, router = module.parts[adapter], module.parts[adapter].router
    ranks = [len(tensors["down"])] if router.is_static else list(parts.shape.ranks)
    return {
        "is_behind": parts.expert.reads == "output",
        "in_features": parts.shape.in_features,
        "out_features": parts.shape.out_features,
        "ranks": ranks,
        "top_k": 0 if router.is_static else router.top_k,
        "renormalise": isinstance(router, TopK) and router.config.renormalise,
        "scale": parts.expert.scale(parts.shape),
        "has_biases": "up_bias" in tensors,
    }


def _frozen_state(base: PreTrainedModel) -> dict[str, Tensor]:
    """The base's own tensors by their own names."""
    state = base.state_dict()
    return {key.replace(".base_layer", ""): tensor for key, tensor in state.items() if "." + PREFIX not in key}


def _write_code(folder: Path, base: PreTrainedModel, sites: Mapping[str, Any]) -> None:
    """The modelling file for this base, and a configuration that leads to it."""
    source = Path(__file__).with_name(f"{MODELLING}.py").read_text(encoding="utf-8")
    for stands, wanted in (("LlamaConfig", type(base.config)), ("LlamaForCausalLM", type(base))):
        source = source.replace(f"import {stands} as", f"import {wanted.__name__} as")
    (folder / f"{MODELLING}.py").write_text(source, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "model_type": "mixora",
        "architectures": ["MixoraForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELLING}.MixoraConfig",
            "AutoModelForCausalLM": f"{MODELLING}.MixoraForCausalLM",
        },
        "mixora_sites": dict(sites),
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _compare(model: PeftModel, folder: Path) -> tuple[float, float]:
    """The largest difference of a logit on random tokens, and the largest logit; `ModelError` beyond rounding."""
    base: Any = model.get_base_model()
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, TRIED_TOKENS, generator=torch.Generator().manual_seed(0))
    with inference(model) as device:
        expected = model(input_ids=ids.to(device)).logits.float().cpu()
    again = _read_back(folder, base.dtype)
    found = again(input_ids=ids).logits.float()
    # in low precision a token between two experts may go to the other one, so that single logits say little
    share = float((found - expected).abs().mean() / expected.abs().mean())
    # not ">": what is not a number must show
    if not share <= TOLERANCES[base.dtype.itemsize]:
        raise ModelError(
            f"{folder}: logits differ by {share:.1%} from those of the adapter on a {type(base).__name__}, more than "
            "rounding can; valid: keep the adapter"
        )
    return float((found - expected).abs().max()), float(expected.abs().max())


def _read_back(folder: Path, dtype: torch.dtype) -> Any:
    """The model in `folder` by its own code, which has just been written from ours."""
    spec = importlib.util.spec_from_file_location(f"mixora_written_{MODELLING}", folder / f"{MODELLING}.py")
    assert spec is not None and spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = written
    try:
        spec.loader.exec_module(written)
        return written.MixoraForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
    finally:
        del sys.modules[spec.name]
