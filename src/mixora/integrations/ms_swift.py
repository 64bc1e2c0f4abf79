"""A tuner of ms-swift: `register` in a file of `--external_plugins` makes `--tuner_type mixora` known."""

from typing import Any

from peft import PeftModel, get_peft_model
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map
from transformers import PreTrainedModel

import mixora
from mixora.errors import ConfigError

NAME = "mixora"


class AuxiliaryLossCallback(mixora.AuxiliaryLossCallback):
    """As ms-swift makes its callbacks: from the trainer's arguments and the trainer."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()


def register(recipe: str, /, **settings: Any) -> None:
    """Make tuner and callback `mixora` known to ms-swift, with the adapter that `mixora.recipe` gives.

    `task_type` is `CAUSAL_LM` unless it is given. Raises `ConfigError` as `mixora.recipe` does.
    """
    config = mixora.recipe(recipe, **{"task_type": "CAUSAL_LM", **settings})

    class MixoraTuner(PeftTuner):
        """Saving is that of PEFT, which the base class calls."""

        @staticmethod
        def prepare_model(args: Any, model: PreTrainedModel) -> PeftModel:
            if NAME not in args.callbacks:
                raise ConfigError(
                    f"callbacks: got {args.callbacks}; valid: --callbacks {NAME} with --tuner_type {NAME}"
                )
            return get_peft_model(model, config)

        @staticmethod
        def from_pretrained(model: PreTrainedModel, model_id: str, **kwargs: Any) -> PeftModel:
            if isinstance(model, PeftModel):
                raise ConfigError(f"adapters: one is loaded before {model_id}; valid: one adapter of tuner {NAME}")
            return mixora.from_pretrained(model, model_id, **kwargs)

    tuners_map[NAME] = MixoraTuner
    callbacks_map[NAME] = AuxiliaryLossCallback
