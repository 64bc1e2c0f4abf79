"""Where numbers stop being finite: a training step is run under watch, forwards and back, and the first place is named.

Watching waits for the device at every module, so it is for a step that is known to go wrong.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mixora.losses.fused import CHUNK, IGNORED
from mixora.mixture import Mixture
from mixora.passes import current
from mixora.training.second_pass import base_of

Kind = Literal["input", "router", "experts", "frozen", "trained", "before", "logits", "loss", "gradient", "norm"]
WORDS: dict[Kind, str] = {
    "input": "{} of the batch",
    "router": "the router's outputs at {}",
    "experts": "the experts' output at {}",
    "frozen": "the output of the frozen module {}",
    "trained": "the output of the trained module {}",
    "before": "what reaches {}",
    "logits": "the logits {}",
    "loss": "the loss ({})",
    "gradient": "the gradient of {}",
    "norm": "the norm of all gradients, of which the largest is that of {}",
}
_SMALLER = "a smaller learning_rate, or warmup_steps"
ADVICE: dict[Kind, str] = {
    "input": "look at these rows of the data",
    "router": f"{_SMALLER}, or losses.z_loss.coefficient above 0",
    "experts": _SMALLER,
    "frozen": "the base in float32 or bfloat16 where it is in float16; check its weights",
    "trained": _SMALLER,
    "before": f"the base in float32 or bfloat16 where it is in float16; {_SMALLER}",
    "logits": f"the base in float32 or bfloat16 where it is in float16; {_SMALLER}; look at these rows of the data",
    "loss": "look at these rows of the data",
    "gradient": f"{_SMALLER}; bfloat16 or float32 in the place of float16",
    "norm": _SMALLER,
}
_BEFORE = "NaN or Inf stood in its"


@dataclass(frozen=True)
class Place:
    """The first place in a step. `path`: of the module, parameter, loss or tensor of the batch. `numbers`: what it has.

    `micro_batch`: the how manieth of the step, from 1. `rows`: places in that micro-batch, where some and not all are
    concerned. `remark`: what else is known.
    """

    kind: Kind
    path: str
    numbers: str
    rows: tuple[int, ...] = ()
    remark: str = ""
    micro_batch: int = 1

    def __str__(self) -> str:
        remark = f" ({self.remark})" if self.remark else ""
        return f"{WORDS[self.kind].format(self.path)}: {self.numbers}{remark}"

    @property
    def is_shared(self) -> bool:
        """Whether numbers of other processes are in it: balance statistics are those of all, and so are gradients."""
        return self.kind in ("loss", "gradient", "norm")

    @property
    def advice(self) -> str:
        """What to try."""
        return "an earlier checkpoint, or another copy of the base" if _BEFORE in self.remark else ADVICE[self.kind]


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; waits for the device."""
    return bool(torch.isfinite(tensor).all())


def count_bad(tensor: Tensor) -> str:
    """What is not finite in a tensor, in words."""
    nans, infs = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    found = [f"{count} {name}" for count, name in ((nans, "NaN"), (infs, "Inf")) if count]
    return f"{' and '.join(found)} in {tensor.numel()} number{'s' * (tensor.numel() > 1)}"


class Search:
    """Watches one micro-batch; `place` is the first that was found."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.place: Place | None = None
        self._base = base_of(model)
        head = getattr(self._base, "get_output_embeddings", lambda: None)()
        self._head = head if isinstance(head, nn.Module) else None
        self._backbone = getattr(self._base, getattr(self._base, "base_model_prefix", "") or "-", None)
        self._batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        self._hidden: Any = None
        self._size = next((len(tensor) for tensor in self._batch.values() if tensor.dim() > 1), 1)
        self._observed = 0
        self._begins: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every module's output and every gradient while open."""
        for name, tensor in self._batch.items():
            self._look(tensor, "input", name)
        modules, parameters = self._base.named_modules(), self._base.named_parameters()
        handles: list[Any] = [m.register_forward_hook(partial(self._after, name)) for name, m in modules]
        handles += [p.register_hook(partial(self._after_gradient, n)) for n, p in parameters if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, tensor: Any, kind: Kind, path: str, remark: str = "") -> None:
        if self.place is None and isinstance(tensor, Tensor) and tensor.is_floating_point() and not is_finite(tensor):
            self.place = Place(kind, path or "the model", count_bad(tensor), self._rows_of(tensor), remark)

    def _rows_of(self, tensor: Tensor) -> tuple[int, ...]:
        """Places in the batch; none where they cannot be told, or where all rows are concerned."""
        count = len(tensor) if tensor.dim() else 0
        if not count or count % self._size:
            return ()
        bad = (~torch.isfinite(tensor)).flatten(1).any(dim=1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
        numbers = bad.nonzero().flatten().tolist()
        # tokens lie row by row, the slots of experts row after row for each choice
        is_by_token = tensor.dim() == 2 and count > self._size
        rows = {n // (count // self._size) if is_by_token else n % self._size for n in numbers}
        return tuple(sorted(rows)) if len(rows) < self._size else ()

    @torch.no_grad()
    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        path = module.path if isinstance(module, Mixture) else name.replace(".base_layer", "")
        if self.place is None:
            self._look_at_module(path, module, args, output)
        for tensor in tree_leaves(output) if isinstance(output, Tensor | tuple) else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._after_output_gradient, path))

    def _look_at_module(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self._base:
            self._look(_field(output, "logits"), "logits", "of the model")
            return
        if module is self._backbone:
            self._hidden = _field(output, "last_hidden_state")
        read = args[0] if args else None
        is_leaf = not any(True for _ in module.children())
        if is_leaf or isinstance(module, Mixture):
            self._look(read, "before", path)
        if isinstance(module, Mixture):
            self._look_at_mixture(module, read)
        if module is self._head:
            self._hidden = None
            self._look_at_logits(module, read, output)
        is_trained = any(p.requires_grad for p in module.parameters(recurse=False))
        kind: Kind = "experts" if isinstance(module, Mixture) else "trained" if is_trained else "frozen"
        for tensor in tree_leaves(output) if isinstance(output, Tensor | tuple) else ():
            self._look(tensor, kind, path, _tell_weights(module))

    def _look_at_mixture(self, layer: Mixture, read: Any) -> None:
        """The routings that were made since the last module, then the frozen module where a kernel computed it."""
        here = current()
        observations = here.trace.observations if here is not None and here.trace is not None else []
        for seen in observations[self._observed :]:
            routing, valid_T = seen.routing, seen.routing.valid_T
            for outputs in (routing.logits_TE, routing.probs_TE, routing.weights_TK):
                if outputs is not None:
                    outputs = outputs.where(valid_T[:, None], 0.0)
                    self._look(outputs, "router", seen.path, _tell_weights(layer.leader_of(seen.adapter), "router"))
        self._observed = len(observations)
        frozen = layer.get_base_layer()
        if isinstance(read, Tensor) and not any(True for _ in frozen.children()):
            self._look(frozen.forward(read), "frozen", layer.path, _tell_weights(frozen))

    def _look_at_logits(self, head: nn.Module, read: Any, output: Any) -> None:
        """Also where a fused loss has the head hand on what it was given, or does not call it."""
        if output is not read or not isinstance(read, Tensor):
            self._look(output, "logits", "of the head", _tell_weights(head))
            return
        parts = [(row, part) for row, of_row in enumerate(_by_row(read)) for part in of_row.split(CHUNK)]
        bad = {row: count_bad(z) for row, part in parts if not is_finite(z := type(head).forward(head, part))}
        if bad and self.place is None:
            rows = tuple(bad) if len(bad) < self._size else ()
            self.place = Place("logits", "of the head", next(iter(bad.values())), rows, _tell_weights(head))

    def look_at_loss(self, task: Tensor, terms: Mapping[str, Tensor], labels: Any) -> None:
        """The task's own loss, behind logits that a trainer made by itself; then each auxiliary term."""
        if self._head is not None and self._hidden is not None and not is_finite(task):
            with torch.no_grad():
                self._look_at_logits(self._head, self._hidden, self._hidden)
        is_text = isinstance(labels, Tensor) and not labels.is_floating_point()
        remark = "no token has a label" if is_text and bool((labels == IGNORED).all()) else ""
        self._look(task.detach(), "loss", "the task's own", remark)
        for name, value in terms.items():
            self._look(value, "loss", f"losses.{name}")

    def _after_output_gradient(self, path: str, gradient: Tensor) -> None:
        if self.place is None and self._begins is None and not is_finite(gradient):
            self._begins = path

    def _after_gradient(self, name: str, gradient: Tensor) -> None:
        remark = f"first seen behind the output of {self._begins}" if self._begins else ""
        if self.place is None and not is_finite(gradient):
            self.place = Place("gradient", name, count_bad(gradient), remark=remark)


def look_at_sums(model: nn.Module) -> Place | None:
    """The first parameter whose gradient, summed over micro-batches and ranks, is not finite, or else the largest."""
    sizes: dict[str, float] = {}
    for name, parameter in base_of(model).named_parameters():
        if parameter.grad is None:
            continue
        if not is_finite(parameter.grad):
            return Place("gradient", name, count_bad(parameter.grad), remark="summed over micro-batches and processes")
        sizes[name] = float(parameter.grad.double().norm())
    if not sizes or max(sizes.values()) < torch.finfo(torch.float16).max:
        return None
    name = max(sizes, key=sizes.__getitem__)
    return Place("norm", name, f"{sizes[name]:.1e}, which is beyond what its dtype holds")


def _by_row(hidden: Tensor) -> Tensor:
    """Hidden states of tokens as [B, S, I]."""
    return hidden if hidden.dim() == 3 else hidden.reshape(1, -1, hidden.shape[-1])


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else None


def _tell_weights(module: nn.Module, kind: str = "") -> str:
    """Which of a module's own tensors were not finite before the step, where some were."""
    bad = [
        name
        for name, tensor in module.named_parameters(recurse=isinstance(module, Mixture))
        if kind in name and not name.startswith("base_layer") and tensor.is_floating_point() and not is_finite(tensor)
    ]
    return f"{_BEFORE} {', '.join(bad)} before" if bad else ""
