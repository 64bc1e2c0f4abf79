"""An adapted linear against formulas written token by token in float64; the formulas share no code with the package."""

import torch

import mixora
from mixora.passes import tracing
from tests.models import OneLinear, adapt

ROWS, LENGTH, IN, OUT = 2, 7, 5, 6
BALANCE, Z = 0.7, 0.05


def setup(recipe, kernel, seed, **changes):
    """The adapted linear in float64 with random tensors, its input, its mask and an upstream gradient."""
    coefficients = {"losses.load_balance.coefficient": BALANCE, "losses.z_loss.coefficient": Z}
    config = mixora.recipe(recipe, targets=["proj"], kernel=kernel, **coefficients, **changes)
    model = adapt(OneLinear(IN, OUT), config).double()
    generator = torch.Generator().manual_seed(seed)
    tensors = model.base_model.model.proj.parameters_of("default")
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    x_BSI = torch.randn(ROWS, LENGTH, IN, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_BS = torch.ones(ROWS, LENGTH)
    mask_BS[0, :2], mask_BS[1, 4:] = 0, 0
    upstream_TO = torch.randn(ROWS * LENGTH, OUT, generator=generator, dtype=torch.float64)
    return model, tensors, x_BSI, mask_BS, upstream_TO * mask_BS.reshape(-1, 1)


def compare(recipe, kernel, reference, seed=0, **changes):
    """Outputs, auxiliary losses and all gradients; returns the routing that was compared.

    `reference(x_I of each real token, tensors)` gives the deltas of these tokens, the balance loss and the z-loss.
    """
    model, tensors, x_BSI, mask_BS, upstream_TO = setup(recipe, kernel, seed, **changes)
    layer = model.base_model.model.proj
    names = list(tensors)
    y_TO = model(x_BSI, attention_mask=mask_BS).flatten(0, 1)
    found = torch.autograd.grad((y_TO * upstream_TO).sum(), [x_BSI, *tensors.values()])

    real = [t for t, keep in enumerate(mask_BS.flatten()) if keep]
    leaf_TI = x_BSI.detach().flatten(0, 1).requires_grad_()
    deltas, balance, z = reference([leaf_TI[t] for t in real], tensors)
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    y = {t: weight @ leaf_TI[t] + bias + delta for t, delta in zip(real, deltas, strict=True)}
    objective = sum((y[t] * upstream_TO[t]).sum() for t in real) + BALANCE * balance + Z * z
    expected = torch.autograd.grad(objective, [leaf_TI, *tensors.values()])

    for t in real:
        torch.testing.assert_close(y_TO[t], y[t], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.readings["default"]["load_balance"], balance.detach())
    torch.testing.assert_close(layer.readings["default"]["z_loss"], z.detach())
    for name, got, want in zip(["x", *names], found, expected, strict=True):
        want = want.reshape(got.shape)
        assert want.abs().max() > 1e-3, f"the reference does not test {name}"
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"gradient of {n}: {m}")
    with tracing() as trace:
        model(x_BSI, attention_mask=mask_BS)
    return trace.of("proj")[0]
