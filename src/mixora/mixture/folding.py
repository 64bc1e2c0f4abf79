"""Adapters folded into frozen weights, where what they add is the same linear map for every input."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixora.contracts import Parameters
from mixora.errors import MixoraError, ModelError
from mixora.mixture.low_rank import LowRank
from mixora.mixture.parts import Parts
from mixora.routing.draws import Draw


class Foldable(BaseTunerLayer):
    """What PEFT's merging asks of an adapted module."""

    path: str
    base_layer: Any
    parts: dict[str, Parts]
    parameters_of: Callable[[str], Parameters]
    merged_adapters: list[str]

    def as_low_rank(self, adapter: str, members: tuple[int, ...] | None = None) -> LowRank:
        """What a merge adds to the frozen weight, as a pair. Only where the routing does not depend on the input.

        `members`: the experts whose mean it is, where one is drawn for each pass; None for all.
        """
        parts = self.parts[adapter]
        if parts.expert.reads == "output" or parts.firsts:
            place = "go through the feed-forward part" if parts.firsts else "stand behind the module"
            raise MixoraError(
                f"{self.path}: cannot be merged: its experts {place}, with a non-linearity inside; "
                "valid: merge adapters beside linear modules (recipe 'lora'), or keep the adapter and use unload()"
            )
        if not parts.router.is_static:
            raise MixoraError(
                f"{self.path}: cannot be merged: its router chooses experts by the input; "
                "valid: merge adapters without routing (recipe 'lora'), or keep the adapter and use unload()"
            )
        tensors = parts.router.serve(self.parameters_of(adapter), Draw(members=members))
        return LowRank(tensors["A"], tensors["B"], parts.expert.scale(parts.shape))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a merge adds to the frozen weight: [out, in]."""
        return self.as_low_rank(adapter).delta_OI()

    def check_foldable(self, adapter: str) -> None:
        """`MixoraError` where the adapter cannot be merged into the frozen weight."""
        self.as_low_rank(adapter)
        self.check_weight()

    def check_weight(self) -> None:
        """`MixoraError` where nothing can be added to the frozen weight."""
        weight = self.base_layer.weight.data
        if type(weight) is not Tensor or not weight.is_floating_point():
            raise MixoraError(
                f"{self.path}: cannot be merged: the frozen weight is quantised or sharded ({type(weight).__name__} of "
                f"{weight.dtype}); valid: mixora.merge, which writes a LoRA adapter for such a base, or unload()"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters to the frozen weight."""
        for adapter in adapter_names or self.active_adapters:
            if adapter in self.parts and adapter not in self.merged_adapters:
                self.shift_base_weight(self.get_delta_weight(adapter), safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged adapters out of the frozen weight again (to rounding)."""
        while self.merged_adapters:
            self.shift_base_weight(-self.get_delta_weight(self.merged_adapters.pop()), safe_merge=False)

    def shift_base_weight(self, delta_OI: Tensor, safe_merge: bool) -> None:
        """Add to the frozen weight; with `safe_merge`, `MixoraError` where the sum is not finite."""
        weight = self.base_layer.weight.data
        is_transposed = isinstance(self.base_layer, Conv1D)
        shifted = weight + (delta_OI.T if is_transposed else delta_OI).to(weight.dtype)
        if safe_merge and not torch.isfinite(shifted).all():
            raise MixoraError(f"{self.path}: merging gives weights that are not finite; nothing was changed here")
        self.base_layer.weight.data = shifted

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a plain LoRA."""
        parts = self.parts.get(adapter_name)
        return parts is not None and parts.router.is_static and parts.expert.reads == "input" and not parts.firsts


def check_untied(model: nn.Module, sites: Iterable[Foldable]) -> None:
    """`ModelError` for a site of `model` whose frozen weight another module has too, which would change with it."""
    holders: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            holders[id(weight)].append(path.replace(".base_layer", ""))
    for site in sites:
        others = [path for path in holders[id(site.get_base_layer().weight)] if path != site.path]
        if others:
            raise ModelError(
                f"{site.path}: cannot be merged: shares its weight with {others[0]}, which would change too; "
                "valid: mixora.merge, which writes a LoRA adapter, or unload()"
            )
