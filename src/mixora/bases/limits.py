"""How large a base may say that it is, before anything is made of its configuration."""

from pathlib import Path

from transformers import PreTrainedConfig

from mixora.errors import ModelError

# of layers, or experts of a layer
MOST_PARTS = 10_000


def check_sizes(config: PreTrainedConfig, name: str | Path) -> None:
    """`ModelError` for more layers or experts than any model has, before a module is made for each."""
    for part in (config, config.get_text_config()):
        for field, value in vars(part).items():
            counts = "layers" in field or "experts" in field or field in ("n_layer", "depth")
            if counts and isinstance(value, int) and value > MOST_PARTS:
                raise ModelError(f"{name}: config.json: {field}: got {value}; valid: at most {MOST_PARTS}")
