"""What a converted base takes over beside its weights, as transformers reads it."""

import json

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import mixora
from tests.conversion.test_crafted import IDS, write

# the end of a text and of a turn
ENDS = [2, 7]


def test_a_chat_model_still_knows_its_turns(tmp_path):
    folder, _ = write(tmp_path / "released", "llama", eos_token_id=2)
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "<end>": 7}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<end>"]}
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **special).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS, "temperature": 0.9}))
    (folder / "LICENSE.txt").write_text("Theirs.")
    mixora.convert(folder, tmp_path / "out")
    base = tmp_path / "out" / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    turn = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "hello<end>"
    assert tokenizer("hello<end>").input_ids == [3, 7] and "<end>" in tokenizer.all_special_tokens
    settings = AutoModelForCausalLM.from_pretrained(base).generation_config
    assert (settings.eos_token_id, settings.temperature) == (ENDS, 0.9)
    theirs, ours = (
        {file.name for file in place.iterdir() if "safetensors" not in file.name} for place in (folder, base)
    )
    assert theirs == ours


def test_it_stops_where_a_turn_ends(tmp_path):
    folder, _ = write(tmp_path / "released", "llama")
    mixora.convert(folder, tmp_path / "without")
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "without" / "base")
    said = free.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, IDS.shape[1] :]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [63, int(said[0])]}))
    mixora.convert(folder, tmp_path / "with")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "with" / "base")
    again = base.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
    assert again.tolist() == said[:1].tolist()
