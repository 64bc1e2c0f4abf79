"""The loss of one batch: the task's own, the auxiliary losses of the routers, and those that compare two passes."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, nn

from mixora.errors import DataError, TrainingError
from mixora.host.world import sum_over_processes
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from mixora.passes.activations import lean_activations
from mixora.routing import Trace
from mixora.training.fused_head import FusedHead, Result, run_fused, why_not_fused
from mixora.training.second_pass import Agreement, Pair, compare_passes, second_passes


def auxiliary_loss(model: nn.Module, trace: Trace) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The sum of all auxiliary losses over the traced passes that had gradients on, averaged over these passes.

    Of a module that a pass calls several times, such as a block that all layers share, the mean over its calls counts.
    Where several processes train, of the tokens of all of them: each must call this with the sites of its own batch.
    Returns an fp32 scalar with its graph, None where no loss is in force; and each term's mean over the sites, detached
    and without its coefficient. Raises `TrainingError` where checkpointing cut the routers off the graph.
    """
    layers = {layer.path: layer for layer in mixtures_of(model)}
    seen = [o for o in trace.observations if o.with_grad and o.path in layers]
    for observation in seen:
        layer, logits = layers[observation.path], observation.routing.logits_TE
        if (
            layer.parts[observation.adapter].losses
            and logits is not None
            and not logits.requires_grad
            and layer.is_router_trained(observation.adapter)
        ):
            raise TrainingError(
                f"{observation.path}: re-entrant activation checkpointing cuts the router off the auxiliary loss; "
                "valid: activation_checkpointing_kwargs={'use_reentrant': False}"
            )
    parts = [layers[observation.path].parts[observation.adapter] for observation in seen]
    sums = sum_over_processes([p.add_up(o.routing) for p, o in zip(parts, seen, strict=True)])
    calls = defaultdict(list)
    for o, part, of_tokens in zip(seen, parts, sums, strict=True):
        calls[o.path, o.adapter, o.pass_index].append(part.conclude(of_tokens))
    total, terms = None, defaultdict(list)
    for of_site in calls.values():
        values = [value for value, _ in of_site if value is not None]
        if values:
            total = _mean(values) if total is None else total + _mean(values)
        for name in of_site[0][1]:
            terms[name].append(_mean([found[name] for _, found in of_site]))
    passes = len({o.pass_index for o in seen})
    return None if total is None else total / passes, {name: torch.stack(t).mean() for name, t in terms.items()}


def _mean(calls: list[Tensor]) -> Tensor:
    """Without an operator where there is one call: most sites have one, and there are many of them."""
    return calls[0] if len(calls) == 1 else torch.stack(calls).mean()


@dataclass(frozen=True)
class Passes(Generic[Result]):
    """What ran: its result, the trace of its passes, and what compares them where a loss does."""

    result: Result
    trace: Trace
    pairs: list[Pair]
    agreement: Agreement | None


def run_passes(model: nn.Module, fused: FusedHead | None, run: Callable[[FusedHead | None], Result]) -> Passes[Result]:
    """`run(fused)`, which calls the model on a batch, under a trace and with the second passes that losses need.

    Runs without `fused` where the model proves to need its logits.
    """

    def run_traced(fused: FusedHead | None) -> Passes[Result]:
        close = None if fused is None else fused.close
        with tracing(owns_losses=True) as trace, second_passes(model, close) as pairs, lean_activations():
            result = run(fused)
        return Passes(result, trace, pairs, None if fused is None else fused.agreement)

    return run_fused(fused, model, run_traced)


def sum_losses(
    model: nn.Module, passes: Passes[Any], labels: Tensor | None, share: float = 1.0, tokens: Any = None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """All auxiliary losses of a micro-batch, by its `share` of the accumulated step.

    `tokens`: those of the whole step, by which losses over tokens are divided. Returns the weighted sum with its graph,
    None where no loss is in force, and each term for the log.
    """
    total, terms = auxiliary_loss(model, passes.trace)
    total = None if total is None else total * share
    compared = compare_passes(model, passes.pairs, labels, tokens, passes.agreement)
    for name, (value, coefficient) in compared.items():
        of_step = value * share if tokens is None else value
        total = of_step * coefficient if total is None else total + of_step * coefficient
        terms[name] = of_step.detach() / share
    return total, terms


def compute_loss(
    model: nn.Module, batch: Mapping[str, Any], fused_loss: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch with all auxiliary losses in it, for training loops of your own.

    `batch`: what the model's forward takes, labels included. Runs the second pass where a loss needs it. `fused_loss`:
    compute the cross entropy without the whole logits where that is exact. Returns the loss, a scalar with its graph,
    and each auxiliary term detached and without its coefficient. Raises `TrainingError`, and `DataError` for a batch
    without labels.
    """
    is_fused = fused_loss and model.training and why_not_fused(model) is None
    passes = run_passes(model, FusedHead(model) if is_fused else None, lambda _: getattr(model(**batch), "loss", None))
    if passes.result is None:
        raise DataError(f"the model gave no loss for a batch of {', '.join(batch)}; valid: one with labels")
    total, terms = sum_losses(model, passes, batch.get("labels")) if model.training else (None, {})
    return passes.result if total is None else passes.result + total, terms
