"""A compiled model with a mixture computes and trains as it does without."""

import shutil

import pytest
import torch

import mixora
from tests.models import adapt, gradients, tiny_llama, token_ids

IDS = token_ids(2, 8)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs gcc")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.works_with("torch.compile", "inductor: a training step, then evaluation")
def test_a_compiled_model_trains_and_evaluates_as_without():
    settings = {"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0, "targets": ["down_proj"]}
    model = adapt(tiny_llama(layers=1), mixora.recipe("sira", **settings))
    expected = model(**BATCH)
    expected.loss.backward()
    wanted = gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model)
    found = compiled(**BATCH)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    # experts, routers and the auxiliary loss that reaches the latter
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**BATCH).logits, model(**BATCH).logits, rtol=1e-5, atol=1e-5)
