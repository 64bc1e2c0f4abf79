"""Checkpoints of other code -> adapters of ours: crafted models, and MoLA and MixLoRA adapters of MoE-PEFT."""

from functools import partial
from pathlib import Path

from peft.utils.constants import CONFIG_NAME

from mixora.conversion.crafted import convert_crafted
from mixora.conversion.moe_peft import convert_moe_peft
from mixora.display.stages import Stage, silently
from mixora.errors import CheckpointError, ConfigError
from mixora.files.folders import check_folder, claim_folder
from mixora.planning.plan import Plan


def convert(
    checkpoint: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Stage = silently,
) -> Plan:
    """Write the adapter in the folder `checkpoint` to `out/adapter`, as mixora reads it; returns its plan.

    A released Camelidae, Qwen2idae or Sparsetral checkpoint holds its base too, which becomes `out/base`. A MoLA or
    MixLoRA adapter of MoE-PEFT names its base; `model`, which is for these only, names another one of the same shape,
    as `mixora.bases.load_base` takes it. Of a base that is named, no weights are read.

    Every tensor that is missing, unexpected or of the wrong shape stands in one `CheckpointError`, as do settings that
    cannot be met exactly; nothing is written then. No code in a file is run. `ConfigError` where `out` is not empty,
    `ModelError` for a base that cannot be read. `overwrite`: replace what mixora wrote to `out` before. `dry_run`:
    check everything and write nothing. `progress`: told what is being done.
    """
    source = Path(checkpoint)
    reads = [source] if model is None else [source, model]
    check_folder(out, overwrite, reads)
    claim = None if dry_run else partial(claim_folder, out, overwrite, reads)
    if (source / "config.json").is_file():
        if model is not None:
            raise ConfigError(f"model: got {str(model)!r}, but {source} holds its own base; valid: no model")
        return convert_crafted(source, claim, progress)
    if (source / CONFIG_NAME).is_file():
        return convert_moe_peft(source, claim, model)
    raise CheckpointError(
        f"{source}: has neither config.json nor {CONFIG_NAME}; valid: the folder of a released Camelidae, Qwen2idae or "
        "Sparsetral checkpoint, or of a MoLA or MixLoRA adapter of MoE-PEFT"
    )
