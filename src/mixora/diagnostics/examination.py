"""What a report shows of the routers, measured in one go over the batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mixora.diagnostics.measure import Tally, observe
from mixora.diagnostics.places import spread_over_depth
from mixora.diagnostics.record import Similar, SiteRouting, Typical
from mixora.diagnostics.similarity import Correlation, choices_of, cosines_of, find_similar
from mixora.diagnostics.typical import TokenCounts, find_strongest
from mixora.display.stages import Advance, count
from mixora.mixture import Mixture, mixtures_of
from mixora.passes import Stream
from mixora.routing import Observation, Routing

Batch = Mapping[str, Tensor]
STREAMS: tuple[Stream, ...] = ("source", "target")


@dataclass(frozen=True)
class Examination:
    """The parts of a `RunRecord` of the same names."""

    routing: list[SiteRouting]
    similar: list[Similar]
    typical: list[Typical]
    strongest: list[Typical]


def examine(
    model: nn.Module, batches: Sequence[Batch], tokenizer: PreTrainedTokenizerBase, advance: Advance | None = None
) -> Examination:
    """What the routers of the active adapter do with the real tokens of the batches, in evaluation mode.

    Sites with one expert are left out; tokens and likeness are not told where a router does not look at its input.
    Weights, gradients and mode of the model stay as they are. `advance` is told the batches done, and all. Raises
    `ModelError` for a model without active sites.
    """
    layers = {layer.path: layer for layer in mixtures_of(model)}
    batch_ids = [{stream: _token_ids(model, batch, stream) for stream in STREAMS} for batch in batches]
    known = [ids.flatten() for ids_of in batch_ids for ids in ids_of.values() if ids is not None]
    vocabulary_V = torch.cat(known).unique() if known else torch.zeros(0, dtype=torch.long)
    sites: dict[str, _Site] = {}
    watched = batches if advance is None else count(batches, advance)
    for ids_of, observations in zip(batch_ids, observe(model, watched), strict=True):
        for seen in observations:
            if seen.routing.num_experts > 1:
                site = sites.setdefault(seen.path, _Site(layers[seen.path], seen, vocabulary_V))
                site.add(seen.routing, ids_of)
    return _summarise(layers, sites, tokenizer)


def _summarise(
    layers: Mapping[str, Mixture], sites: Mapping[str, "_Site"], tokenizer: PreTrainedTokenizerBase
) -> Examination:
    def decode(token: int) -> str:
        text = str(tokenizer.decode([token]))
        # part of a letter in UTF-8 has no text of its own
        return str(tokenizer.convert_ids_to_tokens(token)) if "\N{REPLACEMENT CHARACTER}" in text else text

    counted = [path for path, site in sites.items() if site.counts.seen_V.any()]
    chosen = [counted[place] for place in spread_over_depth(counted)] if counted else []
    return Examination(
        routing=[_describe(path, site.tally) for path, site in sites.items()],
        similar=_find_similar(layers, sites),
        typical=[row for path in chosen for row in sites[path].counts.find_typical(path, decode)],
        strongest=find_strongest(sites[path].counts.find_typical(path, decode, most=1) for path in counted),
    )


class _Site:
    """The sums over the batches at one routed site."""

    def __init__(self, layer: Mixture, seen: Observation, vocabulary_V: Tensor) -> None:
        parts = layer.parts[seen.adapter]
        self.stream, self.is_blind = parts.stream, parts.router.is_static
        self.tally = Tally(seen.routing.num_experts)
        self.correlation = Correlation()
        self.counts = TokenCounts(vocabulary_V, seen.routing.num_experts)

    def add(self, routing: Routing, ids_of: Mapping[Stream, Tensor | None]) -> None:
        self.tally.add(routing)
        if self.is_blind:
            return
        choices_TE = choices_of(routing)
        self.correlation.add(choices_TE)
        ids = ids_of[self.stream]
        if ids is not None and ids.numel() == len(routing.valid_T):
            self.counts.add(ids.flatten()[routing.valid_T.cpu()], choices_TE)


def _token_ids(model: nn.Module, batch: Batch, stream: Stream) -> Tensor | None:
    """The token at each place of a stream, [B, S] on the CPU; None where there are no tokens."""
    ids = batch.get("input_ids" if stream == "source" else "decoder_input_ids")
    if ids is None and stream == "target" and "labels" in batch:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        ids = None if shift is None else shift(labels=batch["labels"])
    return None if ids is None else ids.cpu()


def _describe(path: str, tally: Tally) -> SiteRouting:
    numbers = tally.numbers()
    return {
        "path": path,
        "experts_per_token": numbers["experts_per_token"],
        "entropy": numbers["entropy"],
        "max_entropy": numbers["max_entropy"],
        "dropped_share": numbers["dropped_share"],
        "dead_experts": numbers["dead_experts"],
        "load": numbers["load"],
    }


def _find_similar(layers: Mapping[str, Mixture], sites: Mapping[str, _Site]) -> list[Similar]:
    """For every module with experts to choose from; where a router serves several, one tells of the routing."""
    found = []
    for path, layer in layers.items():
        for adapter in layer.active_adapters:
            parts = layer.parts.get(adapter)
            if parts is None or parts.router.is_static or len(parts.shape.ranks) < 2:
                continue
            tensors = layer.parameters_of(adapter)
            cosines_EE = cosines_of(tensors["A"], tensors["B"], parts.shape.ranks)
            found += find_similar(path, cosines_EE, sites[path].correlation.values() if path in sites else None)
    return found
