"""Run as a script, in a process that knows no mixora: reads requests and writes the logits of plain PEFT.

A request is a line of JSON with the class of the base and four files; the answer is `done`.
"""

import json
import sys
import warnings

import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file


def compute(auto, base, adapter, ids, out):
    model = PeftModel.from_pretrained(getattr(transformers, auto).from_pretrained(base), adapter).eval()
    save_file({"logits": model(input_ids=load_file(ids)["ids"]).logits.detach()}, out)
    assert not [name for name in sys.modules if name.partition(".")[0] == "mixora"]
    assert {config.peft_type.value for config in model.peft_config.values()} == {"LORA"}


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    for line in sys.stdin:
        compute(**json.loads(line))
        print("done", flush=True)
