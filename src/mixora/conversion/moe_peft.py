"""Adapters that MoE-PEFT 2.0.2 writes -> adapters of ours: MoLA (arXiv 2402.08562).

A folder holds `adapter_config.json` and `adapter_model.bin`. Per layer and adapted linear the latter has, below
`mola.layers.{n}.self_attn.q_proj.` and the like, `moe_gate.weight` [E, I] and, per expert, `experts.{e}.lora_A.weight`
[R, I] and `experts.{e}.lora_B.weight` [O, R]. Their router computes in fp32, as ours does: softmax, top-k,
renormalised. Their experts' dropout stays on in evaluation; ours acts in training only.
"""

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft.utils.constants import CONFIG_NAME
from pydantic import Field, field_validator
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixora.bases import read_base_config
from mixora.config import Strict, parse
from mixora.conversion.tensors import Shapes, check_shapes, read_json, read_tensors, shapes_of, write_adapter
from mixora.depth import Count
from mixora.errors import CheckpointError, ConfigError, ModelError
from mixora.folders import claim_folder
from mixora.plan import Plan, Site
from mixora.tuner import MixoraConfig, plan, recipe

# bases whose linears have the names that MoE-PEFT gives them
_MODEL_TYPES = ("llama", "mistral", "qwen2", "gemma")
_WEIGHTS_NAME = "adapter_model.bin"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class _Lora(Strict):
    """One LoRA of theirs; `use_rslora`: scaled by alpha / sqrt(r)."""

    bias: Literal["none"] = "none"
    r: Count
    lora_alpha: Annotated[int, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    use_dora: Literal[False] = False
    use_rslora: bool = False

    def expert(self) -> dict[str, Any]:
        """The same as an expert of ours."""
        scale = {"scale": self.lora_alpha / math.sqrt(self.r)} if self.use_rslora else {"alpha": self.lora_alpha}
        return {"kind": "lora", "rank": self.r, "dropout": self.lora_dropout, **scale}


class _Mola(_Lora):
    """LoRA experts beside each target, with a router each."""

    recipe: ClassVar[str] = "mola"

    peft_type: Literal["MOLA"]
    routing_strategy: Literal["mola"] = "mola"
    target_modules: Annotated[tuple[Literal[(*_ATTENTION, *_FEED_FORWARD)], ...], Field(min_length=1)]  # type: ignore[valid-type]
    num_experts: Count
    top_k: Count = 2
    task_type: Literal["CAUSAL_LM", "QUESTION_ANS"] = "CAUSAL_LM"
    base_model_name_or_path: str | None = None

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, targets: Any) -> Any:
        """They also read a table that says yes or no of every name."""
        if isinstance(targets, dict):
            return tuple(name for name, is_target in targets.items() if is_target)
        return tuple(targets) if isinstance(targets, list) else targets

    def rules(self) -> dict[str, Any]:
        """The same as rules of ours."""
        router = {"kind": "topk", "num_experts": self.num_experts, "top_k": self.top_k, "renormalise": True}
        return {"linears": {"targets": list(self.target_modules), "expert": self.expert(), "router": router}}

    def sources(self, site: Site) -> dict[str, list[str]]:
        """Their tensors behind each kind of ours at a site, expert after expert."""
        theirs = f"mola{site.path.removeprefix('model')}."
        experts = [f"{theirs}experts.{expert}." for expert in range(site.num_experts)]
        return {
            "A": [expert + "lora_A.weight" for expert in experts],
            "B": [expert + "lora_B.weight" for expert in experts],
            "router": [theirs + "moe_gate.weight"],
        }


_METHODS: dict[str, type[_Mola]] = {"MOLA": _Mola}


def convert_moe_peft(source: Path, out: str | Path, model: str | Path | None) -> Plan:
    """Write `out/adapter`; the base is `model`, or the one that the adapter names."""
    theirs = _read_settings(source)
    base = str(model or theirs.base_model_name_or_path or "")
    dense = _make_dense(base, source)
    made = recipe(theirs.recipe)
    config = MixoraConfig(
        recipe=theirs.recipe, rules=theirs.rules(), losses=made.losses, task_type="CAUSAL_LM", inference_mode=True
    )
    table = plan(dense, config)
    if not (source / _WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{source}: has no {_WEIGHTS_NAME}; valid: a folder as MoE-PEFT writes it")
    tensors = read_tensors(source / _WEIGHTS_NAME)
    expected = {name: shape for site in table.sites for name, shape in _expected(site, theirs).items()}
    check_shapes(shapes_of(tensors), expected, source, f"a {theirs.peft_type} adapter on {base}")
    ours = {
        f"base_model.model.{site.path}.mixora_{kind}": _join(kind, [tensors[name] for name in names])
        for site in table.sites
        for kind, names in theirs.sources(site).items()
    }
    write_adapter(claim_folder(out) / "adapter", dense, config, base, ours)
    return table


def _read_settings(source: Path) -> _Mola:
    data = read_json(source / CONFIG_NAME)
    settings = _METHODS.get(str(data.get("peft_type")))
    if settings is None:
        raise CheckpointError(
            f"{source}: {CONFIG_NAME}: peft_type: got {data.get('peft_type')!r}; valid: {', '.join(_METHODS)}"
        )
    try:
        return parse(settings, data)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {CONFIG_NAME} cannot be met exactly:\n  {_indent(error)}") from None


def _indent(error: ConfigError) -> str:
    return str(error).replace("\n", "\n  ")


def _make_dense(base: str, source: Path) -> PreTrainedModel:
    """The base on the meta device."""
    if not base:
        raise CheckpointError(f"{source}: names no base; valid: `model` (--model) for the base it was trained on")
    try:
        config = read_base_config(base)
    except ModelError as error:
        raise ModelError(f"{error}; {source} needs its base's configuration: `model` (--model) can name it") from None
    if config.model_type not in _MODEL_TYPES:
        raise ModelError(f"{base}: got a {config.model_type} model; valid for {source}: {', '.join(_MODEL_TYPES)}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _expected(site: Site, theirs: _Mola) -> Shapes:
    """Name and shape of their tensors at a site."""
    shapes = {
        "A": (site.ranks[0], site.in_features),
        "B": (site.out_features, site.ranks[0]),
        "router": (site.num_experts, site.in_features),
    }
    return {name: shapes[kind] for kind, names in theirs.sources(site).items() for name in names}


def _join(kind: str, tensors: list[Tensor]) -> Tensor:
    """One tensor of ours: experts below each other, widths in the rows of A and B alike, routers in fp32."""
    if kind == "router":
        return tensors[0].float()
    return torch.cat([tensor.T if kind == "B" else tensor for tensor in tensors])
