"""Bases in 4 and 8 bits: trained, only the adapter saved, read back."""

import importlib.util
import logging
import re
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import mixora
from mixora.errors import MixoraError
from tests.models import adapt, tiny_llama, token_ids

IDS = token_ids(2, 8)


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def int8():
    return BitsAndBytesConfig(load_in_8bit=True)


def weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def form(make, library, what):
    """A parameter that needs `library`: how a base is quantised, and why kernel `joint` cannot read its weights."""
    is_missing = importlib.util.find_spec(library) is None
    marks = pytest.mark.skipif(is_missing, reason=f"needs {library}: pip install mixora[quantised]")
    return pytest.param(
        make, marks=[marks, pytest.mark.works_with(library, what.removeprefix(f"{library}, "))], id=what
    )


FORMS = [
    form(nf4, "bitsandbytes", "4 bits"),
    form(int8, "bitsandbytes", "8 bits"),
    form(weight_only, "torchao", "8 bits, weights only"),
]


@pytest.fixture(params=FORMS)
def quantised(request, tmp_path):
    """What makes the same quantised base each time it is called."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def load():
        with warnings.catch_warnings():
            # bitsandbytes tells that it casts inputs, torchao what it will drop
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=request.param(), device_map="cpu", dtype=torch.bfloat16
            )

    return load


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recipe", ["pesc", "sira", "mixlora"])
def test_a_quantised_base_is_trained_saved_and_read_back(quantised, recipe, tmp_path):
    config = mixora.recipe(recipe, num_experts=4, rank=4, top_k=2)
    model = adapt(quantised(), config)
    with model.disable_adapter():
        dense = logits(model)
    torch.testing.assert_close(dense, logits(quantised()), rtol=0.02, atol=0.02)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype.is_floating_point for p in trained)
    before = logits(model)
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    after = logits(model)
    assert torch.isfinite(after).all() and not torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), dense)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert all(".mixora_" in name for name in file.keys())  # noqa: SIM118
    again = mixora.from_pretrained(quantised(), tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    assert torch.equal(logits(model.unload()), dense)


@pytest.mark.parametrize("evaluated", ["base", "model"])
def test_an_evaluation_before_training_changes_no_gradient(quantised, evaluated):
    """On some CPUs bitsandbytes packs 4-bit weights in evaluation mode, and the packed product has no gradient."""
    found = []
    for evaluates in (False, True):
        base = quantised()
        if evaluates and evaluated == "base":
            logits(base)
        model = adapt(base, mixora.recipe("sira", num_experts=4, rank=4, top_k=2, expert_dropout=0.0))
        if evaluates and evaluated == "model":
            logits(model)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    unevaluated, after = found
    assert after.keys() == unevaluated.keys()
    # unpacking a base's own weights rounds their scales
    allowed = 0.0 if evaluated == "model" else 0.3
    for name, gradient in unevaluated.items():
        assert (after[name] - gradient).norm() <= allowed * gradient.norm(), name


def test_a_mixture_on_a_quantised_base_becomes_an_adapter_for_it(quantised, tmp_path):
    config = mixora.recipe("molora", num_experts=1, rank=4, task_type="CAUSAL_LM")
    model = adapt(quantised(), config).eval()
    batch = {"input_ids": IDS, "labels": IDS}
    merged = mixora.merge(model, tmp_path / "out", approximation=mixora.Approximation([batch], [batch]))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        found = PeftModel.from_pretrained(quantised(), tmp_path / "out").eval()(input_ids=IDS).logits
    assert merged.changes.loss_of_mixture > 0
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_another_kernel_takes_the_place_of_joint_and_the_log_says_so(quantised, caplog):
    model = adapt(quantised(), mixora.recipe("molora", num_experts=4, rank=4, kernel="joint"))
    with caplog.at_level(logging.INFO, logger="mixora"):
        model(input_ids=IDS)
    reason = "(is a Linear4bit|is a Linear8bitLt|has a weight of type Int8Tensor), so kernel 'stacked' computes"
    assert len(caplog.messages) == 8
    assert all(re.search(reason, message) for message in caplog.messages)


def test_nothing_is_merged_into_quantised_weights(quantised):
    model = adapt(quantised(), mixora.recipe("lora"))
    with pytest.raises(MixoraError, match="cannot be merged: the frozen weight is quantised or sharded"):
        model.merge_adapter()
