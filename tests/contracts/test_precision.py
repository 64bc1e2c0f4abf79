"""Each recipe with each kernel in fp32, bf16 and fp16 against float64: logits, loss, gradients, and one step.

The reference is the same model with the kernel `loop` in float64, on the same rounded weights; that one is checked
against straight-line formulas in `tests/references`. A router's choice jumps where two experts are nearly even, so the
routers of both decide by the reference's products; their own products have their gradient. Kernel `triton` decides
inside its launch: it is compared where every expert serves every token.

The tolerance is derived, not fitted. With unit roundoff u (half the distance from 1 to the next number) a rounding
moves a number by u / sqrt(6) of it: a uniform error has 1 / sqrt(3) of its bound in the mean square, and the square of
the bound, over numbers from 1 to 2, is half of u^2. What that does to a tensor depends on the model, which amplifies
it: the exact model tells, where every weight is moved once at random by a small part of it, which is as one rounding of
each product of a weight. Of a decoder layer we count 24 for five linears in a row: two norms of 4, two sums, attention
of 4, and for each linear W x and the sum with what the experts add. 16-bit formats sum up in fp32 and round once. In
fp32 each of the n terms of W x rounds the sum so far, half of the n terms in the mean: n / 2 roundings in the place of
one, and n is 32 four times, then 48; also, the norms of the reference are in fp32 too. A gradient has the way back as
well. N roundings of independent sign count sqrt(N) times one. Allowed are 3 such deviations.

Gradients of one part at one site are measured together. A router's W, threshold and its bias are one map. So are the
downs of experts: where `adamix` draws one for the second pass alone, its gradient is the difference of two nearly equal
distributions, each rounded as in the gradient of the first pass's expert.
"""

import re

import pytest
import torch

import mixora
from mixora.contracts import Shape
from mixora.errors import ConfigError
from mixora.kernels import KERNELS
from mixora.routers.linear import LinearRouter
from tests.models import adapt, gradients, tiny_llama, token_ids

IDS = token_ids(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK == 1, -100)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# values for two groups of layers
TWO = {"num_experts": [2, 4]}
EVERY_EXPERT = "mola, every expert"
CASES = {name: {} for name in mixora.recipe_names()} | {
    "hilo": {**TWO, "rank": [2, 4]},
    "mola": TWO,
    "sira": {"expert_dropout": 0.0},
    EVERY_EXPERT: {"num_experts": 4, "top_k": 4, "targets": ["query-value"]},
}
TERMS = (32, 32, 32, 32, 48)
ROUNDINGS = 24 / len(TERMS)
ROUNDINGS_OF_SUMS = (sum(n / 2 - 1 for n in TERMS) + 8) / len(TERMS)
DEVIATIONS = 3
MOVED = 1e-5
# gradients of fp16 are made under a loss scale, as in training
SCALES = {torch.float16: 2.0**10}
RATE = 0.1


def layers_of(case):
    return 2 if case in ("hilo", "mola") else 1


def tolerance_of(dtype, ways):
    """How many times what one movement by a whole unit does."""
    roundings = ROUNDINGS + (ROUNDINGS_OF_SUMS if dtype == torch.float32 else 0)
    return DEVIATIONS * (ways * roundings / 6) ** 0.5 * torch.finfo(dtype).eps / 2


def config_of(case, kernel):
    return mixora.recipe(case.split(",")[0], kernel=kernel, dropout=0.0, task_type="CAUSAL_LM", **CASES[case])


def make(case, dtype, kernel, is_exact=False):
    model = adapt(tiny_llama(layers_of(case)).to(dtype), config_of(case, kernel), autocast_adapter_dtype=False)
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


def part_of(name):
    return re.sub(r"(\.mixora_(?:router|bias_A|bias_B|A|B)).*", r"\1", name)


def norms_of_parts(gradients):
    norms = {}
    for name, gradient in gradients.items():
        norms[part_of(name)] = norms.get(part_of(name), 0) + gradient.square().sum()
    return {part: square.sqrt() for part, square in norms.items()}


def reference(case, dtype):
    """What the exact model gives, and the products that its routers decided by, in evaluation and in training."""
    kept = {}

    def keep(own, names):
        def decide(self, z_TC, parameters, tokens, training):
            kept[names[id(parameters["router"])], training] = z_TC.detach()
            return own(self, z_TC, parameters, tokens, training)

        return decide

    return outcome(make(case, dtype, "loop", is_exact=True), keep), kept


def by_products(kept):
    def follow(own, names):
        def decide(self, z_TC, parameters, tokens, training):
            exact_TC = kept[names[id(parameters["router"])], training]
            return own(self, z_TC + (exact_TC - z_TC).detach().to(z_TC.dtype), parameters, tokens, training)

        return decide

    return follow


def sensitivity(case, dtype, exact, kept):
    """What moving every weight does to the logits and to the gradients of each part, for a movement by all of it."""
    model = make(case, dtype, "loop", is_exact=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + MOVED * torch.randn_like(p))
    logits, _, found, _, _ = outcome(model, by_products(kept))
    moves = norms_of_parts({name: found[name] - gradient for name, gradient in exact[2].items()})
    return (logits - exact[0]).norm() / MOVED, {part: norm / MOVED for part, norm in moves.items()}


def kernels_of(case):
    if case == EVERY_EXPERT:
        return ["triton"]
    return [kernel for kernel in KERNELS if kernel != "triton" and is_allowed(case, kernel)]


def is_allowed(case, kernel):
    try:
        mixora.plan(tiny_llama(layers_of(case)), config_of(case, kernel))
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_every_kernel_stays_within_the_rounding_of_its_format(case, dtype):
    objection = KERNELS["triton"].objection(Shape(8, 8, (2, 2)), torch.float32)
    if case == EVERY_EXPERT and objection:
        pytest.skip(f"kernel triton {objection}")
    exact, kept = reference(case, dtype)
    logits, loss, expected, _, steps = exact
    of_logits, of_parts = sensitivity(case, dtype, exact, kept)
    there, back = (tolerance_of(dtype, ways) for ways in (1, 2))
    kernels = kernels_of(case)
    assert {"loop", "triton"} & set(kernels)
    for kernel in kernels:
        found = outcome(make(case, dtype, kernel), by_products(kept), SCALES.get(dtype, 1.0))
        assert (found[0] - logits).norm() <= there * of_logits, kernel
        # a token's loss moves by at most sqrt(2) of what its logits do, and is larger than they are
        assert abs(found[1] - loss) <= there * of_logits / logits.norm() * loss.abs(), kernel
        assert found[2].keys() == expected.keys()
        for name, gradient in expected.items():
            allowed = back * of_parts[part_of(name)]
            assert (found[2][name] - gradient).norm() <= allowed, (kernel, name)
            # storing a weight rounds it once more
            stored = found[3][name].double().norm() * torch.finfo(found[3][name].dtype).eps / 2
            assert (found[4][name] - steps[name]).norm() <= RATE * allowed + stored, (kernel, name)
