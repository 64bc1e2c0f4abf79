"""The Python of the guide runs as it stands."""

import re
from pathlib import Path

from peft import PeftModel

import mixora
from tests.models import adapt, tiny_llama, token_ids

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "merge.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = [{"input_ids": token_ids(4, 8, seed), "labels": token_ids(4, 8, seed)} for seed in range(4)]
    model = adapt(tiny_llama(), mixora.recipe("sira", num_experts=4, top_k=2, rank=2, task_type="CAUSAL_LM"))
    names = {"model": model, "batches": batches[:2], "other_batches": batches[2:], "base": tiny_llama()}
    # transformers keeps the code that comes with a model there
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    mixora.write_standalone(model, tmp_path / "runs" / "alone")
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL):
        if "trust_remote_code" in block:
            alone = {}
            exec(block, alone)
            assert alone["model"](input_ids=token_ids(1, 4)).logits.shape == (1, 4, 64)
        else:
            exec(block, names)
    assert isinstance(names["model"], PeftModel) and names["model"].peft_config["default"].peft_type.value == "LORA"
