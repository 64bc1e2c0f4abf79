"""What linear routers have in common: the softmax."""

import pytest
import torch

from mixora.routers.linear import softmax
from mixora.routers.topk import TopK, TopKConfig
from tests.models import all_real


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_softmax_has_no_denormal_numbers(dtype):
    tiny = torch.finfo(dtype).tiny
    logits_TC = torch.log(torch.tensor([tiny * 2, tiny / 4, 1.0], dtype=torch.float64)).to(dtype)[None]
    probs_TC = softmax(logits_TC)
    assert probs_TC[0, 0] >= tiny
    assert probs_TC[0, 1:].tolist() == [0.0, 1.0]


def test_an_expert_of_denormal_weight_is_no_choice():
    router = TopK(TopKConfig(num_experts=3, top_k=2, renormalise=True))
    x_TI = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    parameters = {"router": torch.tensor([[92.0, 1.0], [0.0, 1.0], [-9.0, 0.0]], requires_grad=True)}
    routing = router.route(x_TI, parameters, all_real(2, x_TI.device), True)
    assert routing.weights_TK.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert routing.assigned_TK.tolist() == [[True, False], [True, True]]
    (gradient,) = torch.autograd.grad(routing.weights_TK.square().sum(), parameters["router"])
    assert torch.isfinite(gradient).all()
