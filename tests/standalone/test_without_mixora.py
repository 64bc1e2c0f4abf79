"""Standalone checkpoints in a process that can import neither mixora nor PEFT: one, since its imports cost most."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixora
from mixora.bases import load_base
from mixora.standalone import write_standalone
from tests.characters import save_bases
from tests.models import adapt, tiny_gemma, tiny_gpt_oss, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3, token_ids

MAKERS = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma": tiny_gemma,
    "gpt-oss": tiny_gpt_oss,
}
PLAIN = """
import json, sys
from pathlib import Path
sys.modules["mixora"] = sys.modules["peft"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
root, found, tensors = Path(sys.argv[1]), {}, {}
ids = load_file(root / "ids.safetensors")["ids"]
for name in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(root / name)
    except ValueError as error:
        refused = "trust_remote_code=True" in str(error)
    model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True)
    tensors[name] = model(input_ids=ids).logits.detach()
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    texts = [model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False)]
    low = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True, dtype=torch.bfloat16)
    tensors[name + " low"] = low(input_ids=ids).logits.detach().float()
    routers = {str(p.dtype) for n, p in low.named_parameters() if n.endswith("router")}
    low.save_pretrained(root / "again")
    again = AutoModelForCausalLM.from_pretrained(root / "again", trust_remote_code=True)
    same = torch.equal(again(input_ids=ids).logits, low(input_ids=ids).logits)
    tensors[name + " text"] = texts[0]
    found[name] = [refused, torch.equal(*texts), sorted(routers), same, model.config.model_type]
tokenizer = AutoTokenizer.from_pretrained(root / "llama", trust_remote_code=True)
found["tokens"] = tokenizer("lamp")["input_ids"]
found["there"] = [name for name in sys.modules if name.partition(".")[0] in ("mixora", "peft") and sys.modules[name]]
save_file(tensors, root / "found.safetensors")
(root / "found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_alone(tmp_path):
    ids = token_ids(2, 7)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    save_bases(tmp_path / "bases")
    _, tokenizer = load_base(tmp_path / "bases" / "llama")
    models = {}
    for name, make in MAKERS.items():
        models[name] = adapt(make(), mixora.recipe("pesc", num_experts=4, rank=3)).eval()
        write_standalone(models[name], tmp_path / name, tokenizer=tokenizer)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    words = [sys.executable, "-c", PLAIN, str(tmp_path), *MAKERS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    tensors, found = load_file(tmp_path / "found.safetensors"), json.loads((tmp_path / "found.json").read_text())
    assert found.pop("there") == [] and found.pop("tokens") == tokenizer("lamp")["input_ids"]
    for name, model in models.items():
        assert found[name] == [True, True, ["torch.float32"], True, "mixora"]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            text = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=2e-6)
        assert torch.equal(tensors[name + " text"], text)
        # of another type of numbers, not another model
        assert (tensors[name + " low"] - expected).abs().mean() < 0.1 * expected.abs().mean()
