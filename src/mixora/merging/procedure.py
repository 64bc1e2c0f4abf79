"""The whole way of a merge: what can be merged and how, the pairs, the files, the measured change, the card."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from mixora.cards import Facts, facts_of
from mixora.config import did_you_mean
from mixora.display.stages import Stage, silently
from mixora.errors import CheckpointError, ConfigError
from mixora.files.folders import check_folder, claim_folder
from mixora.host.versions import MIXORA
from mixora.merging.approximation import Approximation, Batch, active_rank, approximate
from mixora.merging.card import write_companions
from mixora.merging.comparison import Comparison, compare
from mixora.merging.export import Pairs, name_base, write_dense, write_lora, write_mixture
from mixora.merging.result import Form, Merged, MergedSite
from mixora.merging.soup import Soup, cook
from mixora.mixture import Mixture, mixtures_of
from mixora.mixture.low_rank import LowRank
from mixora.routing.draws import Draw
from mixora.tuner import MixoraConfig

Found = dict[str, tuple[LowRank, MergedSite]]


@torch.no_grad()
def merge(
    model: PeftModel,
    out: str | Path,
    *,
    to: Form = "peft-lora",
    rank: int | None = None,
    uniform_rank: bool = False,
    soup: Collection[Batch] | None = None,
    approximation: Approximation | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Facts | None = None,
    overwrite: bool = False,
    progress: Stage = silently,
) -> Merged:
    """Write the active adapter of `model` to the folder `out` as an ordinary PEFT LoRA adapter, with a model card.

    `to`: `dense` writes the base with the change in its weights instead, which uses up `model`; `averaged`, for drawn
    adapters behind modules, an adapter of ours with one expert. Sites whose routing is the same for every input give
    the same outputs; `rank` cuts their pairs by singular value decomposition, and `uniform_rank` fills those of lower
    rank up with zeros, so that all have one. Drawn experts (AdaMix) are averaged, all of them or those that a greedy
    `soup` on held-out batches chooses. Sites routed by the input get the LoRA that is nearest on `approximation.fit`,
    of `rank` (by default `active_rank`); loss and logits are compared on its `held_out`. `tokenizer` is written beside.
    `facts`: what the card tells, by default what the adapter's configuration knows. `overwrite`: replace what mixora
    wrote to `out` before. `progress` is told what is being done and gives a context with a function of (done, total).

    Raises `ConfigError` for routed sites without `approximation`, options without effect, and an `out` that is not
    empty; `MixoraError` for routed experts behind modules.
    """
    adapter, modules = _read_sites(model)
    config = model.peft_config[adapter]
    routed = _find_routed(config, adapter, modules, rank, approximation is not None)
    _check_form(modules, adapter, to, rank, uniform_rank, approximation is not None)
    check_folder(out, overwrite)
    cooked = None if soup is None else _cook(model, modules, adapter, soup, progress)
    members = None if cooked is None else cooked.members
    exact = [module for module in modules if module not in routed and to != "averaged"]
    found = {module.path: _cut(module, adapter, rank, members) for module in exact}
    if approximation is not None:
        found |= _fit(model, routed, adapter, approximation, rank, progress)
    if uniform_rank:
        found = _level(found)
    pairs = {path: pair for path, (pair, _) in found.items()}
    folder = claim_folder(out, overwrite)
    sites = tuple(_describe(module, adapter, found, members) for module in modules)
    merged = Merged(folder, to, str(name_base(config.base_model_name_or_path)), config.recipe, sites, soup=cooked)
    if approximation is not None:
        origin = f"{len(approximation.fit)} batches of {approximation.origin}"
        merged = replace(merged, fitted_on=origin, changes=_measure(model, modules, pairs, approximation, progress))
    with progress(f"writing {folder}"):
        _write(merged, model, adapter, pairs)
        # a dense model has used `model` up, but not its configuration
        write_companions(merged, facts or _read_facts(model, config), tokenizer)
    return merged


def foresee(
    model: PeftModel,
    *,
    to: Form = "peft-lora",
    rank: int | None = None,
    uniform_rank: bool = False,
    approximate: bool = False,
) -> dict[str, str]:
    """How `merge` would get to each site, by path; `model` may stand on the meta device.

    Raises what `merge` would raise of the adapter and the options.
    """
    adapter, modules = _read_sites(model)
    routed = _find_routed(model.peft_config[adapter], adapter, modules, rank, approximate)
    _check_form(modules, adapter, to, rank, uniform_rank, approximate)
    static = "averaged" if to == "averaged" else "exact" if rank is None else f"cut to rank {rank}"
    return {module.path: "fitted" if module in routed else static for module in modules}


def _write(merged: Merged, model: PeftModel, adapter: str, pairs: Pairs) -> None:
    if merged.form == "averaged":
        write_mixture(merged.out, model, adapter, merged.soup.members if merged.soup else None)
    elif merged.form == "dense":
        write_dense(merged.out, model, pairs)
    else:
        write_lora(merged.out, model, adapter, pairs)


def _check_form(
    modules: list[Mixture], adapter: str, to: Form, rank: int | None, uniform_rank: bool, approximate: bool
) -> None:
    """`ConfigError` where `to` cannot hold the merged adapter, or options have no meaning there."""
    behind = [module for module in modules if module.parts[adapter].expert.reads == "output"]
    options = {"rank": rank is not None, "uniform_rank": uniform_rank, "approximate": approximate}
    asked = [name for name, is_asked in options.items() if is_asked]
    if to not in get_args(Form):
        raise ConfigError(f"to: got {to!r}{did_you_mean(to, get_args(Form))}")
    unfit = [*([] if to == "averaged" else [to]), *asked]
    if behind and unfit:
        raise ConfigError(
            f"{', '.join(unfit)}: {behind[0].path} has an adapter behind it, with a non-linearity inside, that no "
            "weight and no LoRA can hold; valid: averaged, an adapter of mixora's own with one expert"
        )
    if to == "averaged" and not behind:
        raise ConfigError("averaged: no expert of this adapter stands behind a module; valid: peft-lora")
    if uniform_rank and to == "dense":
        raise ConfigError("uniform_rank: a dense model has no ranks; valid: with peft-lora")


def _cook(model: PeftModel, modules: list[Mixture], adapter: str, batches: Collection[Batch], progress: Stage) -> Soup:
    with progress("cooking a soup, experts") as advance:
        return cook(model, modules, adapter, batches, advance)


def _describe(module: Mixture, adapter: str, found: Found, members: tuple[int, ...] | None) -> MergedSite:
    if module.path in found:
        return found[module.path][1]
    served = module.parts[adapter].router.serve(module.parameters_of(adapter), Draw(members=members))
    return MergedSite(module.path, "averaged", len(served["A"]), 0.0)


def _read_facts(model: PeftModel, config: PeftConfig) -> Facts:
    base: Any = model.get_base_model()
    return facts_of(config, outputs=base.config.num_labels if config.task_type == "SEQ_CLS" else None)


def _read_sites(model: PeftModel) -> tuple[str, list[Mixture]]:
    adapter = model.active_adapter
    kind = model.peft_config[adapter].peft_type
    if kind != MIXORA:
        raise CheckpointError(f"the active adapter {adapter!r} is of type {kind}; valid: {MIXORA.value}")
    modules = [module for module in mixtures_of(model) if adapter in module.parts]
    if any(module.merged for module in modules):
        raise ConfigError("the adapter is merged into the weights; valid: call unmerge_adapter() first")
    return adapter, modules


def _find_routed(
    config: PeftConfig, adapter: str, modules: list[Mixture], rank: int | None, approximate: bool
) -> list[Mixture]:
    """The sites that have to be fitted, once it is sure that the adapter can be merged as asked."""
    routed = [module for module in modules if not module.parts[adapter].router.is_static]
    if rank is not None and rank < 1:
        raise ConfigError(f"rank: got {rank}; valid: 1 or more")
    for module in routed:
        if module.parts[adapter].expert.reads == "output" or module.parts[adapter].firsts:
            # raises, with the reason
            module.as_low_rank(adapter)
    if routed and not approximate:
        raise ConfigError(_name_obstacle(config, routed))
    if approximate and not routed:
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


def _cut(
    module: Mixture, adapter: str, rank: int | None, members: tuple[int, ...] | None
) -> tuple[LowRank, MergedSite]:
    whole = module.as_low_rank(adapter, members)
    pair, error = whole.truncate(rank or whole.rank)
    return pair, MergedSite(module.path, "exact" if pair is whole else "truncated", pair.rank, error)


def _level(found: Found) -> Found:
    """All pairs with the largest rank among them."""
    rank = max(pair.rank for pair, _ in found.values())
    return {path: (pair.pad(rank), replace(site, rank=rank)) for path, (pair, site) in found.items()}


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
