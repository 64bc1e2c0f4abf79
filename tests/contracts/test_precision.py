"""Each recipe with each kernel in fp32, bf16 and fp16 against float64: logits, loss, gradients, and one step.

The reference is the same model with the kernel `loop` in float64, on the same rounded weights; that one is checked
against straight-line formulas in `tests/references`. A router's choice jumps where two experts are nearly even, so the
routers of both decide by the reference's products; their own products have their gradient.

The tolerance follows from the format: with unit roundoff u (half the distance from 1 to the next number), N roundings
of independent sign on the way from the embeddings to a number let it be off by sqrt(N) u, relative to the norm of the
tensor it stands in. Of a decoder layer we count 24 (two norms of 4, two sums, attention of 4, and for each of five
linears in a row W x and the sum with what the experts add), and for a gradient the way back too. Allowed are 4 such
deviations. The gradient of a router is a sum of terms of both signs that nearly cancel: it is measured by the norm of
all routers' gradients, any other by its own.
"""

from functools import lru_cache

import pytest
import torch

import mixora
from mixora.errors import ConfigError
from mixora.kernels import KERNELS
from mixora.routers.linear import LinearRouter
from tests.models import adapt, gradients, tiny_llama, token_ids

IDS = token_ids(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK == 1, -100)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# open: adamix, hilo and mola, whose tolerance has not been settled
RECIPES = ("adamix-lora", "adamoe", "adamole", "hydralora", "lora", "mixlora", "molora", "pesc", "sira")
ROUNDINGS_OF_LAYER = 24
DEVIATIONS = 4
# gradients of fp16 are made under a loss scale, as in training
SCALES = {torch.float16: 2.0**10}
RATE = 0.1


def layers_of(recipe):
    # hilo and mola have values for four groups of layers
    return 4 if recipe in ("hilo", "mola") else 1


def tolerance_of(dtype, recipe, ways):
    return DEVIATIONS * (ways * layers_of(recipe) * ROUNDINGS_OF_LAYER) ** 0.5 * torch.finfo(dtype).eps / 2


def make(recipe, dtype, kernel, is_exact=False):
    overrides = {"expert_dropout": 0.0} if recipe == "sira" else {}
    config = mixora.recipe(recipe, kernel=kernel, dropout=0.0, task_type="CAUSAL_LM", **overrides)
    model = adapt(tiny_llama(layers_of(recipe)).to(dtype), config, autocast_adapter_dtype=False)
    # rounded first, then exact
    return model.double() if is_exact else model


def outcome(model, decide, scale=1.0):
    """Loss, logits, gradients, and the change of each tensor in one step of gradient descent."""
    with pytest.MonkeyPatch.context() as patch:
        names = {id(p): name for name, p in model.named_parameters()}
        for router in LinearRouter.__subclasses__():
            patch.setattr(router, "decide", decide(router.decide, names))
        torch.manual_seed(3)
        logits = model.eval()(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()].detach()
        model.train()
        torch.manual_seed(3)
        loss, _ = mixora.compute_loss(model, BATCH)
        (loss * scale).backward()
    found = {name: gradient.double() / scale for name, gradient in gradients(model).items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in found}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in found:
                p.sub_((RATE * found[name]).to(p.dtype))
    after = {name: p.detach().double() for name, p in model.named_parameters() if name in found}
    steps = {name: after[name] - before[name].double() for name in after}
    return logits.double(), loss.detach().double(), found, before, steps


def size_of(exact, name):
    alike = [gradient for other, gradient in exact.items() if ".mixora_router" in other and ".mixora_router" in name]
    return torch.cat([gradient.flatten() for gradient in alike or [exact[name]]]).norm()


@lru_cache
def reference(recipe, dtype):
    """What the exact model gives, and the products that its routers decided by."""
    kept = {}

    def keep(own, names):
        def decide(self, z_TC, parameters, *args):
            kept[names[id(parameters["router"])]] = z_TC.detach()
            return own(self, z_TC, parameters, *args)

        return decide

    return outcome(make(recipe, dtype, "loop", is_exact=True), keep), kept


def by_products(kept):
    def follow(own, names):
        def decide(self, z_TC, parameters, *args):
            exact_TC = kept[names[id(parameters["router"])]]
            return own(self, z_TC + (exact_TC - z_TC).detach().to(z_TC.dtype), parameters, *args)

        return decide

    return follow


def is_allowed(recipe, kernel):
    try:
        mixora.plan(tiny_llama(layers_of(recipe)), mixora.recipe(recipe, kernel=kernel))
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_kernel_stays_within_the_rounding_of_its_format(recipe, dtype):
    (logits, loss, exact, _, steps), kept = reference(recipe, dtype)
    there, back = (tolerance_of(dtype, recipe, ways) for ways in (1, 2))
    kernels = [kernel for kernel in KERNELS if is_allowed(recipe, kernel)]
    assert "loop" in kernels
    for kernel in kernels:
        found = outcome(make(recipe, dtype, kernel), by_products(kept), SCALES.get(dtype, 1.0))
        assert (found[0] - logits).norm() <= there * logits.norm(), kernel
        assert abs(found[1] - loss) <= there * loss.abs(), kernel
        assert found[2].keys() == exact.keys()
        for name, gradient in exact.items():
            allowed = back * size_of(exact, name)
            assert (found[2][name] - gradient).norm() <= allowed, (kernel, name)
            # storing a weight rounds it once more
            stored = found[3][name].double().norm() * torch.finfo(found[3][name].dtype).eps / 2
            assert (found[4][name] - steps[name]).norm() <= RATE * allowed + stored, (kernel, name)
