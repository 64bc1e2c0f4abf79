"""The whole way of a merge: what can be merged and how, the pairs, the files, the measured change, the card."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from mixora.errors import CheckpointError, ConfigError
from mixora.folders import claim_folder
from mixora.low_rank import LowRank
from mixora.merging.approximation import Advance, Approximation, active_rank, approximate
from mixora.merging.card import write_companions
from mixora.merging.comparison import Comparison, compare
from mixora.merging.export import Pairs, name_base, write_dense, write_lora
from mixora.merging.result import Merged, MergedSite
from mixora.mixture import Mixture
from mixora.tuner import MIXORA, MixoraConfig

Stage = Callable[[str], AbstractContextManager[Advance]]
Found = dict[str, tuple[LowRank, MergedSite]]


def _silently(label: str) -> AbstractContextManager[Advance]:
    return nullcontext(lambda done, total: None)


@torch.no_grad()
def merge(
    model: PeftModel,
    out: str | Path,
    *,
    rank: int | None = None,
    dense: bool = False,
    approximation: Approximation | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Stage = _silently,
) -> Merged:
    """Write the active adapter of `model` to the folder `out` as an ordinary PEFT LoRA adapter, with a model card.

    Sites whose routing is the same for every input give the same outputs; with `rank`, their pairs are cut to it by
    singular value decomposition. Sites routed by the input need `approximation`: they get the LoRA that is nearest on
    its `fit` batches, of `rank` (by default `active_rank`), and loss and logits are compared on `held_out` ones.
    `dense`: write the base with the change in its weights instead, which uses up `model`. `tokenizer` is written
    beside either. `progress` is told what is being done and gives a context with a function of (done, total).
    Raises `ConfigError` for routed sites without `approximation`, for one with nothing to approximate, and where `out`
    is not empty; `MixoraError` for experts behind modules.
    """
    adapter, modules = _read_sites(model)
    config = model.peft_config[adapter]
    routed = _find_routed(config, adapter, modules, rank, approximation)
    folder = claim_folder(out)
    found = {module.path: _cut(module, adapter, rank) for module in modules if module not in routed}
    if approximation is not None:
        found |= _fit(model, routed, adapter, approximation, rank, progress)
    pairs = {path: pair for path, (pair, _) in found.items()}
    merged = Merged(
        out=folder,
        form="dense" if dense else "adapter",
        base=str(name_base(config.base_model_name_or_path)),
        recipe=getattr(config, "recipe", None),
        sites=tuple(found[module.path][1] for module in modules),
        fitted_on=None if approximation is None else f"{len(approximation.fit)} batches of {approximation.origin}",
        changes=None if approximation is None else _measure(model, modules, pairs, approximation, progress),
    )
    (write_dense if dense else write_lora)(folder, model, adapter, pairs)
    write_companions(merged, config.task_type, tokenizer)
    return merged


def _read_sites(model: PeftModel) -> tuple[str, list[Mixture]]:
    adapter = model.active_adapter
    kind = model.peft_config[adapter].peft_type
    if kind != MIXORA:
        raise CheckpointError(f"the active adapter {adapter!r} is of type {kind}; valid: {MIXORA.value}")
    found = (module for module in model.modules() if isinstance(module, Mixture))
    modules = [module for module in found if adapter in module.parts]
    if any(module.merged for module in modules):
        raise ConfigError("the adapter is merged into the weights; valid: call unmerge_adapter() first")
    return adapter, modules


def _find_routed(
    config: PeftConfig, adapter: str, modules: list[Mixture], rank: int | None, approximation: Approximation | None
) -> list[Mixture]:
    """The sites that have to be fitted, once it is sure that the adapter can be merged as asked."""
    routed = [module for module in modules if not module.parts[adapter].router.is_static]
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: got {rank}; valid: 1 or more")
    for module in modules:
        if module not in routed or module.parts[adapter].expert.reads == "output":
            # raises, with the reason, where experts stand behind the module
            module.as_low_rank(adapter)
    if routed and approximation is None:
        raise ConfigError(_name_obstacle(config, routed))
    if approximation is not None and not routed:
        raise ConfigError("approximate: every site of this adapter is merged exactly; valid: merge it without")
    return routed


def _name_obstacle(config: PeftConfig, routed: list[Mixture]) -> str:
    assert isinstance(config, MixoraConfig) and config.plan is not None
    site = next(site for site in config.plan if site["path"] == routed[0].path)
    others = f" (and {len(routed) - 1} more sites)" if len(routed) > 1 else ""
    return (
        f"{site['path']}{others}: cannot be merged exactly: router {site['router']!r} of rule {site['rule']!r} weighs "
        "experts by the input, so no single LoRA computes the same; valid: --approximate (in Python: "
        "approximation=...) for the nearest one on data of yours, or keep the adapter"
    )


def _cut(module: Mixture, adapter: str, rank: int | None) -> tuple[LowRank, MergedSite]:
    whole = module.as_low_rank(adapter)
    pair, error = whole.truncate(rank or whole.rank)
    return pair, MergedSite(module.path, "exact" if pair is whole else "truncated", pair.rank, error)


def _fit(
    model: PeftModel, routed: list[Mixture], adapter: str, material: Approximation, rank: int | None, progress: Stage
) -> Found:
    with progress("fitting, batches") as advance:
        fitted = approximate(model, routed, adapter, material, rank or active_rank(routed, adapter), advance)
    return {path: (pair, MergedSite(path, "fitted", pair.rank, error)) for path, (pair, error) in fitted.items()}


def _measure(
    model: PeftModel, modules: list[Mixture], pairs: Pairs, material: Approximation, progress: Stage
) -> Comparison:
    with progress("comparing on held-out batches") as advance:
        return compare(model, modules, pairs, material.held_out, advance)
