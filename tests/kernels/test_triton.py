"""Kernel triton: softmax, top-k and gates in the launch that multiplies, and its mirror, on a GPU or interpreted."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model

import mixora
from mixora.contracts import Shape
from mixora.errors import ConfigError
from mixora.kernels import Triton
from mixora.kernels.triton import Term, find_obstacle, shrink
from mixora.mixture import joining
from tests.kernels.test_joint import TEXT
from tests.models import adapt, gradients, tiny_gpt2, tiny_llama

OBJECTION = Triton.objection(Shape(8, 8, (2, 2)), torch.float32)
needs_triton = pytest.mark.skipif(OBJECTION is not None, reason=f"kernel triton {OBJECTION}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# by name: tokens, input width, and each site's ranks, K and scale
CASES = {
    "unequal ranks of two sites": (70, 100, [((3, 3, 3), 2, 1.0), ((1, 4, 2, 5), 3, 2.0)]),
    "more columns than a program holds": (66, 64, [((64,) * 5, 2, 0.5)]),
    "a single expert": (5, 33, [((8,), 1, 2.0)]),
    "every expert for every token": (64, 16, [((2, 1, 3), 3, 1.0)]),
    "more experts than the fewest columns": (3, 16, [((8,) * 20, 5, 2.0)] * 3),
    "no token": (0, 16, [((2, 3), 1, 1.0)]),
}
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def make(case, dtype):
    """x, the tokens that are no padding, and the terms, all numbers as `dtype` rounds them."""
    tokens, width, sites = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(DEVICE, dtype)

    valid_T = (torch.rand(tokens, generator=generator) > 0.2).to(DEVICE)
    terms = [
        Term(str(n), draw(sum(ranks), width), 3 * draw(len(ranks), width), ranks, top_k, scale)
        for n, (ranks, top_k, scale) in enumerate(sites)
    ]
    return draw(tokens, width) * width**0.5, valid_T, terms


def by_launch(x_TI, valid_T, terms, renormalise):
    joined = shrink(x_TI, x_TI, terms, valid_T, renormalise)
    routings = [joined.routings[term.path] for term in terms]
    for routing in routings:
        assert torch.equal(routing.assigned_TK, valid_T[:, None].expand_as(routing.assigned_TK))
    hidden = [joined.hidden[term.path] for term in terms]
    return [
        (h, r.logits_TE, r.probs_TE, r.weights_TK, r.experts_TK) for h, r in zip(hidden, routings, strict=True)
    ], joined.x_TI


def straight(x_TI, valid_T, terms, renormalise):
    found = []
    for term in terms:
        z_TE = x_TI @ term.w_EI.T
        p_TE = z_TE.exp() / z_TE.exp().sum(dim=1, keepdim=True)
        weights_TK, experts_TK = p_TE.topk(term.top_k, dim=1)
        if renormalise:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        weights_TK = weights_TK * valid_T[:, None]
        expert_R = torch.repeat_interleave(torch.tensor(term.ranks)).to(DEVICE)
        gates_TR = (weights_TK[:, :, None] * (experts_TK[:, :, None] == expert_R)).sum(dim=1)
        found.append((term.scale * gates_TR * (x_TI @ term.a_RI.T), z_TE, p_TE, weights_TK, experts_TK))
    return found, x_TI


def outcome(compute, case, dtype, renormalise, of_dtype, felt=(0, 1, 2, 3)):
    """Outputs and gradients, where something depends on the `felt` outputs of each site, and on x beside them."""
    x_TI, valid_T, terms = make(case, dtype)
    rows = [[rows.to(of_dtype).clone().requires_grad_() for rows in (term.a_RI, term.w_EI)] for term in terms]
    x_TI = x_TI.to(of_dtype).clone().requires_grad_()
    given = [Term(t.path, *own, t.ranks, t.top_k, t.scale) for t, own in zip(terms, rows, strict=True)]
    found, tail_TI = compute(x_TI, valid_T, given, renormalise)
    total = tail_TI.double().sin().sum()
    for outputs in found:
        total = total + sum((outputs[n].double() * (1 + n) + 0.3).sin().sum() for n in felt)
    leaves = [x_TI, *(leaf for own in rows for leaf in own)]
    flat = [tensor.detach() for outputs in found for tensor in outputs]
    return flat, torch.autograd.grad(total, leaves, allow_unused=True)


def assert_near(case, dtype, renormalise, felt=(0, 1, 2, 3)):
    found = outcome(by_launch, case, dtype, renormalise, dtype, felt)
    expected = outcome(straight, case, dtype, renormalise, torch.float64, felt)
    for ours, theirs in zip(found, expected, strict=True):
        for got, want in zip(ours, theirs, strict=True):
            # what nothing was made of
            assert got is not None or want is None or not want.any()
            if got is not None and want is not None:
                assert (got.double() - want.double()).norm() <= TOLERANCES[dtype] * want.double().norm() + 1e-7


@needs_triton
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_no_site_makes_a_gradient_of_an_input_that_needs_none(needs_gradient):
    x_TI, valid_T, terms = make("a single expert", torch.float32)
    for term in terms:
        term.a_RI.requires_grad_()
    x_TI.requires_grad_(needs_gradient)
    assert shrink(x_TI, x_TI, terms, valid_T, True).x_TI.requires_grad == needs_gradient


@needs_triton
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_against_float64(case, dtype, renormalise):
    assert_near(case, dtype, renormalise)


@needs_triton
@pytest.mark.parametrize("felt", [(0,), (1, 2), (0, 3), (3,)], ids=str)
def test_gradients_where_only_some_outputs_are_used(felt):
    assert_near("more experts than the fewest columns", torch.float32, True, felt)


@needs_triton
@pytest.mark.parametrize("renormalise", [True, False])
# numpy, which the interpreter computes with
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows_in_its_token_alone(bad, renormalise):
    x_TI, valid_T, terms = make("unequal ranks of two sites", torch.float32)
    token = int(valid_T.nonzero()[3])
    x_TI[token, 5] = bad
    rows = [term.w_EI.requires_grad_() for term in terms]
    joined = shrink(x_TI, x_TI, terms, valid_T, renormalise)
    for routing in joined.routings.values():
        assert torch.equal(routing.assigned_TK, valid_T[:, None].expand_as(routing.assigned_TK))
        is_bad_T = ~routing.weights_TK.isfinite().all(dim=1)
        assert is_bad_T.nonzero().flatten().tolist() == [token]
    total = sum(hidden.sum() for hidden in joined.hidden.values())
    assert all(gradient.isnan().any() for gradient in torch.autograd.grad(total, rows))


def make_model(recipe, kernel, base=tiny_llama, **changes):
    torch.manual_seed(0)
    return adapt(base(), mixora.recipe(recipe, kernel=kernel, rank=3, **changes)).to(DEVICE)


def step(model, seed=3):
    torch.manual_seed(seed)
    output = model(**{name: tensor.to(DEVICE) for name, tensor in TEXT.items()})
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


PLAIN = {"num_experts": 4, "top_k": 2, "dropout": 0.0}


@needs_triton
@pytest.mark.parametrize("share_router", [False, True])
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_a_model_computes_what_it_does_with_loop(base, share_router, monkeypatch):
    """Padding, a balance loss; one launch for the linears that read one input."""
    counts = []

    def spy(x, x_TI, terms, *rest, own=joining.triton.shrink):
        counts.append(len(terms))
        return own(x, x_TI, terms, *rest)

    monkeypatch.setattr(joining.triton, "shrink", spy)
    models = [make_model("mola", kernel, base, **PLAIN, share_router=share_router) for kernel in ("triton", "loop")]
    assert_same(*map(step, models))
    assert counts == ([3, 1, 2, 1] * 2 if base is tiny_llama else [1, 1, 1, 1] * 2)


@needs_triton
def test_recomputed_layers_compute_the_same():
    model = make_model("mola", "triton", **PLAIN)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(step(model), step(make_model("mola", "loop", **PLAIN)))


@needs_triton
@pytest.mark.parametrize(
    ("recipe", "changes", "reason"),
    [
        ("mola", {"num_experts": 4, "top_k": 2, "dropout": 0.3}, "its experts' input has dropout"),
        ("sira", {"num_experts": 4, "top_k": 2}, "its router is not softmax and top-k alone"),
        ("adamoe", {"num_experts": 3, "null_experts": 2, "top_k": 2}, "its router is not softmax and top-k alone"),
        ("lora", {}, "its router is not softmax and top-k alone"),
    ],
)
def test_where_routes_need_more_joint_computes(recipe, changes, reason, caplog):
    with caplog.at_level(logging.INFO, "mixora"):
        found = step(make_model(recipe, "triton", **changes))
    assert_same(found, step(make_model(recipe, "joint", **changes)))
    assert any(reason in r.message and "kernel 'joint' computes" in r.message for r in caplog.records)


@needs_triton
def test_evaluation_without_gradients_and_under_autocast():
    models = [make_model("mola", kernel, **PLAIN).eval() for kernel in ("triton", "joint")]
    inputs = {name: TEXT[name].to(DEVICE) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(*(model(**inputs).logits for model in models))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(*(model(**inputs).logits for model in models))


@needs_triton
def test_low_precision_is_near_the_exact_numbers():
    # every expert serves every token, so that no rounding turns a choice
    settings = {**PLAIN, "top_k": 4}
    exact = make_model("mola", "loop", **settings)
    config = mixora.recipe("mola", kernel="triton", rank=3, **settings)
    low = get_peft_model(tiny_llama().bfloat16(), config).to(DEVICE).train()
    low.load_state_dict(exact.state_dict())
    logits, found = step(low)
    want, expected = step(exact)
    assert (logits.float() - want).norm() < 0.02 * want.norm()
    for name, gradient in expected.items():
        assert (found[name].float() - gradient).norm() < 0.2 * gradient.norm() + 1e-6, name


def run_python(program, **environment):
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, check=False)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mixora.kernels import launches
from mixora.kernels.triton import TOKENS

def compile(function, types, **constants):
    rest = iter(types.split())
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else next(rest) for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared)

compile(launches.shrink, "*bf16 *bf16 *u8 *i32 *fp32 *i32 *bf16 *bf16 *fp32 *fp32 *fp32 *i64" + " i32" * 5,
        RENORMALISE=True, T=TOKENS, IN=64, R=128, E=16, K=1)
compile(launches.shrink_backward, "*fp32 *fp32 *fp32 *fp32 *i64 *fp32 *fp32 *fp32 *i32 *fp32 *i32 *fp32" + " i32" * 4,
        RENORMALISE=False, T=TOKENS, R=128, E=16, K=2)
compile(launches.shrink_backward, "*bf16 *bf16 *fp32 *fp32 *i64 *i32 *fp32 *i32 *bf16" + " i32" * 4,
        dgates_ptr=None, dp_ptr=None, dz_ptr=None, RENORMALISE=True, T=TOKENS, R=128, E=16, K=2)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_it_compiles_for_a_gpu_that_is_not_there(tmp_path):
    """For compute capability 9.0, within the shared memory of 8.6, which has the least."""
    done = run_python(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert all(int(size) <= 99 * 1024 for size in done.stdout.split())
    assert len(done.stdout.split()) == 3


def test_it_needs_triton_and_a_gpu(monkeypatch):
    shape = Shape(8, 8, (2, 2))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Triton.objection(shape, torch.float32) == "needs the package triton, which is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert Triton.objection(shape, torch.float32) == "needs an NVIDIA GPU, and there is none"
    assert "cannot compute in torch.float64; valid: torch.float32" in Triton.objection(shape, torch.float64)
    with pytest.raises(
        ConfigError, match=r"rules\.linears\.kernel.*'triton' needs an NVIDIA GPU.*valid here: auto, loop"
    ):
        mixora.plan(tiny_llama(), mixora.recipe("mola", kernel="triton", **PLAIN))


def test_inputs_that_no_launch_can_read(monkeypatch):
    assert find_obstacle(torch.zeros(2, 2, dtype=torch.float64)) == "its input is in torch.float64"
    assert find_obstacle(torch.zeros(2, 2, device="meta")) == "its input is on meta"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert find_obstacle(torch.zeros(2, 2)) == "its input is on cpu"
