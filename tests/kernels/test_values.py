"""Every kernel against straight loops in float64: values and the gradients of all that it reads."""

import pytest
import torch
from torch.nn import functional as F

from mixora.kernels import KERNELS
from mixora.routing import Routing

IN, OUT = 5, 7
# ranks of the experts; experts of each token; slots of weight 0
CASES = {
    "equal ranks": ((3, 3, 3, 3), [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]], []),
    "unequal ranks": ((1, 4, 2, 3), [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]], []),
    "slots without weight": ((1, 4, 2, 3), [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]], [(0, 1), (2, 0), (4, 0), (4, 1)]),
    "one expert per token": ((2, 3), [[1], [0], [1], [1]], []),
    "all experts for all tokens": ((2, 1, 3), [[0, 1, 2], [2, 1, 0], [1, 0, 2]], []),
    "a single expert": ((4,), [[0], [0], [0]], []),
    "all tokens to one expert": ((2, 3, 2), [[1]] * 6, []),
    "one token": ((2, 3, 2), [[2, 0]], []),
    "no token": ((2, 3, 2), torch.zeros(0, 2), []),
}
BATCHED = {name: case for name, case in CASES.items() if name != "no token"}


def straight_loops(x_TI, a_RI, b_RO, weights_TK, experts_TK, ranks, activation):
    """y_t = sum_k w_tk B_e activation(A_e x_t), one token and one slot after the other."""
    starts = [sum(ranks[:e]) for e in range(len(ranks) + 1)]
    rows = []
    for t in range(len(x_TI)):
        y_O = torch.zeros(b_RO.shape[1], dtype=x_TI.dtype)
        for k in range(experts_TK.shape[1]):
            e = int(experts_TK[t, k])
            rank = slice(starts[e], starts[e + 1])
            y_O = y_O + weights_TK[t, k] * (b_RO[rank].T @ activation(a_RI[rank] @ x_TI[t]))
        rows.append(y_O)
    nothing = 0 * sum(leaf.sum() for leaf in (x_TI, a_RI, b_RO, weights_TK))
    return nothing + (torch.stack(rows) if rows else torch.zeros(0, b_RO.shape[1], dtype=x_TI.dtype))


def make(case):
    """Leaf tensors in float64, the fixed choice and the mask of slots in use."""
    ranks, experts, dropped = CASES[case]
    experts_TK = torch.as_tensor(experts).long()
    generator = torch.Generator().manual_seed(len(case))
    sizes = [(len(experts_TK), IN), (sum(ranks), IN), (sum(ranks), OUT), tuple(experts_TK.shape)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    used_TK = torch.ones(experts_TK.shape, dtype=torch.bool)
    for place in dropped:
        used_TK[place] = False
    return ranks, experts_TK, used_TK, leaves


def outcome(case, compute, dtype):
    """Output and gradients of x, A, B, weights under a fixed upstream gradient."""
    ranks, experts_TK, used_TK, leaves = make(case)
    # the weights are fp32 at least, whatever the activations' dtype
    dtypes = [dtype, dtype, dtype, torch.promote_types(dtype, torch.float32)]
    leaves = [leaf.to(dtype).to(d).requires_grad_() for leaf, d in zip(leaves, dtypes, strict=True)]
    x_TI, a_RI, b_RO, weights_TK = leaves
    y_TO = compute(x_TI, a_RI, b_RO, torch.where(used_TK, weights_TK, 0.0), experts_TK, ranks)
    upstream_TO = torch.linspace(-1, 1, y_TO.numel(), dtype=dtype).to(y_TO.dtype).reshape(y_TO.shape)
    return [y_TO.detach(), *torch.autograd.grad((y_TO * upstream_TO).sum(), leaves)]


def by_kernel(name, activation):
    def compute(x_TI, a_RI, b_RO, weights_TK, experts_TK, ranks):
        assigned_TK = weights_TK != 0
        valid_T = torch.ones(len(x_TI), dtype=torch.bool)
        routing = Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, len(ranks))
        kernel = KERNELS[name](ranks)
        slots = kernel.map(activation, kernel.expand(x_TI, a_RI, routing))
        return kernel.contract(slots, b_RO, routing)

    return compute


def by_loops(activation):
    def compute(*tensors):
        return straight_loops(*tensors, activation)

    return compute


def identity(tensor):
    return tensor


@pytest.mark.parametrize("activation", [identity, F.gelu], ids=["linear", "gelu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_values_and_gradients(kernel, case, activation, dtype, tolerance):
    found = outcome(case, by_kernel(kernel, activation), dtype)
    expected = outcome(case, by_loops(activation), torch.float64)
    for name, got, want in zip(("y", "x", "A", "B", "weights"), found, expected, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", BATCHED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_stays_within_its_rounding(kernel, case):
    found = outcome(case, by_kernel(kernel, identity), torch.bfloat16)
    _, experts_TK, used_TK, leaves = make(case)
    rounded = [leaf.bfloat16().double().requires_grad_() for leaf in leaves]
    x_TI, a_RI, b_RO, weights_TK = rounded
    y_TO = straight_loops(x_TI, a_RI, b_RO, torch.where(used_TK, weights_TK, 0.0), experts_TK, CASES[case][0], identity)
    upstream_TO = torch.linspace(-1, 1, y_TO.numel(), dtype=torch.bfloat16).double().reshape(y_TO.shape)
    expected = [y_TO.detach(), *torch.autograd.grad((y_TO * upstream_TO).sum(), rounded)]
    assert found[0].dtype == torch.bfloat16
    for got, want in zip(found, expected, strict=True):
        assert (got.double() - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_of_another_dtype_follow_the_activations(kernel):
    ranks, experts_TK, _, (x_TI, a_RI, b_RO, weights_TK) = make("unequal ranks")
    compute = by_kernel(kernel, identity)
    mixed = compute(x_TI.bfloat16(), a_RI.float(), b_RO.float(), weights_TK.float(), experts_TK, ranks)
    assert mixed.dtype == torch.bfloat16
    exact = straight_loops(x_TI, a_RI, b_RO, weights_TK, experts_TK, ranks, identity)
    assert (mixed.double() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_gives_low_precision_close_to_exact(kernel):
    ranks, experts_TK, _, leaves = make("unequal ranks")
    x_TI, a_RI, b_RO, weights_TK = (leaf.float() for leaf in leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TO = by_kernel(kernel, identity)(x_TI, a_RI, b_RO, weights_TK, experts_TK, ranks)
    exact = straight_loops(*leaves, experts_TK, ranks, identity)
    assert (y_TO.double() - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_without_weight_gets_exactly_zero(kernel):
    ranks, experts_TK, _, (x_TI, a_RI, b_RO, weights_TK) = make("equal ranks")
    weights_TK[2] = 0
    y_TO = by_kernel(kernel, identity)(x_TI, a_RI, b_RO, weights_TK, experts_TK, ranks)
    assert torch.equal(y_TO[2], torch.zeros(OUT, dtype=torch.float64))
    assert (y_TO[[0, 1, 3, 4]].abs().sum(dim=1) > 0).all()


SHARED = {name: case for name, case in CASES.items() if len(set(case[0])) == 1}


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_hidden_that_all_experts_share(kernel, case):
    """Values and gradients are those of experts whose A are copies of one."""
    ranks, experts_TK, used_TK, (x_TI, a_RI, b_RO, weights_TK) = make(case)
    a_rI = a_RI[: ranks[0]].clone()

    def by_sharing(x_TI, a_rI, b_RO, weights_TK):
        assigned_TK, valid_T = weights_TK != 0, torch.ones(len(x_TI), dtype=torch.bool)
        routing = Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, len(ranks))
        one = KERNELS[kernel](ranks)
        return one.contract(one.map(F.gelu, one.share(x_TI @ a_rI.T, routing)), b_RO, routing)

    def by_copies(x_TI, a_rI, b_RO, weights_TK):
        copies_RI = torch.cat([a_rI] * len(ranks))
        return straight_loops(x_TI, copies_RI, b_RO, weights_TK, experts_TK, ranks, F.gelu)

    outcomes = []
    for compute in (by_sharing, by_copies):
        leaves = [leaf.clone().requires_grad_() for leaf in (x_TI, a_rI, b_RO, weights_TK)]
        y_TO = compute(*leaves[:3], torch.where(used_TK, leaves[3], 0.0))
        outcomes.append([y_TO.detach(), *torch.autograd.grad((y_TO * torch.linspace(-1, 1, OUT)).sum(), leaves)])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
