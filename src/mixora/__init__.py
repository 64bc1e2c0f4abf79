"""Fine-tune Hugging Face models with mixtures of adapters."""

__version__ = "0.1.0"
