"""Drawn experts that begin with the same numbers, and those that begin each with its own (AdaMix)."""

import itertools
import re

import pytest
import torch
from peft import get_peft_model

import mixora
from tests.models import tiny_llama, token_ids

IDS = token_ids(3, 7)
TEXT = {"input_ids": IDS, "labels": IDS}


def start(recipe, **changes):
    """The untrained tensors of a model, by their names without an expert's number."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), mixora.recipe(recipe, rank=2, **changes))
    found = {}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            found.setdefault(re.sub(r"_\d+(?=\.default)", "", name), []).append(tensor)
    return model, found


@pytest.mark.parametrize("share", ["up", "down", "none"])
@pytest.mark.parametrize("recipe", ["adamix", "adamix-lora"])
def test_experts_that_start_alike_start_as_the_one_expert_of_that_seed(recipe, share):
    (_, one), (_, alike) = start(recipe, num_experts=1), start(recipe, num_experts=3, share=share, start="alike")
    assert alike.keys() == one.keys()
    assert {len(tensors) for tensors in alike.values()} == ({3} if share == "none" else {1, 3})
    for name, tensors in alike.items():
        assert all(torch.equal(tensor, one[name][0]) for tensor in tensors), name
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


@torch.no_grad()
def test_whatever_is_drawn_computes_what_one_adapter_does_while_experts_are_alike():
    (one, _), (alike, _) = start("adamix", num_experts=1), start("adamix", num_experts=3, start="alike")
    expected = one(**TEXT).logits
    with one.disable_adapter():
        assert not torch.allclose(one(**TEXT).logits, expected)
    for seed in range(4):
        torch.manual_seed(seed)
        torch.testing.assert_close(alike.train()(**TEXT).logits, expected)
    torch.testing.assert_close(alike.eval()(**TEXT).logits, expected)


def test_training_sets_experts_apart_that_started_alike():
    model, tensors = start("adamix", num_experts=3, start="alike")
    optimiser = torch.optim.SGD([tensor for of_kind in tensors.values() for tensor in of_kind], lr=0.1)
    for _ in range(8):
        optimiser.zero_grad()
        mixora.compute_loss(model, TEXT)[0].backward()
        optimiser.step()
    downs = [of_kind for name, of_kind in tensors.items() if "mixora_A" in name]
    assert downs and all(not torch.equal(a, b) for of_kind in downs for a, b in itertools.combinations(of_kind, 2))


def test_experts_that_start_apart_differ():
    _, tensors = start("adamix", num_experts=3, start="apart")
    downs = [of_kind for name, of_kind in tensors.items() if "mixora_A" in name]
    assert downs and all(not torch.equal(a, b) for of_kind in downs for a, b in itertools.combinations(of_kind, 2))
