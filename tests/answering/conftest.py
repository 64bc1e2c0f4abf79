import peft
import pytest

import mixora
from tests.characters import build_tokenizer
from tests.models import fill, tiny_llama


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """A folder with the base `tiny`, which has a chat template, and the adapters `red` and `blue` on it."""
    folder, tokenizer = tmp_path_factory.mktemp("saved"), build_tokenizer(chat=True)
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
    base = tiny_llama(vocab_size=len(tokenizer), **marks)
    base.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    base.name_or_path = str(folder / "tiny")
    config = mixora.recipe("mola", num_experts=4, top_k=2, rank=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config, adapter_name="red")
    model.add_adapter("blue", mixora.recipe("lora", rank=2, task_type="CAUSAL_LM"))
    fill(model, std=1.0).save_pretrained(folder)
    return folder
