"""An adapter plug-in of axolotl: its YAML's section `mixora` becomes the adapter that axolotl trains."""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import PreTrainedModel

import mixora
from mixora.errors import ConfigError

ADAPTER = "mixora"
# what axolotl's LoRA reads; the recipe decides all of it here
_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear", "lora_modules_to_save")


class MixoraArgs(BaseModel):
    """The section that axolotl's own strict schema lets pass; `mixora.recipe` checks what is in it."""

    mixora: dict[str, Any] | None = None


def config_of(cfg: Any) -> mixora.MixoraConfig:
    """The adapter that axolotl's configuration asks for: `mixora.recipe` names it, all else there are its settings.

    `task_type` is `CAUSAL_LM` unless it is given. Raises `ConfigError` for a section without a recipe, for what
    `mixora.recipe` refuses, and for settings of LoRA, which would have no effect.
    """
    settings = dict(cfg.mixora or {})
    if "recipe" not in settings:
        raise ConfigError("mixora.recipe: is missing; valid: a section `mixora` with the name of a recipe")
    ineffective = [name for name in _OF_LORA if getattr(cfg, name, None)]
    if ineffective:
        raise ConfigError(f"{', '.join(ineffective)}: no effect with adapter: mixora; valid: settings below `mixora`")
    return mixora.recipe(settings.pop("recipe"), **{"task_type": "CAUSAL_LM", **settings})


class MixoraPlugin(BasePlugin):
    """`plugins: [mixora.integrations.axolotl.MixoraPlugin]` with `adapter: mixora`."""

    def get_input_args(self) -> str:
        return f"{__name__}.{MixoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter != ADAPTER:
            return None
        if config_only:
            return None, config_of(cfg)
        if cfg.lora_model_dir:
            adapted = mixora.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            adapted = get_peft_model(model, config_of(cfg))
        return adapted, adapted.peft_config["default"]

    def add_callbacks_pre_trainer(self, cfg: Any, model: PreTrainedModel) -> list[mixora.AuxiliaryLossCallback]:
        return [mixora.AuxiliaryLossCallback()] if cfg.adapter == ADAPTER else []
