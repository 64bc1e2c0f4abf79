"""What kernels that sort their slots must survive: every routing pattern, skew, recomputation, the meta device."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixora.errors import ConfigError
from mixora.kernels import KERNELS, Grouped, Loop, Sorted
from tests.kernels.test_values import routing_of

SORTING = ["sorted", "grouped"]


def draw(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def compute(kernel, x_TI, a_RI, b_RO, weights_TK, experts_TK):
    routing = routing_of(experts_TK, weights_TK, len(kernel.ranks))
    return kernel.contract(kernel.map(F.gelu, kernel.expand(x_TI, a_RI, routing)), b_RO, routing)


def outcome(kernel, leaves, weights_TK, experts_TK):
    """Output and gradients of x, A, B, weights under a fixed upstream gradient."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (*leaves, weights_TK)]
    y_TO = compute(kernel, *leaves, experts_TK)
    upstream_TO = torch.linspace(-1, 1, y_TO.numel(), dtype=torch.float64).to(y_TO.dtype).reshape(y_TO.shape)
    return [y_TO.detach(), *torch.autograd.grad((y_TO * upstream_TO).sum(), leaves)]


def test_gradients_of_sorted_are_those_of_finite_differences():
    ranks, experts_TK = (1, 3, 2), torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0]])
    weights_TK = draw(4, 2).abs() + 0.1
    used_TK = torch.tensor([[True, True], [False, True], [False, False], [True, True]])
    bias_R = draw(6, seed=3).requires_grad_()
    leaves = [t.requires_grad_() for t in (draw(4, 3), draw(6, 3, seed=1), draw(6, 5, seed=2), weights_TK)]
    kernel = Sorted(ranks)

    def function(x_TI, a_RI, b_RO, weights_TK, bias_R):
        routing = routing_of(experts_TK, torch.where(used_TK, weights_TK, 0.0), 3)
        slots = kernel.map(torch.tanh, kernel.expand(x_TI, a_RI, routing, bias_R))
        return kernel.contract(slots, b_RO, routing)

    assert torch.autograd.gradcheck(function, (*leaves, bias_R))


@st.composite
def routings(draw):
    """Ranks, distinct experts of each token, and which slots are in use; any expert may be everyone's or no one's."""
    ranks = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    top_k, tokens = draw(st.integers(1, len(ranks))), draw(st.integers(0, 6))
    orders = [draw(st.permutations(range(len(ranks))))[:top_k] for _ in range(tokens)]
    used = [draw(st.lists(st.booleans(), min_size=top_k, max_size=top_k)) for _ in range(tokens)]
    shape = (tokens, top_k)
    return ranks, torch.tensor(orders).long().reshape(shape), torch.tensor(used).bool().reshape(shape)


@settings(max_examples=150, deadline=None)
@given(routings())
def test_sorted_gives_what_the_loop_gives_for_every_routing(drawn):
    ranks, experts_TK, used_TK = drawn
    leaves = [draw(len(experts_TK), 3), draw(sum(ranks), 3, seed=1), draw(sum(ranks), 2, seed=2)]
    weights_TK = torch.where(used_TK, draw(*experts_TK.shape, seed=3), 0.0)
    for got, want in zip(*(outcome(k(ranks), leaves, weights_TK, experts_TK) for k in (Sorted, Loop)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(routings())
def test_grouped_gives_what_the_loop_gives_for_every_routing(drawn):
    """Of slots without weight the weights' gradient is free; routers never use it."""
    ranks, experts_TK, used_TK = (8,) * len(drawn[0]), *drawn[1:]
    sizes = [(len(experts_TK), 8), (sum(ranks), 8), (sum(ranks), 16)]
    leaves = [draw(*size, seed=n, dtype=torch.float32) for n, size in enumerate(sizes)]
    weights_TK = torch.where(used_TK, draw(*experts_TK.shape, seed=3, dtype=torch.float32), 0.0)
    found, expected = (outcome(k(ranks), leaves, weights_TK, experts_TK) for k in (Grouped, Loop))
    found[-1] = torch.where(used_TK, found[-1], 0.0)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SORTING)
def test_many_tokens_of_which_one_expert_gets_all(name, dtype):
    """Against float64; the second choices spread over the others, some of which get none."""
    ranks, tokens = (8,) * 6, 300
    experts_TK = torch.stack([torch.full((tokens,), 2), torch.arange(tokens) % 2 * 4], dim=1)
    leaves = [draw(tokens, 16), draw(48, 16, seed=1), draw(48, 24, seed=2)]
    leaves = [leaf.to(dtype) for leaf in leaves]
    weights_TK = draw(tokens, 2, seed=3).abs().float()
    found = outcome(KERNELS[name](ranks), leaves, weights_TK, experts_TK)
    expected = outcome(Loop(ranks), [leaf.double() for leaf in leaves], weights_TK.double(), experts_TK)
    for got, want in zip(found, expected, strict=True):
        assert (got.double() - want).norm() <= {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype] * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SORTING)
def test_recomputation_and_copies_give_the_same(name, dtype):
    experts_TK, weights_TK = torch.tensor([[0, 1], [2, 0], [1, 2]]), draw(3, 2).abs().float()
    leaves = [t.to(dtype).requires_grad_() for t in (draw(3, 8), draw(24, 8, seed=1), draw(24, 8, seed=2))]
    kernel = KERNELS[name]((8, 8, 8))
    plain = compute(kernel, *leaves, weights_TK, experts_TK)
    again = checkpoint(compute, copy.deepcopy(kernel), *leaves, weights_TK, experts_TK, use_reentrant=False)
    assert torch.equal(plain, again)
    for got, want in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (again, plain)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("name", SORTING)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(name, frozen):
    experts_TK = torch.tensor([[0, 1], [2, 0], [1, 2]])
    leaves = [draw(*size, seed=n, dtype=torch.float32) for n, size in enumerate([(3, 8), (24, 8), (24, 8), (3, 2)])]
    expected = outcome(KERNELS[name]((8, 8, 8)), leaves[:3], leaves[3], experts_TK)[1:]
    trained = [leaf.requires_grad_() for n, leaf in enumerate(leaves) if n != frozen]
    y_TO = compute(KERNELS[name]((8, 8, 8)), *leaves, experts_TK)
    found = torch.autograd.grad((y_TO * torch.linspace(-1, 1, 24).reshape(3, 8)).sum(), trained)
    for got, want in zip(found, [g for n, g in enumerate(expected) if n != frozen], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SORTING)
def test_shapes_on_the_meta_device(name, dtype):
    leaves = [torch.empty(size, device="meta", dtype=dtype) for size in ((6, 8), (32, 8), (32, 16))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    experts_TK = torch.empty(6, 2, dtype=torch.long, device="meta")
    y_TO = compute(KERNELS[name]((8,) * 4), *leaves, torch.empty(6, 2, device="meta"), experts_TK)
    assert y_TO.shape == (6, 16) and y_TO.dtype == dtype and y_TO.is_meta


def largest_tensor(function):
    """Numbers in the largest tensor that any operator makes."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.largest = max([self.largest, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
            return result

    with Watch() as watch:
        function()
    return watch.largest


@pytest.mark.parametrize("skewed", [False, True])
def test_sorted_never_holds_a_row_for_each_slot(skewed):
    """At most one of the module's width for each token, also where one expert serves all."""
    tokens, top_k, ranks = 64, 4, (2,) * 8
    scores_TE = draw(tokens, 8)
    scores_TE[:, :top_k] += 100.0 * skewed
    experts_TK = scores_TE.topk(top_k).indices
    leaves = [draw(tokens, 32), draw(16, 32, seed=1), draw(16, 32, seed=2)]
    largest = largest_tensor(lambda: outcome(Sorted(ranks), leaves, draw(tokens, top_k).abs(), experts_TK))
    assert largest <= tokens * 32


def test_grouped_in_a_model_that_was_cast_after_its_plan_says_what_to_do():
    leaves = [draw(3, 8), draw(16, 8), draw(16, 8)]
    with pytest.raises(ConfigError, match=r"'grouped' cannot compute in torch\.float64; valid: kernel 'sorted'"):
        compute(Grouped((8, 8)), *leaves, draw(3, 1), torch.tensor([[0], [1], [0]]))
