"""What each allocator thinks a site deserves, against closed forms and straight computation."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

import mixora
from mixora.allocators import ALLOCATORS, Groups, Proportional, Sensitivity, Spectral
from mixora.allocators.spectral import hill_exponent
from mixora.contracts import Candidate, Evidence
from mixora.errors import ConfigError, DataError, ModelError
from tests.models import tiny_llama, token_ids

RANKS = [(2, 2), (4, 4, 4), (3,)]


def candidates(modules=None):
    modules = modules or [nn.Linear(6, 5, bias=False) for _ in RANKS]
    return [Candidate(f"layers.{n}.proj", m, r) for n, (m, r) in enumerate(zip(modules, RANKS, strict=True))]


def evidence(model=None, batches=None, seen=None):
    seen = [] if seen is None else seen
    return Evidence(model, batches, lambda done, total: seen.append((done, total)))


def test_every_allocator_can_be_named():
    for kind in ALLOCATORS:
        config = mixora.recipe("hilo", **{"allocator.kind": kind, "budget": 9000, "budget_of": "active"})
        assert (config.allocator["kind"], config.allocator["budget"]) == (kind, 9000)
    with pytest.raises(ConfigError, match=r"allocator\.kind: got 'spectrum'; valid: .*did you mean 'spectral'"):
        mixora.recipe("hilo", **{"allocator.kind": "spectrum"})
    with pytest.raises(ConfigError, match=r"allocator\.budget: got 0; valid: greater than or equal to 1"):
        mixora.recipe("hilo", budget=0)


def test_groups_keep_the_ranks_and_proportional_the_experts():
    assert Groups(Groups.Config()).weigh(candidates(), evidence()) == [4, 12, 3]
    assert Proportional(Proportional.Config()).weigh(candidates(), evidence()) == [4, 9, 1]


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.5])
@pytest.mark.parametrize("tail", [0.2, 0.5])
def test_hill_finds_the_exponent_of_a_pareto_sample(exponent, tail):
    """P(X > x) = x^(1 - a): the quantiles at (i + 1/2) / n are a sample without noise."""
    count = 200_000
    above_n = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    sample_n = above_n ** (1 / (1 - exponent))
    mixed_n = sample_n[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    assert hill_exponent(mixed_n, tail) == pytest.approx(exponent, rel=1e-3)


def test_hill_by_hand():
    """k = 2 of 4: 1 + 2 / (log 8/2 + log 4/2) = 1 + 2 / (3 log 2)."""
    values = torch.tensor([1.0, 8.0, 4.0, 2.0])
    assert hill_exponent(values, 0.5) == pytest.approx(1 + 2 / (3 * torch.log(torch.tensor(2.0)).item()))
    assert hill_exponent(torch.ones(4), 0.5) is None
    assert hill_exponent(torch.zeros(4), 0.5) is None
    assert hill_exponent(torch.tensor([1.0]), 0.5) is None
    assert hill_exponent(torch.tensor([1.0, torch.inf]), 0.5) is None


def test_spectral_reads_singular_values():
    """Weights of known squared singular values 8, 4, 2, 1 and 27, 9, 3, 1: ratios 2 and 3."""
    modules, generator = [], torch.Generator().manual_seed(0)
    for ratio in (2.0, 3.0, 2.0):
        u, _ = torch.linalg.qr(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        module = nn.Linear(4, 5, bias=False).double()
        module.weight.data = u * (ratio ** torch.arange(4).double()).sqrt() @ v.T
        modules.append(module)
    seen = []
    found = Spectral(Spectral.Config(beta=2.5)).weigh(candidates(modules), evidence(seen=seen))
    two, three = (1 + 2 / (3 * torch.log(torch.tensor(r, dtype=torch.float64))).item() for r in (2.0, 3.0))
    assert found == pytest.approx([1, (three / two) ** 2.5, 1])
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("bits", [4, 8])
def test_spectral_reads_quantised_weights(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    exact = nn.Linear(64, 64, bias=False)
    kind = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    coarse = kind(64, 64, bias=False, **({"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}))
    coarse.load_state_dict(exact.state_dict())
    coarse = coarse.to("cpu")
    assert not coarse.weight.dtype.is_floating_point
    of_exact, of_coarse, _ = Spectral(Spectral.Config()).weigh(candidates([exact, coarse, exact]), evidence())
    assert of_coarse == pytest.approx(of_exact, rel=0.03)
    with pytest.raises(ModelError, match=r"layers\.1\.proj: a quantised weight has no gradient"):
        Sensitivity(Sensitivity.Config()).weigh(candidates([exact, coarse, exact]), evidence(None, [{}]))


def test_spectral_refuses_what_has_no_spectrum():
    flat = [nn.Linear(6, 5, bias=False) for _ in RANKS]
    nn.init.zeros_(flat[1].weight)
    with pytest.raises(ModelError, match=r"layers\.1\.proj: its singular values are all equal or not finite.*'groups'"):
        Spectral(Spectral.Config()).weigh(candidates(flat), evidence())
    nn.init.constant_(flat[1].weight, torch.nan)
    with pytest.raises(ModelError, match=r"layers\.1\.proj: its singular values are all equal or not finite"):
        Spectral(Spectral.Config()).weigh(candidates(flat), evidence())
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ModelError, match=r"allocator\.kind: 'spectral' reads the weights.*meta device.*a loaded model"):
        mixora.plan(model, mixora.recipe("sira", **{"allocator.kind": "spectral"}))


def batches(count, length=6):
    ids = [token_ids(2, length, seed=n) for n in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_sensitivity_is_the_mean_squared_gradient(power):
    model = tiny_llama().train()
    model.lm_head.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    paths = [
        f"model.layers.{n}.{leaf}" for n, leaf in ((0, "self_attn.q_proj"), (1, "mlp.up_proj"), (1, "mlp.down_proj"))
    ]
    sites = [Candidate(path, model.get_submodule(path), (1,)) for path in paths]
    seen = []
    config = Sensitivity.Config(batches=3, power=power)
    found = Sensitivity(config).weigh(sites, evidence(model, iter(batches(5)), seen))

    twin, means = tiny_llama(), [0.0] * 3
    for batch in batches(3):
        loss = twin(**batch).loss
        grads = torch.autograd.grad(loss, [twin.get_submodule(path).weight for path in paths])
        means = [mean + (grad.double() ** 2).mean().item() / 3 for mean, grad in zip(means, grads, strict=True)]
    assert found == pytest.approx([(mean / max(means)) ** power for mean in means], rel=1e-5)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert model.training
    assert not model.lm_head.weight.requires_grad and model.get_submodule(paths[0]).weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sensitivity_needs_batches_with_labels():
    config = mixora.recipe("sira", **{"allocator.kind": "sensitivity", "top_k": 2})
    for use in (mixora.plan, get_peft_model):
        with pytest.raises(
            ConfigError, match=r"'sensitivity' needs batches.*mixora\.allocate\(model, config, batches\)"
        ):
            use(tiny_llama(), config)
    with pytest.raises(DataError, match=r"allocator\.batches: the model gives no loss.*with labels"):
        mixora.allocate(tiny_llama(), config, [{"input_ids": token_ids(1, 4)}])
    nothing = {"input_ids": token_ids(1, 4), "labels": torch.full((1, 4), -100)}
    with pytest.raises(DataError, match=r"allocator\.batches: the loss has no finite gradient"):
        mixora.allocate(tiny_llama(), config, [nothing])


def test_sensitivity_refuses_quantised_weights():
    module = nn.Linear(6, 5, bias=False)
    module.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.0\.proj: a quantised weight has no gradient.*'spectral'"):
        Sensitivity(Sensitivity.Config()).weigh(candidates([module] * 3), evidence(None, [{}]))
