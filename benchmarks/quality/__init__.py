"""Does a mixture beat one LoRA? Tables of methods × data sets × seeds with tuned learning rates: `docs/evidence.md`."""
