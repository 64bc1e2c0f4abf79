"""Every kernel against straight loops in float64: values and the gradients of all that it reads."""

import pytest
import torch
from torch.nn import functional as F

from mixora.contracts import Shape
from mixora.kernels import KERNELS
from mixora.routing import Routing

IN, OUT = 8, 16
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
    "no weight at all": ((2, 3, 2), [[0, 1], [2, 0]], [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "one of the experts of all tokens": ((2, 3, 2), [[1, 0], [1, 2], [2, 1], [1, 0], [1, 2]], [(0, 1)]),
    # grouped products want whole 16 bytes
    "rank 8": ((8,) * 4, [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]], [(0, 1), (2, 0), (4, 0), (4, 1)]),
    "rank 8, all tokens to one expert": ((8,) * 3, [[1]] * 6, []),
    "rank 8, all experts for all tokens": ((8,) * 3, [[0, 1, 2], [2, 1, 0], [1, 0, 2]], []),
    "rank 8, no weight at all": ((8,) * 3, [[0, 1], [2, 0]], [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "rank 8, no token": ((8,) * 3, torch.zeros(0, 2), []),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def is_possible(kernel, case, dtype):
    return KERNELS[kernel].objection(Shape(IN, OUT, CASES[case][0]), dtype) is None


def combine(*dtypes, cases=CASES):
    """Every kernel with every case that it can serve."""
    return [(k, c, d) for k in KERNELS for c in cases for d in dtypes if is_possible(k, c, d)]


def dtype_for(kernel):
    return torch.float64 if is_possible(kernel, "rank 8", torch.float64) else torch.float32


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


def identity(tensor):
    return tensor


def outcome(case, compute, dtype, rounded=None, change=identity):
    """Output and gradients of x, A, B, weights under a fixed upstream gradient, all rounded, then changed."""
    ranks, experts_TK, used_TK, leaves = make(case)
    rounded = rounded or dtype
    # the weights are fp32 at least, whatever the activations' dtype
    dtypes = [dtype, dtype, dtype, torch.promote_types(dtype, torch.float32)]
    leaves = [change(leaf.to(rounded).to(d)).requires_grad_() for leaf, d in zip(leaves, dtypes, strict=True)]
    x_TI, a_RI, b_RO, weights_TK = leaves
    y_TO = compute(x_TI, a_RI, b_RO, torch.where(used_TK, weights_TK, 0.0), experts_TK, ranks)
    # torch 2.15 rounds `linspace` in bfloat16 once, others more often
    upstream_TO = torch.linspace(-1, 1, y_TO.numel(), dtype=torch.float64).to(rounded).to(y_TO.dtype)
    return [y_TO.detach(), *torch.autograd.grad((y_TO * change(upstream_TO).view_as(y_TO)).sum(), leaves)]


def routing_of(experts_TK, weights_TK, num_experts):
    used_TK, valid_T = weights_TK != 0, torch.ones(len(weights_TK), dtype=torch.bool)
    return Routing(experts_TK, weights_TK, used_TK, used_TK, valid_T, num_experts)


def by_kernel(name, activation):
    def compute(x_TI, a_RI, b_RO, weights_TK, experts_TK, ranks):
        routing = routing_of(experts_TK, weights_TK, len(ranks))
        kernel = KERNELS[name](ranks)
        slots = kernel.map(activation, kernel.expand(x_TI, a_RI, routing))
        return kernel.contract(slots, b_RO, routing)

    return compute


def by_loops(activation):
    def compute(*tensors):
        return straight_loops(*tensors, activation)

    return compute


@pytest.mark.parametrize("activation", [identity, F.gelu], ids=["linear", "gelu"])
@pytest.mark.parametrize(("kernel", "case", "dtype"), combine(torch.float64, torch.float32))
def test_values_and_gradients(kernel, case, activation, dtype):
    tolerance = TOLERANCES[dtype]
    found = outcome(case, by_kernel(kernel, activation), dtype)
    expected = outcome(case, by_loops(activation), torch.float64)
    for name, got, want in zip(("y", "x", "A", "B", "weights"), found, expected, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("kernel", "case", "dtype"), combine(torch.bfloat16))
def test_bfloat16_stays_within_its_rounding(kernel, case, dtype):
    """A few roundings to eight bits, of sums that are as large as those of their terms' absolute values."""
    found = outcome(case, by_kernel(kernel, identity), dtype)
    expected, largest = (
        outcome(case, by_loops(identity), torch.float64, rounded=dtype, change=change)
        for change in (identity, torch.abs)
    )
    assert found[0].dtype == dtype
    for got, want, bound in zip(found, expected, largest, strict=True):
        assert ((got.double() - want).abs() <= 2**-6 * bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_of_another_dtype_follow_the_activations(kernel):
    ranks, experts_TK, _, (x_TI, a_RI, b_RO, weights_TK) = make("rank 8")
    compute = by_kernel(kernel, identity)
    mixed = compute(x_TI.bfloat16(), a_RI.float(), b_RO.float(), weights_TK.float(), experts_TK, ranks)
    assert mixed.dtype == torch.bfloat16
    exact = straight_loops(x_TI, a_RI, b_RO, weights_TK, experts_TK, ranks, identity)
    assert (mixed.double() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bias_of_another_dtype_follows_the_activations(kernel):
    ranks, experts_TK, _, (x_TI, a_RI, b_RO, weights_TK) = make("rank 8, all tokens to one expert")
    bias_R = torch.linspace(-1, 1, len(a_RI), dtype=torch.float32)
    routing = routing_of(experts_TK, weights_TK.float(), len(ranks))
    one = KERNELS[kernel](ranks)
    y_TO = one.contract(one.expand(x_TI.bfloat16(), a_RI.float(), routing, bias_R), b_RO.float(), routing)
    assert y_TO.dtype == torch.bfloat16
    chosen = slice(ranks[0], 2 * ranks[0])
    hidden_Tr = x_TI @ a_RI[chosen].T + bias_R[chosen].double()
    exact_TO = (weights_TK * hidden_Tr) @ b_RO[chosen]
    assert (y_TO.double() - exact_TO).norm() <= 0.02 * exact_TO.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_gives_low_precision_close_to_exact(kernel):
    ranks, experts_TK, _, leaves = make("rank 8")
    given = [leaf.float().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TO = by_kernel(kernel, identity)(*given, experts_TK, ranks)
    assert y_TO.dtype == torch.bfloat16
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact_TO = straight_loops(*leaves, experts_TK, ranks, identity)
    upstream_TO = torch.linspace(-1, 1, y_TO.numel()).reshape(y_TO.shape)
    found = torch.autograd.grad((y_TO.float() * upstream_TO).sum(), given)
    expected = torch.autograd.grad((exact_TO * upstream_TO.double()).sum(), leaves)
    assert (y_TO.double() - exact_TO).norm() <= 0.03 * exact_TO.norm()
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_inside_of_autocast_keeps_the_dtype_of_the_forward_pass(kernel):
    ranks, experts_TK, _, leaves = make("rank 8")
    leaves = [leaf.float().requires_grad_() for leaf in leaves]
    y_TO = by_kernel(kernel, identity)(*leaves, experts_TK, ranks)
    plain = torch.autograd.grad(y_TO.square().sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y_TO.square().sum(), leaves)
    for got, want in zip(inside, plain, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_without_weight_gets_exactly_zero(kernel):
    ranks, experts_TK, _, leaves = make("rank 8")
    leaves[3][2] = 0
    y_TO = by_kernel(kernel, identity)(*(leaf.to(dtype_for(kernel)) for leaf in leaves), experts_TK, ranks)
    assert torch.equal(y_TO[2], torch.zeros_like(y_TO[2]))
    assert (y_TO[[0, 1, 3, 4]].abs().sum(dim=1) > 0).all()


SHARED = {name: case for name, case in CASES.items() if len(set(case[0])) == 1}


@pytest.mark.parametrize(("kernel", "case", "dtype"), combine(torch.float64, torch.float32, cases=SHARED))
def test_a_hidden_that_all_experts_share(kernel, case, dtype):
    """Values and gradients are those of experts whose A are copies of one."""
    ranks, experts_TK, used_TK, leaves = make(case)
    x_TI, a_RI, b_RO, weights_TK = leaves
    a_rI = a_RI[: ranks[0]].clone()

    def by_sharing(x_TI, a_rI, b_RO, weights_TK):
        routing = routing_of(experts_TK, weights_TK, len(ranks))
        one = KERNELS[kernel](ranks)
        return one.contract(one.map(F.gelu, one.share(x_TI @ a_rI.T, routing)), b_RO, routing)

    def by_copies(x_TI, a_rI, b_RO, weights_TK):
        copies_RI = torch.cat([a_rI] * len(ranks))
        return straight_loops(x_TI, copies_RI, b_RO, weights_TK, experts_TK, ranks, F.gelu)

    outcomes = []
    for compute, of_dtype in ((by_sharing, dtype), (by_copies, torch.float64)):
        leaves = [leaf.to(of_dtype).clone().requires_grad_() for leaf in (x_TI, a_rI, b_RO, weights_TK)]
        y_TO = compute(*leaves[:3], torch.where(used_TK, leaves[3], 0.0))
        gradients = torch.autograd.grad((y_TO * torch.linspace(-1, 1, OUT)).sum(), leaves)
        outcomes.append([tensor.detach().double() for tensor in (y_TO, *gradients)])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize(("kernel", "case", "dtype"), combine(torch.float64, torch.float32))
def test_a_bias_is_added_before_the_map(kernel, case, dtype):
    """As a last input of 1, whose column of A is the bias."""
    ranks, experts_TK, used_TK, leaves = make(case)
    x_TI, a_RI, b_RO, weights_TK = leaves
    bias_R = torch.linspace(-1, 1, len(a_RI), dtype=torch.float64)

    def by_bias(x_TI, a_RI, b_RO, weights_TK, bias_R):
        routing = routing_of(experts_TK, torch.where(used_TK, weights_TK, 0.0), len(ranks))
        one = KERNELS[kernel](ranks)
        return one.contract(one.map(F.gelu, one.expand(x_TI, a_RI, routing, bias_R)), b_RO, routing)

    def by_column(x_TI, a_RI, b_RO, weights_TK, bias_R):
        wide_TI, wide_RI = torch.cat([x_TI, torch.ones_like(x_TI[:, :1])], 1), torch.cat([a_RI, bias_R[:, None]], 1)
        weights_TK = torch.where(used_TK, weights_TK, 0.0)
        return straight_loops(wide_TI, wide_RI, b_RO, weights_TK, experts_TK, ranks, F.gelu)

    outcomes = []
    for compute, of_dtype in ((by_bias, dtype), (by_column, torch.float64)):
        leaves = [t.to(of_dtype).clone().requires_grad_() for t in (x_TI, a_RI, b_RO, weights_TK, bias_R)]
        y_TO = compute(*leaves)
        gradients = torch.autograd.grad((y_TO * torch.linspace(-1, 1, OUT)).sum(), leaves)
        outcomes.append([tensor.detach().double() for tensor in (y_TO, *gradients)])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def turn(tensor_TK):
    """[T, K] as one column, all first choices before all second ones."""
    return tensor_TK.T.reshape(-1, 1)


def enter(kernel, x_TI, a_RI, b_RO, routing):
    slots = kernel.map(F.gelu, kernel.expand(x_TI, a_RI, routing))
    return kernel.contract(kernel.by_slot(slots, routing), b_RO, routing.by_slot())


def leave(kernel, x_SI, a_RI, b_RO, routing):
    slots = kernel.map(F.gelu, kernel.expand(x_SI, a_RI, routing.by_slot()))
    return kernel.contract(kernel.by_token(slots, routing), b_RO, routing)


@pytest.mark.parametrize("through", [enter, leave])
@pytest.mark.parametrize(("kernel", "case", "dtype"), combine(torch.float64, torch.float32))
def test_slots_by_slot_and_by_token(kernel, case, dtype, through):
    """Of one hidden per token a result for each slot, and of one hidden per slot their sum."""
    ranks, experts_TK, used_TK, (x_TI, *leaves) = make(case)
    tokens, top_k = experts_TK.shape
    x_TI = torch.cat([(k + 1) * x_TI for k in range(top_k)]) if through is leave else x_TI

    def by_kernel_verbs(x_TI, a_RI, b_RO, weights_TK):
        return through(KERNELS[kernel](ranks), x_TI, a_RI, b_RO, routing_of(experts_TK, weights_TK, len(ranks)))

    def by_single_slots(x_TI, a_RI, b_RO, weights_TK):
        x_SI = x_TI if through is leave else torch.cat([x_TI] * top_k)
        y_SO = straight_loops(x_SI, a_RI, b_RO, turn(weights_TK), turn(experts_TK), ranks, F.gelu)
        return y_SO.reshape(top_k, tokens, OUT).sum(dim=0) if through is leave else y_SO

    outcomes = []
    for compute, of_dtype in ((by_kernel_verbs, dtype), (by_single_slots, torch.float64)):
        given = [leaf.to(of_dtype).clone().requires_grad_() for leaf in (x_TI, *leaves)]
        y_TO = compute(*given[:3], torch.where(used_TK, given[3], 0.0))
        upstream_TO = torch.linspace(-1, 1, y_TO.numel(), dtype=of_dtype).reshape(y_TO.shape)
        gradients = torch.autograd.grad((y_TO * upstream_TO).sum(), given)
        outcomes.append([tensor.detach().double() for tensor in (y_TO, *gradients)])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
