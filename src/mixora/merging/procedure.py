"""The whole way of a merge: what can be merged and how, the pairs, the files, the measured change, the card."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from mixora.errors import CheckpointError, ConfigError
from mixora.folders import claim_folder
from mixora.low_rank import LowRank
from mixora.merging.approximation import Advance, Approximation, Batch, active_rank, approximate
from mixora.merging.card import write_card
from mixora.merging.comparison import Comparison, compare
from mixora.merging.export import Pairs, name_base, write_dense, write_lora, write_mixture
from mixora.merging.result import Merged, MergedSite
from mixora.merging.soup import Soup, cook
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
    soup: Collection[Batch] | None = None,
    approximation: Approximation | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Stage = _silently,
) -> Merged:
    """Write the active adapter of `model` to the folder `out` as an ordinary PEFT LoRA adapter, with a model card.

    Sites whose routing is the same for every input give the same outputs; with `rank`, their pairs are cut to it by
    singular value decomposition. Where experts are drawn (AdaMix), their mean is merged, or with `soup`, held-out
    batches with labels, the mean of a greedy choice of them. Adapters behind modules, which no LoRA can express, become
    an adapter of ours with one expert.

    Sites routed by the input need `approximation`: they get the LoRA that is nearest on its `fit` batches, by least
    squares, of `rank` (by default the largest sum of ranks that the experts of one token have at any site), and loss
    and logits are compared on its `held_out` batches.

    `dense`: write the base with the change added to its weights instead; `model` is used up then. `tokenizer` is
    written beside either. `progress` is told what is being done and gives a context with a function of (done, total).

    Raises `ConfigError` where the routing depends on the input and there is no `approximation`, where an option has
    no effect, and where `out` is not empty; `MixoraError` for routed experts behind modules.
    """
    adapter, modules = _read_sites(model)
    routed = [module for module in modules if not module.parts[adapter].router.is_static]
    _check(model.peft_config[adapter], adapter, modules, routed, rank, approximation)
    form = _choose_form(modules, adapter, dense, rank, approximation)
    cooked = None if soup is None else _cook(model, modules, adapter, soup, progress)
    folder = claim_folder(out)
    members = None if cooked is None else cooked.members
    found: Found = {}
    if form != "mixture":
        found |= {module.path: _cut(module, adapter, rank, members) for module in modules if module not in routed}
    if approximation is not None:
        found |= _fit(model, routed, adapter, approximation, rank, progress)
    pairs = {module.path: found[module.path][0] for module in modules if module.path in found}
    config = model.peft_config[adapter]
    merged = Merged(
        out=folder,
        form=form,
        base=str(name_base(config.base_model_name_or_path)),
        recipe=getattr(config, "recipe", None),
        sites=tuple(_describe(module, adapter, found) for module in modules),
        fitted_on=None if approximation is None else f"{len(approximation.fit)} batches of {approximation.origin}",
        changes=None if approximation is None else _measure(model, modules, pairs, approximation, progress),
        soup=cooked,
    )
    if form == "mixture":
        write_mixture(folder, model, adapter, members)
    else:
        (write_dense if dense else write_lora)(folder, model, adapter, pairs)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    write_card(merged, task_type=config.task_type)
    return merged


def _choose_form(
    modules: list[Mixture], adapter: str, dense: bool, rank: int | None, approximation: Approximation | None
) -> Literal["adapter", "mixture", "dense"]:
    """What can hold the merged adapter; `ConfigError` for options that have no meaning there."""
    behind = [module for module in modules if module.parts[adapter].expert.reads == "output"]
    if not behind:
        return "dense" if dense else "adapter"
    unfit = {"dense": dense, "rank": rank is not None, "approximate": approximation is not None}
    named = [name for name, is_asked in unfit.items() if is_asked]
    if named:
        raise ConfigError(
            f"{', '.join(named)}: {behind[0].path} has an adapter behind it, with a non-linearity inside, that no "
            "weight and no LoRA can hold; valid: merge it without, into an adapter with one expert"
        )
    return "mixture"


def _cook(model: PeftModel, modules: list[Mixture], adapter: str, batches: Collection[Batch], progress: Stage) -> Soup:
    with progress("cooking a soup, experts") as advance:
        return cook(model, modules, adapter, batches, advance)


def _describe(module: Mixture, adapter: str, found: Found) -> MergedSite:
    if module.path in found:
        return found[module.path][1]
    return MergedSite(module.path, "averaged", max(module.parts[adapter].shape.ranks), 0.0)


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


def _check(
    config: PeftConfig,
    adapter: str,
    modules: list[Mixture],
    routed: list[Mixture],
    rank: int | None,
    approximation: Approximation | None,
) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: got {rank}; valid: 1 or more")
    for module in routed:
        if module.parts[adapter].expert.reads == "output" or module.parts[adapter].firsts:
            # raises, with the reason
            module.as_low_rank(adapter)
    if routed and approximation is None:
        raise ConfigError(_name_obstacle(config, routed))
    if approximation is not None and not routed:
        raise ConfigError("approximate: every site of this adapter is merged exactly; valid: merge it without")


def _name_obstacle(config: PeftConfig, routed: list[Mixture]) -> str:
    assert isinstance(config, MixoraConfig) and config.plan is not None
    site = next(site for site in config.plan if site["path"] == routed[0].path)
    others = f" (and {len(routed) - 1} more sites)" if len(routed) > 1 else ""
    return (
        f"{site['path']}{others}: cannot be merged exactly: router {site['router']!r} of rule {site['rule']!r} weighs "
        "experts by the input, so no single LoRA computes the same; valid: --approximate (in Python: "
        "approximation=...) for the nearest one on data of yours, or keep the adapter"
    )


def _cut(
    module: Mixture, adapter: str, rank: int | None, members: tuple[int, ...] | None
) -> tuple[LowRank, MergedSite]:
    whole = module.as_low_rank(adapter, members)
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
