"""How the auxiliary loss of a site reaches its router under a trainer that does not know of it.

An identity on the site's output carries the loss's gradient into backward. Of a site that a pass calls several times
the mean over its calls counts; how many there are is known in backward. Where several processes train, the loss is
known when the pass is over and their sums are added up: once for all sites, and never in backward.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mixora.errors import TrainingError
from mixora.host.world import count_processes
from mixora.passes.forward import Pass, Pooled
from mixora.routing import Routing


def inject(site: Any, adapter: str, y: Tensor, routing: Routing, here: Pass) -> Tensor:
    """`y`, whose backward adds the gradient of the auxiliary loss of `site`, a `Mixture`, and notes its terms."""
    sums = site.parts[adapter].add_up(routing)
    # a layer called by itself has no end of a pass to wait for
    if count_processes() > 1 and here.with_grad:
        return _inject_pooled(site, adapter, y, sums, here)
    total, terms = site.parts[adapter].conclude(sums)
    of_site = (site.path, adapter)
    if not here.is_replay:
        site.readings[adapter] = terms
        here.calls[of_site] += 1
    if total is None or not torch.is_grad_enabled():
        return y
    return _AddGradient.apply(y, total * site.auxiliary_scale, here.calls, of_site)


def _inject_pooled(site: Any, adapter: str, y: Tensor, sums: Any, here: Pass) -> Tensor:
    leaves, form = tree_flatten(sums)
    if not leaves:
        return y
    calls = here.pooled.setdefault((site.path, adapter), [])
    if here.is_replay and len(calls) > 1:
        raise TrainingError(
            f"{site.path}: is called {len(calls)} times in a pass and recomputed, so its auxiliary losses cannot be "
            "told apart; valid with several processes: mixora.Trainer, mixora.SFTTrainer, no activation checkpointing"
        )
    if not here.is_replay:
        # the mean of the processes' gradients shall be that of the loss
        scale = site.auxiliary_scale * count_processes()

        def hear(of_all: list[Tensor]) -> list[Tensor]:
            with torch.enable_grad():
                found = [_leaf(total) for total in of_all]
                loss, site.readings[adapter] = site.parts[adapter].conclude(tree_unflatten(found, form))
                return list(torch.autograd.grad(loss * scale / len(calls), found))

        calls.append(Pooled([leaf.detach() for leaf in leaves], hear))
    return _AddPooled.apply(y, calls[-1], *leaves) if torch.is_grad_enabled() else y


def _leaf(total: Tensor) -> Tensor:
    return total.detach().to(torch.promote_types(total.dtype, torch.float32)).requires_grad_()


class _AddGradient(torch.autograd.Function):
    """The identity on `y`; in backward, `loss` gets the gradient as if its mean over `calls` were in the final loss."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, calls: Counter[tuple[str, str]], of_site: tuple[str, str]) -> Tensor:
        ctx.calls, ctx.of_site = calls, of_site
        ctx.made_as = {"dtype": loss.dtype, "device": loss.device}
        # not as a view, which a model could not add to in place
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return grad_y, torch.full((), 1 / ctx.calls[ctx.of_site], **ctx.made_as), None, None


class _AddPooled(torch.autograd.Function):
    """The identity on `y`; in backward, the sums get the gradients that are known since the pass is over."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, pooled: Pooled, *sums: Tensor) -> Tensor:
        ctx.pooled = pooled
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.pooled.gradients
        return (
            grad_y,
            None,
            *[g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[2:], strict=True)],
        )
