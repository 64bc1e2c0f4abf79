"""Dtypes and devices: whole models moved, made without memory, and evaluated in low precision."""

import pytest
import torch
from peft import get_peft_model

from tests.behaviours.cases import base, batch, config, each_recipe, load, logits, of_adapters, same, wrap

MOVES = {
    "to bfloat16": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "half": (lambda model: model.half(), torch.float16),
    "double": (lambda model: model.double(), torch.float64),
}


@pytest.mark.parametrize("move", MOVES)
@each_recipe
def test_a_model_moved_to_another_dtype_computes_in_it_and_comes_back(recipe, move):
    act, dtype = MOVES[move]
    model = wrap(recipe)
    expected = logits(model)
    assert {p.dtype for p in act(model).parameters()} == {dtype}
    found = logits(model)
    assert found.dtype == dtype
    # a token whose experts are nearly as probable may get others
    error = (found.float() - expected).norm(dim=-1).median()
    assert error < 0.05 * expected.norm(dim=-1).median()
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if dtype == torch.float64:
        assert same(logits(model), expected)


@each_recipe
def test_a_model_without_memory_gets_it_and_its_values(recipe):
    expected = wrap(recipe)
    with torch.device("meta"):
        model = get_peft_model(base(), config(recipe))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {key: p.shape for key, p in of_adapters(model).items()} == {
        key: p.shape for key, p in of_adapters(expected).items()
    }
    # what no state holds (the frequencies of positions) is not made on a device without memory
    model = get_peft_model(base(), config(recipe), low_cpu_mem_usage=True)
    for key, p in of_adapters(model).items():
        owner, _, name = key.rpartition(".")
        if p.device.type == "meta":
            model.get_submodule(owner)[name] = torch.nn.Parameter(torch.empty_like(p, device="cpu"))
    model.load_state_dict(expected.state_dict())
    assert same(logits(model), logits(expected))


@each_recipe
def test_routers_stay_in_fp32_beside_a_low_base(recipe, saved):
    folder, _ = saved(recipe)
    model = load(folder, autocast_adapter_dtype=False).to(torch.bfloat16)
    assert {p.dtype for p in of_adapters(model).values()} == {torch.bfloat16}
    # made or loaded there, they do
    made = get_peft_model(base().to(torch.bfloat16), config(recipe), autocast_adapter_dtype=False)
    routers = {p.dtype for key, p in of_adapters(made).items() if "router" in key}
    assert routers <= {torch.float32}


@each_recipe
def test_autocast_changes_no_weight(recipe):
    model = wrap(recipe)
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = model(**batch()).logits
    assert found.dtype in (torch.bfloat16, torch.float32)
    error = (found.float() - expected).norm(dim=-1).median()
    assert error < 0.05 * expected.norm(dim=-1).median()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(logits(model), expected)


@each_recipe
def test_inference_mode_computes_the_same(recipe):
    model = wrap(recipe)
    expected = logits(model)
    with torch.inference_mode():
        found = model(**batch()).logits
    torch.testing.assert_close(found.clone(), expected, rtol=1e-5, atol=1e-6)
    assert same(logits(model), expected)
