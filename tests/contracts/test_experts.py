"""What every expert of the table promises, with every kernel."""

import pytest
import torch

from mixora.contracts import Shape
from mixora.experts import EXPERTS, Bottleneck
from mixora.kernels import KERNELS
from mixora.routing import Routing

UNEQUAL, EQUAL = Shape(5, 7, (1, 4, 2, 3)), Shape(5, 7, (3, 3, 3, 3))
# they compute in float64 and with any ranks; the others have tests of their own in tests/kernels
ANY = [name for name, kernel in KERNELS.items() if kernel.objection(UNEQUAL, torch.float64) is None]
EXPERTS_TK = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2]])
FORMS = [(name, {}) for name in EXPERTS] + [("bottleneck", {"biases": True}), ("bottleneck", {"init": "normal"})]


def routing_of(weights_TK):
    assigned_TK = weights_TK != 0
    return Routing(EXPERTS_TK, weights_TK, assigned_TK, assigned_TK, torch.ones(4, dtype=torch.bool), 4)


def shape_for(expert):
    return EQUAL if expert.one_rank else UNEQUAL


def outcome(kernel, expert, x, tensors, weights_TK):
    leaves = [x, weights_TK, *tensors.values()]
    ranks = shape_for(expert).ranks
    y_TO = expert.delta(x, tensors, routing_of(weights_TK), KERNELS[kernel](ranks), training=True)
    assert y_TO.shape == (4, 7) and y_TO.dtype == x.dtype
    return [y_TO, *torch.autograd.grad(y_TO.sin().sum(), leaves)]


@pytest.mark.parametrize(("name", "settings"), FORMS)
@pytest.mark.parametrize("kernel", ANY)
def test_kernels_agree_on_values_and_gradients(kernel, name, settings):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    expert = EXPERTS[name](EXPERTS[name].Config(**settings))
    tensors = {kind: draw(*shape) for kind, shape in expert.parameter_shapes(shape_for(expert)).items()}
    x, weights_TK = draw(4, 5 if expert.reads == "input" else 7), draw(4, 2)
    found, expected = (outcome(k, expert, x, tensors, weights_TK) for k in (kernel, "loop"))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), FORMS)
def test_every_parameter_is_initialised(name, settings):
    expert = EXPERTS[name](EXPERTS[name].Config(**settings))
    tensors = {kind: torch.full(shape, torch.nan) for kind, shape in expert.parameter_shapes(shape_for(expert)).items()}
    expert.initialise(tensors, shape_for(expert))
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    is_near_identity = settings.get("init") == "normal"
    assert bool(tensors["B"].any()) == is_near_identity
    assert tensors["A"].any()


def test_normal_initialisation_has_the_standard_deviation_asked_for():
    expert = Bottleneck(Bottleneck.Config(init="normal", init_std=0.05, biases=True))
    shape = Shape(64, 64, (64, 64))
    tensors = {kind: torch.ones(sizes) for kind, sizes in expert.parameter_shapes(shape).items()}
    torch.manual_seed(0)
    expert.initialise(tensors, shape)
    assert abs(float(tensors["A"].std()) - 0.05) < 0.002 and abs(float(tensors["B"].std()) - 0.05) < 0.002
    assert not tensors["bias_A"].any() and not tensors["bias_B"].any()
