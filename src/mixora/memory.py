"""How much memory a training step takes, counted on the meta device: no weights, no time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixora.activations import find_kept
from mixora.passes import tracing

ADAM_BYTES = 8  # two fp32 moments per trainable number


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step.

    `activations`: what the forward pass keeps for backward under a trainer of ours, each storage once.
    """

    base_weights: int
    adapter_weights: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        """All of it. Backward's own workspace and the framework come on top."""
        return self.base_weights + self.adapter_weights + self.gradients + self.optimiser + self.activations


def estimate_memory(model: nn.Module, batch: int, length: int) -> Memory:
    """Memory of a step of AdamW on `batch` rows of `length` tokens.

    `model` is an adapted model on the meta device. The activations are found by running its forward pass there and
    counting what autograd saves; weights that are saved too count as weights.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    adapter_bytes = sum(p.nbytes for p in trainable)
    return Memory(
        base_weights=sum(p.nbytes for p in frozen),
        adapter_weights=adapter_bytes,
        gradients=adapter_bytes,
        optimiser=ADAM_BYTES * sum(p.numel() for p in trainable),
        activations=_count_saved(model, batch, length, weights),
    )


def _count_saved(model: nn.Module, batch: int, length: int, weights: set[int]) -> int:
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if isinstance(find_kept(tensor), Tensor):
            # keeping the tensor keeps its storage's identity from being used again
            saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids[:, 0] if _classifies(model) else ids}
    was_training = model.training
    model.train()
    with tracing(owns_losses=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    model.train(was_training)
    return sum(t.untyped_storage().nbytes() for name, t in saved.items() if name not in weights)


def _classifies(model: nn.Module) -> bool:
    return "SequenceClassification" in type(getattr(model, "get_base_model", lambda: model)()).__name__
