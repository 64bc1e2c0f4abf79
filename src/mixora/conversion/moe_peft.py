"""Adapters that MoE-PEFT 2.0.2 writes -> adapters of ours: MoLA (arXiv 2402.08562), MixLoRA (arXiv 2404.15159).

A folder holds `adapter_config.json` and `adapter_model.bin`. The latter has, per layer and adapted linear, below
`mola.layers.{n}.self_attn.q_proj.` and the like, `experts.{e}.lora_A.weight` [R, I], `experts.{e}.lora_B.weight` [O, R]
and `moe_gate.weight` [E, I]. In MixLoRA (`mixlora.layers...`) the linears of a feed-forward part have experts and
`mlp.moe_gate.weight` is their one router; those of attention have a `lora_A.weight` and a `lora_B.weight`.

Their routers compute in fp32, as ours do: softmax, top-k, renormalised. Their experts' dropout stays on in evaluation;
ours acts in training only.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft.utils.constants import CONFIG_NAME
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mixora.bases import read_base_config, sketch
from mixora.config import Strict, parse
from mixora.conversion.tensors import Shapes, check_shapes, read_json, read_tensors, shapes_of, write_adapter
from mixora.depth import Count
from mixora.errors import CheckpointError, ConfigError, ModelError
from mixora.planning.plan import Plan, Site
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
    lora_alpha: Count
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    use_dora: Literal[False] = False
    use_rslora: bool = False

    def expert(self, kind: str) -> dict[str, Any]:
        """The same as an expert of ours."""
        scale = {"scale": self.lora_alpha / math.sqrt(self.r)} if self.use_rslora else {"alpha": self.lora_alpha}
        return {"kind": kind, "rank": self.r, "dropout": self.lora_dropout, **scale}


class _Adapter(_Lora):
    """What the configurations of both methods hold."""

    recipe: ClassVar[str]

    peft_type: str
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

    def router(self) -> dict[str, Any]:
        """Their router as one of ours."""
        return {"kind": "topk", "num_experts": self.num_experts, "top_k": self.top_k, "renormalise": True}

    @abstractmethod
    def rules(self, base: PreTrainedConfig) -> dict[str, Any]:
        """The same as rules of ours on such a base; `ConfigError` for what cannot be met exactly."""

    def sources(self, site: Site) -> dict[str, list[str]]:
        """Their tensors behind each kind of ours at a site, expert after expert."""
        theirs = self.recipe + site.path.removeprefix("model")
        is_routed = site.router != "single"
        experts = [f"{theirs}.experts.{expert}" for expert in range(site.num_experts)] if is_routed else [theirs]
        found = {kind: [f"{expert}.lora_{kind}.weight" for expert in experts] for kind in ("A", "B")}
        if is_routed and site.leader is None:
            place = theirs if site.role is None else theirs.rpartition(".")[0]
            found["router"] = [place + ".moe_gate.weight"]
        return found


class _Mola(_Adapter):
    """LoRA experts beside each target, with a router each."""

    recipe = "mola"

    routing_strategy: Literal["mola"] = "mola"

    def rules(self, base: PreTrainedConfig) -> dict[str, Any]:
        return {
            "linears": {"targets": list(self.target_modules), "expert": self.expert("lora"), "router": self.router()}
        }


class _MixLora(_Adapter):
    """Whole feed-forward parts as experts, and plain LoRA on attention.

    `expert_lora` replaces settings of the LoRAs for the experts. `act_fn` is the non-linearity of the experts.
    `jitter_noise` disturbs what routers and experts read in training.
    """

    recipe = "mixlora"

    routing_strategy: Literal["mixlora"]
    expert_lora: dict[str, Any] = {}
    act_fn: str | None = None
    jitter_noise: Annotated[float, Field(ge=0, le=0)] = 0.0

    def rules(self, base: PreTrainedConfig) -> dict[str, Any]:
        if self.act_fn not in (None, base.hidden_act):
            raise ConfigError(f"act_fn: got {self.act_fn!r}; valid: that of the base, {base.hidden_act!r}")
        missing = [name for name in _FEED_FORWARD if name not in self.target_modules]
        if missing:
            raise ConfigError(
                f"target_modules: leaves out {', '.join(missing)}; valid for MIXLORA: all of {', '.join(_FEED_FORWARD)}"
            )
        experts = parse(_Lora, self.model_dump(include=set(_Lora.model_fields)) | self.expert_lora, "expert_lora")
        rules = {"ffn": {"targets": list(_FEED_FORWARD), "expert": experts.expert("ffn_lora"), "router": self.router()}}
        attention = [name for name in self.target_modules if name in _ATTENTION]
        if attention:
            rules["attention"] = {"targets": attention, "expert": self.expert("lora"), "router": {"kind": "single"}}
        return rules


_METHODS: dict[str, type[_Adapter]] = {"MOLA": _Mola, "MIXLORA": _MixLora}


def convert_moe_peft(source: Path, claim: Callable[[], Path] | None, model: str | Path | None) -> Plan:
    """Write `adapter` to the folder that `claim` makes, if there is one, once everything fits.

    The base is `model`, or the one that the adapter names.
    """
    theirs = _read_settings(source)
    base = str(model or theirs.base_model_name_or_path or "")
    dense = _make_dense(base, source)
    config = _make_config(theirs, dense.config, source)
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
    if claim is not None:
        write_adapter(claim() / "adapter", dense, config, base, ours)
    return table


def _read_settings(source: Path) -> _Adapter:
    data = read_json(source / CONFIG_NAME)
    settings = _METHODS.get(str(data.get("peft_type")))
    if settings is None:
        raise CheckpointError(
            f"{source}: {CONFIG_NAME}: peft_type: got {data.get('peft_type')!r}; valid: {', '.join(_METHODS)}"
        )
    try:
        return parse(settings, data)
    except ConfigError as error:
        raise _refuse(source, error) from None


def _refuse(source: Path, error: ConfigError) -> CheckpointError:
    reasons = str(error).replace("\n", "\n  ")
    return CheckpointError(f"{source}: {CONFIG_NAME} cannot be met exactly:\n  {reasons}")


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
    return sketch(config, base)


def _make_config(theirs: _Adapter, base: PreTrainedConfig, source: Path) -> MixoraConfig:
    """The recipe of the same name with their sizes; the losses, of which they tell nothing, are the recipe's."""
    try:
        rules = theirs.rules(base)
    except ConfigError as error:
        raise _refuse(source, error) from None
    losses = recipe(theirs.recipe).losses
    return MixoraConfig(recipe=theirs.recipe, rules=rules, losses=losses, task_type="CAUSAL_LM", inference_mode=True)


def _expected(site: Site, theirs: _Adapter) -> Shapes:
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
