"""A block that all layers share, as ALBERT has it: its auxiliary loss is the mean over its calls."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mixora
from mixora.passes import injection, tracing
from mixora.training.batch_loss import auxiliary_loss
from tests.models import adapt, gradients, tiny_albert, token_ids

BATCH = {"input_ids": token_ids(2, 6), "labels": torch.tensor([0, 2])}
SIRA = {"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0}


def adapted(layers, **changes):
    return adapt(tiny_albert(layers), mixora.recipe("sira", **{**SIRA, **changes})).double()


def balance_of(routing):
    """E sum_e f_e P_e, by hand."""
    experts = routing.num_experts
    share_E = F.one_hot(routing.experts_TK.flatten(), experts).double().mean(dim=0)
    return experts * (share_E * routing.probs_TE.mean(dim=0)).sum()


@pytest.mark.parametrize("layers", [1, 6])
def test_the_loss_is_the_mean_over_sites_however_often_they_are_called(layers):
    model = adapted(layers)
    with tracing(owns_losses=True) as trace:
        model(**BATCH)
        model(**BATCH)
    total, terms = auxiliary_loss(model, trace)
    expected = torch.stack([balance_of(o.routing) for o in trace.observations]).mean()
    assert len(trace.observations) == 2 * 4 * layers and 1 < expected < 2
    torch.testing.assert_close(total.double(), expected)
    torch.testing.assert_close(terms["load_balance"].double(), expected)


def injected(model, **batch):
    """The gradients of the auxiliary loss alone, as a foreign trainer gets them."""
    (model(**batch)[0] * 0).sum().backward()
    return {name: gradient for name, gradient in gradients(model).items() if "mixora_router" in name}


def owned(model, **batch):
    with tracing(owns_losses=True) as trace:
        model(**batch)
    auxiliary_loss(model, trace)[0].backward()
    found = {name: gradient for name, gradient in gradients(model).items() if "mixora_router" in name}
    assert any(gradient.abs().max() > 1e-4 for gradient in found.values())
    return found


def test_a_foreign_trainer_gets_the_same_gradient():
    model = adapted(3)
    expected = owned(model, **BATCH)
    torch.testing.assert_close(injected(model, **BATCH), expected, rtol=1e-5, atol=1e-9)


def test_so_it_does_where_several_processes_train(monkeypatch):
    """Of two, with nothing from the other: the mean of the gradients is half of this one."""
    model = adapted(3)
    expected = {name: 2 * gradient for name, gradient in owned(model, **BATCH).items()}
    monkeypatch.setattr(injection, "count_processes", lambda: 2)
    torch.testing.assert_close(injected(model, **BATCH), expected, rtol=1e-5, atol=1e-9)


class Repeated(nn.Module):
    """One linear, called three times; `use_reentrant` where it is recomputed."""

    use_reentrant = None

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(3):
            is_kept = self.use_reentrant is None
            x = self.proj(x) if is_kept else checkpoint(self.proj, x, use_reentrant=self.use_reentrant)
        return (x,)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_so_it_does_where_the_layer_is_recomputed(use_reentrant):
    torch.manual_seed(0)
    model = adapt(Repeated(), mixora.recipe("sira", **SIRA, targets=["proj"]), seed=1).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    expected = owned(model, x=x)
    model.get_base_model().use_reentrant = use_reentrant
    torch.testing.assert_close(injected(model, x=x), expected, rtol=1e-5, atol=1e-9)
