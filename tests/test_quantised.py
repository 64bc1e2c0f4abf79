"""Bases in 4 and 8 bits: trained, only the adapter saved, read back."""

import importlib.util
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import mixora
from tests.models import adapt, tiny_llama, token_ids

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install mixora[quantised]"
)
IDS = token_ids(2, 8)
FORMS = {
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8": {"load_in_8bit": True},
}


@pytest.fixture(params=FORMS)
def quantised(request, tmp_path):
    """What makes the same quantised base each time it is called."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def load():
        with warnings.catch_warnings():
            # bitsandbytes tells that it casts inputs
            warnings.simplefilter("ignore")
            config = BitsAndBytesConfig(**FORMS[request.param])
            return AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
            )

    return load


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recipe", ["pesc", "sira", "mixlora"])
def test_a_quantised_base_is_trained_saved_and_read_back(quantised, recipe, tmp_path):
    dense = logits(quantised())
    config = mixora.recipe(recipe, num_experts=4, rank=4, top_k=2)
    model = adapt(quantised(), config)
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
    # on a CPU, bitsandbytes packs 4-bit weights for inference and rounds when a state dict unpacks them
    with model.disable_adapter():
        dense = logits(model)
    assert torch.equal(logits(model.unload()), dense)


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
