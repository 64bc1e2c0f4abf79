"""How far adapter experts behind a module are from full ones, at the first step of the latter. Our own definition.

Beside what its adapter of rank R gives now, let expert i add s M_i f(x) to the output f(x) of the frozen module, with
any matrix M_i. From M_i = 0, gradient descent sets out along

    G_i = dL/dM_i = sum_t w_ti s g_t f(x_t)^T        [d, d], over the real tokens t that have weight w_ti > 0

with g_t the gradient of the loss at the site's output. The matrix of rank R nearest to G_i keeps its R largest singular
values (Eckart and Young 1936); the share of ||G_i||_F^2 beyond them is what no single map of rank R can follow.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixora.errors import DataError, ModelError
from mixora.mixture import Mixture, mixtures_of
from mixora.mixture.parts import Parts
from mixora.passes import tracing
from mixora.routing import Routing

Batch = Mapping[str, Tensor]


def residual_energy(model: nn.Module, batches: Batch | Iterable[Batch]) -> list[dict[str, Any]]:
    """The share of each expert's first step that lies beyond its rank, for experts behind modules (PESC, AdaMix).

    Expert i takes that step along `G_i = sum_t w_ti s g_t f(x_t)^T`, [d, d], over its real tokens t of weight w_ti:
    g_t is the gradient of the loss at the site's output, f(x_t) the output of the frozen module, s the scale.
    `batches` (or one batch): what the model's forward takes, labels included; G_i is summed over them, with the task's
    loss of each as it is, in evaluation mode. Returns a list with a dictionary per site and active adapter: `path`,
    `adapter`, and for each expert `ranks`, `tokens` (real tokens with weight) and `beyond_rank`: 0 where rank R holds
    the whole first step, as it must with R tokens or fewer; 1 - R/d, the most there is, where all singular values are
    equal; None where no gradient arrives.

    A diagnostic and no claim: it tells of one gradient at the present weights, and of linear maps, while an adapter has
    a non-linearity and its own path of training. Sums take E d^2 fp32 numbers per site (fp64 for fp64 models).
    Weights, gradients and mode of the model stay as they are. Raises `ModelError` for a model without such experts,
    `DataError` for batches without a finite loss.
    """
    sites = {module.path: module for module in mixtures_of(model) if _behind(module)}
    sums: dict[tuple[str, str], _Steps] = {}
    with _evaluating(model), torch.enable_grad():
        for batch in [batches] if isinstance(batches, Mapping) else batches:
            for path, adapter, routing, frozen_TO, gradient_TO in _look(model, sites, batch):
                steps = sums.setdefault((path, adapter), _Steps(sites[path].parts[adapter]))
                steps.add(routing, frozen_TO, gradient_TO)
    if not sums:
        raise ModelError(
            "no active experts behind a module were run; valid: an enabled adapter of a recipe such as 'pesc'"
        )
    return [{"path": path, "adapter": adapter, **steps.numbers()} for (path, adapter), steps in sums.items()]


def _behind(module: Mixture) -> list[str]:
    """The active adapters whose experts stand behind the module."""
    names = [] if module.disable_adapters else module.active_adapters
    return [name for name in names if name in module.parts and module.parts[name].expert.reads == "output"]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _look(
    model: nn.Module, sites: Mapping[str, Mixture], batch: Batch
) -> Iterator[tuple[str, str, Routing, Tensor, Tensor]]:
    """For every run of a site: its path, an adapter and its routing, f(x) [T, d] and the gradient there [T, d]."""
    device = next(model.parameters()).device
    with tracing() as trace, _watched(sites) as runs:
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    if loss is None:
        raise DataError("batches: the model gives no loss on them; valid: batches with labels")
    if not runs:
        return
    # not backward(), which would leave gradients with the parameters
    outputs = [output for _, _, output in runs]
    gradients = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
    if not all(tensor.isfinite().all() for tensor in (loss, *gradients)):
        raise DataError("batches: the loss or its gradient is not finite; valid: batches in which a label counts")
    routings: dict[tuple[str, str], deque[Routing]] = defaultdict(deque)
    for seen in trace.observations:
        routings[seen.path, seen.adapter].append(seen.routing)
    for (path, frozen, _), gradient in zip(runs, gradients, strict=True):
        for adapter in _behind(sites[path]):
            yield path, adapter, routings[path, adapter].popleft(), frozen.flatten(0, -2), gradient.flatten(0, -2)


@contextmanager
def _watched(sites: Mapping[str, Mixture]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """For every run of a site: its path, what the frozen module gave, and its output, which a gradient can reach."""
    runs: list[tuple[str, Tensor, Tensor]] = []
    frozen: dict[str, Tensor] = {}

    def keep_frozen(path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        frozen[path] = output.detach()

    def keep_run(path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            # nothing before it is trained: the graph begins here
            output.requires_grad_()
        runs.append((path, frozen.pop(path), output))

    handles = []
    for path, module in sites.items():
        handles.append(module.base_layer.register_forward_hook(partial(keep_frozen, path)))
        handles.append(module.register_forward_hook(partial(keep_run, path)))
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


class _Steps:
    """The sums G_i of the experts of one site."""

    def __init__(self, parts: Parts) -> None:
        experts = parts.router.num_experts
        # a router that draws holds the tensors of one expert at a time
        self.ranks = parts.shape.ranks * (experts if parts.router.draws else 1)
        self.tokens = [0] * experts
        self.sums_EOO: Tensor | None = None

    def add(self, routing: Routing, frozen_TO: Tensor, gradient_TO: Tensor) -> None:
        """The tokens of one run; s is left out, which changes no share."""
        dtype, width = torch.promote_types(frozen_TO.dtype, torch.float32), frozen_TO.shape[1]
        if self.sums_EOO is None:
            self.sums_EOO = frozen_TO.new_zeros(len(self.tokens), width, width, dtype=dtype)
        gates_TE = (routing.gates_TE().detach() * routing.valid_T[:, None]).to(dtype)
        for expert, gate_T in enumerate(gates_TE.T):
            chosen = (gate_T > 0).nonzero()[:, 0]
            weighted_TO = gate_T[chosen, None] * gradient_TO[chosen].to(dtype)
            self.sums_EOO[expert].addmm_(weighted_TO.T, frozen_TO[chosen].to(dtype))
            self.tokens[expert] += len(chosen)

    def numbers(self) -> dict[str, Any]:
        assert self.sums_EOO is not None
        shares = [_beyond(step, rank) for step, rank in zip(self.sums_EOO, self.ranks, strict=True)]
        return {"ranks": list(self.ranks), "tokens": self.tokens, "beyond_rank": shares}


def _beyond(step_OO: Tensor, rank: int) -> float | None:
    """The share of the squared singular values that lies beyond the `rank` largest."""
    step_OO = step_OO.double()
    # half the work of singular values; what the square loses is below rounding of the whole
    energies_O = torch.linalg.eigvalsh(step_OO @ step_OO.T).clamp(min=0)
    whole = float(energies_O.sum())
    return float(energies_O[: max(len(energies_O) - rank, 0)].sum()) / whole if whole else None
