"""Activations that are made again in backward where what made them was cheap and kept its operands anyway.

Of what autograd keeps of a transformer block, more than a third are results of elementwise operators: act(gate), its
product with `up`, what a norm gives. Each was made from tensors that the operator keeps for its own gradient, so the
next operator need not keep the result as well. The same operator runs again on the same operands when the result is
needed: equal to the last bit, for some 1 % more time.

Autograd's graph itself is the recipe: a node is asked for the operands that it saved. A node runs in backward only
after all that took its result, so the operands are still there; if they were changed in place, autograd says so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Make = Callable[[], Tensor]
# a recipe costs microseconds, so what is small is kept
SMALL_BYTES = 2**16


@contextmanager
def lean_activations() -> Iterator[None]:
    """While open, what is saved for backward is left out where it can be made again (see above).

    Does nothing inside of other hooks on saved tensors, such as those that move activations to the host, and nothing
    under `torch.compile`, which chooses by itself what to keep.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) or torch.compiler.is_compiling():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


@contextmanager
def keep_all() -> Iterator[None]:
    """While open, `lean_activations` does nothing."""
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield


def find_kept(saved: Tensor) -> Tensor | Make:
    """What stands for a tensor that is saved for backward: itself, or what makes it again."""
    if type(saved) is not Tensor or saved.nbytes < SMALL_BYTES or saved.output_nr:
        return saved
    return find_recipe(saved.grad_fn) or saved


def _pack(saved: Tensor) -> tuple[Tensor | Make, int]:
    kept = find_kept(saved)
    if isinstance(kept, Tensor) and kept.grad_fn is not None:
        # a node that held its own output with its history would hold itself
        kept = kept.detach()
    return kept, saved._version


def _unpack(packed: tuple[Tensor | Make, int]) -> Tensor:
    kept, version = packed
    if not isinstance(kept, Tensor):
        with torch.no_grad():
            return kept()
    if kept._version != version:
        # autograd leaves this check to whoever keeps the tensor
        raise RuntimeError(
            f"a tensor {list(kept.shape)} that backward needs has been modified by an inplace operation: "
            f"it is at version {kept._version}; expected version {version}"
        )
    return kept


def find_recipe(node: Any) -> Make | None:
    """What makes the first output of a node of the graph again from what the graph keeps; None where nothing does."""
    if node is None:
        return None
    kind = node.name()
    if kind == "SiluBackward0":
        return lambda: F.silu(node._saved_self)
    if kind == "GeluBackward0":
        return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    if kind == "MulBackward0":
        return _find_product(node)
    return _find_rearrangement(node, kind)


def _find_product(node: Any) -> Make | None:
    """A factor is saved where the other one has a gradient."""
    left_node, right_node = (below for below, _ in node.next_functions)
    left = find_recipe(left_node) if right_node is None else lambda: node._saved_self
    right = find_recipe(right_node) if left_node is None else lambda: node._saved_other
    return None if left is None or right is None else lambda: left() * right()


def _find_rearrangement(node: Any, kind: str) -> Make | None:
    """The same numbers in another shape, order or dtype."""
    result = node._input_metadata[0]
    rearrange: dict[str, Callable[[Tensor], Tensor]] = {
        "ViewBackward0": lambda x: x.reshape(result.shape),
        "UnsafeViewBackward0": lambda x: x.reshape(result.shape),
        "CloneBackward0": lambda x: x.contiguous(),
        "ToCopyBackward0": lambda x: x.to(result.device, result.dtype),
        "TransposeBackward0": lambda x: x.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    }
    if kind not in rearrange:
        return None
    below, output = node.next_functions[0]
    make = None if output or below is None else _find_operand(below)
    return None if make is None else lambda: rearrange[kind](make())


def _find_operand(node: Any) -> Make | None:
    """As `find_recipe`, or what attention keeps of itself."""
    return (lambda: node._saved_output) if node.name().startswith("ScaledDotProduct") else find_recipe(node)


def _signed(dim: int) -> int:
    """Nodes give integers as if they had no sign."""
    return dim - 2**64 if dim >= 2**63 else dim
